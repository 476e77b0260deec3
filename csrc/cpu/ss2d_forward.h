// The four-direction scan of a map, forward: see ss2d_common.h.
#pragma once

namespace dass::cpu {
namespace {

struct Ss2dForwardTask {
  const Ss2dForward& f;
  const PackedMaps& packed;
  const MapOrder& order;
  int64_t b, first, channels;
  float *x, *y;             // lane tiles of the map
  V skip;                   // y starts as skip x
  float *v, *dt, *sum;      // lane tiles of a chunk
  float* weight;            // (rank, W)
};

// n steps of one state from step p of the order on. One state alone adds to y at once; several are summed first. `starts`: y holds
// nothing yet.
template <bool reversed, bool alone, bool starts>
inline V forward_steps(const Ss2dForwardTask& task, const uint32_t* order, int64_t n, V exponent, const float* B, const float* C,
                       int64_t rows, bool first_state, V h) {
  const float *xs = task.x, *dt = task.dt;
  float *y = task.y, *sum = task.sum;
  const V skip = task.skip;
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t t = reversed ? n - 1 - walked : walked, at = order[t] * int64_t{W};
    const int64_t soon = order[t + (reversed ? -steps_ahead : steps_ahead)] * int64_t{W};
    __builtin_prefetch(xs + soon);
    __builtin_prefetch(y + soon, 1);
    const V step = load(dt + t * W), x = load(xs + at);
    h = fma(exp2(step * exponent), h, step * x * all(B[t * rows]));
    const V term = h * all(C[t * rows]);
    if constexpr (alone)
      store(y + at, (starts ? x * skip : load(y + at)) + term);
    else
      store(sum + t * W, first_state ? term : load(sum + t * W) + term);
  }
  return h;
}

template <bool reversed, bool starts>
void forward_direction(const Ss2dForwardTask& task, int64_t k) {
  const Ss2dForward& f = task.f;
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length(), N = sizes.state, R = sizes.rank, rows = sizes.rows();
  const int64_t chunk = sizes.chunk == 0 ? lane_chunk : sizes.chunk, chunks = divide_up(L, chunk);
  const int64_t channel = k * D + task.first;
  turn_weight(static_cast<const float*>(f.dt_weight) + channel * R, R, task.channels, task.weight);
  const V bias = lane_parameter(static_cast<const float*>(f.dt_bias) + channel, 1, task.channels);
  float* boundary = static_cast<float*>(f.boundary_states) + ((task.b * 4 + k) * D + task.first) * sizes.chunks * N;
  float* states = task.weight + R * W;  // (N, W)
  float* exponents = states + N * W;    // (N, W): A log2(e)
  for (int64_t n = 0; n < N; ++n) {
    store(states + n * W, all(0.0f));
    const V A_log = lane_parameter(static_cast<const float*>(f.A_logs) + channel * N + n, N, task.channels);
    store(exponents + n * W, exp2(A_log * all(log2_e)) * all(-log2_e));
  }
  for (int64_t walked = 0; walked < chunks; ++walked) {
    const int64_t j = reversed ? chunks - 1 - walked : walked, p = j * chunk, n = smaller_of(chunk, L - p);
    const float* steps = task.packed.at(task.b, k) + p * rows;
    const uint32_t* order = task.order.of(k) + p;
    low_rank(steps, rows, R, task.weight, bias, task.v, n);
    step_sizes_of_lanes(task.v, task.dt, n);
    for (int64_t state = 0; state < N; ++state) {
      V h = load(states + state * W);
      if (sizes.chunk != 0) scatter_lanes(h, boundary + j * N + state, sizes.chunks * N, task.channels);
      const float *B = steps + R + state, *C = B + N;
      const V exponent = load(exponents + state * W);
      h = N == 1 ? forward_steps<reversed, true, starts>(task, order, n, exponent, B, C, rows, true, h)
                 : forward_steps<reversed, false, starts>(task, order, n, exponent, B, C, rows, state == 0, h);
      store(states + state * W, h);
    }
    if (N == 1) continue;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t at = order[t] * int64_t{W};
      store(task.y + at, (starts ? load(task.x + at) * task.skip : load(task.y + at)) + load(task.sum + t * W));
    }
  }
}

bool ss2d_forward_lanes(const Ss2dForward& f) {
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length(), N = sizes.state, blocks = divide_up(D, W);
  const PackedMaps packed(sizes);
  packed.pack(f.x_dbl);
  const MapOrder order(sizes);
  // With fewer blocks of channels than threads, each direction is a task of its own. Either way the directions' terms are rounded
  // before they are added, in the order 0, 1, 2, 3: the same bits.
  const bool split = sizes.batch * blocks < thread_count();
  const int64_t chunk = sizes.chunk == 0 ? lane_chunk : sizes.chunk, map = order.places() * W;
  const Buffer apart(split ? 4 * sizes.batch * blocks * 4 * map : 0);
  const auto x_rows = [&](int64_t b, int64_t d) {
    return element(sizes.io, f.x.data, b * f.x.batch + d * f.x.channel);
  };
  const uint32_t* place = order.of(0);
  const int64_t position = sizes.channels_last ? D : 1, channel = sizes.channels_last ? 1 : L;
  const auto skips = [&](int64_t d, int64_t channels) {
    const float* Ds = static_cast<const float*>(f.Ds) + d;
    V sum = lane_parameter(Ds, 1, channels);
    for (int k = 1; k < 4; ++k) sum = sum + lane_parameter(Ds + k * D, 1, channels);
    return sum;
  };
  parallel(sizes.batch * blocks * (split ? 4 : 1), [&](int64_t i) {
    const int64_t item = split ? i / 4 : i, b = item / blocks, d = item % blocks * W, channels = smaller_of(W, D - d);
    float* scratch = static_cast<float*>(thread_scratch(4 * ((split ? 1 : 2) * map + (3 * chunk + sizes.rank + 2 * N) * W)));
    float *x = scratch, *y = split ? apart.floats() + i * map : x + map, *v = split ? x + map : y + map;
    const Ss2dForwardTask task{f, packed, order, b, d, channels, x, y, split ? all(0.0f) : skips(d, channels),
                               v, v + chunk * W, v + 2 * chunk * W, v + 3 * chunk * W};
    map_to_lanes(sizes.io, x_rows(b, d), f.x.channel, position, channels, L, [&](int64_t p, V value) {
      store(x + place[p] * int64_t{W}, value);
    });
    for (int64_t k = split ? i % 4 : 0; k < (split ? i % 4 + 1 : 4); ++k) {
      const auto run = k >= 2 ? (split ? forward_direction<true, true> : forward_direction<true, false>)
                              : (split || k == 0 ? forward_direction<false, true> : forward_direction<false, false>);
      run(task, k);
    }
    if (split) return;
    lanes_to_map(sizes.out, element(sizes.out, f.y, b * D * L + d * channel), channel, position, channels, L,
                 [&](int64_t p) { return load(y + place[p] * int64_t{W}); });
  });
  if (!split) return true;
  parallel(sizes.batch * blocks, [&](int64_t item) {
    const int64_t b = item / blocks, d = item % blocks * W, channels = smaller_of(W, D - d);
    float* y = apart.floats() + item * 4 * map;
    const V skip = skips(d, channels);
    map_to_lanes(sizes.io, x_rows(b, d), f.x.channel, position, channels, L, [&](int64_t p, V value) {
      const int64_t at = place[p] * int64_t{W};
      V sum = value * skip;
      for (int k = 0; k < 4; ++k) sum = sum + load(y + k * map + at);
      store(y + at, sum);
    });
    lanes_to_map(sizes.out, element(sizes.out, f.y, b * D * L + d * channel), channel, position, channels, L,
                 [&](int64_t p) { return load(y + place[p] * int64_t{W}); });
  });
  return true;
}

}  // namespace
}  // namespace dass::cpu
