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
  FetchedAhead* ahead;
};

template <bool reversed>
inline void prefetch_map(const float* x, const float* y, const uint32_t* order) {
  const int64_t soon = order[reversed ? -steps_ahead : steps_ahead] * int64_t{W};
  __builtin_prefetch(x + soon);
  __builtin_prefetch(y + soon, 1);
}

// One step of a channel's only state, from x and to y at `at`. `starts`: y holds nothing yet.
template <bool starts>
inline void forward_step(V step, const float* x, float* y, V skip, V exponent, const float* B, const float* C, V& h) {
  const V input = load(x);
  h = fma(exp2(step * exponent), h, step * input * all(*B));
  store(y, (starts ? input * skip : load(y)) + h * all(*C));
}

// A direction with one state, three octets of steps at once: while one is walked, the softplus of the next and the low-rank product
// of the one after it are computed in between. They use different pipes, and a step's long chain of dependent operations is cut in
// pieces. Softplus is the one for v near 0; of an octet with others it is computed again.
template <bool reversed, bool starts>
void forward_alone(const Ss2dForwardTask& task, int64_t k, V bias, V exponent, float* boundary) {
  const Ss2dSizes& sizes = task.f.sizes;
  const int64_t L = sizes.length(), R = sizes.rank, rows = sizes.rows(), octets = divide_up(L, octet);
  const uint32_t* order = task.order.of(k);
  const float *xs = task.x, *weight = task.weight, *packed = task.packed.at(task.b, k, 0);
  float* y = task.y;
  alignas(64) float v[octet * W], dt[octet * W];
  const V skip = task.skip;
  FetchedAhead ahead = *task.ahead;
  const auto place = [&](int64_t walked) { return (reversed ? octets - 1 - walked : walked) * octet; };
  const auto multiply = [&](int64_t walked) {
    if (walked < octets) low_rank(packed + packed_step(place(walked), rows), rows, R, weight, bias, v, octet);
  };
  const ProductParts parts(R), none(0);
  V h = all(0.0f);
  multiply(0);
  step_sizes_of_lanes(v, dt, octet);
  multiply(1);
  for (int64_t walked = 0; walked < octets; ++walked) {
    const int64_t p = place(walked), n = smaller_of(octet, L - p), entered = reversed ? p + n : p;
    if (sizes.chunk != 0 && (entered % sizes.chunk == 0 || entered == L))
      scatter_lanes(h, boundary + p / sizes.chunk, sizes.chunks, task.channels);
    ahead.fetch();
    const float *B = packed + packed_step(p, rows) + R * group, *C = B + group;
    if (n < octet) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = reversed ? n - 1 - i : i, at = order[p + t] * int64_t{W};
        forward_step<starts>(load(dt + t * W), xs + at, y + at, skip, exponent, B + t, C + t, h);
      }
      step_sizes_of_lanes(v, dt, octet);
      multiply(walked + 2);
      continue;
    }
    const bool multiplies = walked + 2 < octets;
    const ProductParts& part = multiplies ? parts : none;
    const float* const numbers = packed + packed_step(multiplies ? place(walked + 2) : 0, rows);
    SoftplusNear near;
    V sum[octet];
#pragma GCC unroll 8
    for (int i = 0; i < octet; ++i) sum[i] = bias;
    for (int64_t i = 0; i < octet; ++i) {
      add_low_rank(numbers, weight, part.begin[i], part.begin[i + 1], sum);
      const int64_t t = reversed ? octet - 1 - i : i, at = order[p + t] * int64_t{W};
      prefetch_map<reversed>(xs, y, order + p + t);
      forward_step<starts>(load(dt + t * W), xs + at, y + at, skip, exponent, B + t, C + t, h);
      store(dt + t * W, near(load(v + t * W)));
    }
    if (near.was_far()) step_sizes_of_lanes(v, dt, octet);
#pragma GCC unroll 8
    for (int i = 0; i < octet; ++i) store(v + i * W, sum[i]);
  }
  *task.ahead = ahead;
}

// n steps of the only state from step p of the order on.
template <bool reversed, bool starts>
inline V forward_steps_alone(const Ss2dForwardTask& task, const uint32_t* order, int64_t n, V exponent, const float* B, const float* C,
                             int64_t rows, V h) {
  const float *xs = task.x, *dt = task.dt;
  float* y = task.y;
  const V skip = task.skip;
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t t = reversed ? n - 1 - walked : walked, at = order[t] * int64_t{W}, number = packed_step(t, rows);
    prefetch_map<reversed>(xs, y, order + t);
    forward_step<starts>(load(dt + t * W), xs + at, y + at, skip, exponent, B + number, C + number, h);
  }
  return h;
}

// n steps of one of several states from step p of the order on, their terms added up in `sum`.
template <bool reversed>
inline V forward_steps(const Ss2dForwardTask& task, const uint32_t* order, int64_t n, V exponent, const float* B, const float* C,
                       int64_t rows, bool first_state, V h) {
  const float *xs = task.x, *dt = task.dt;
  float* sum = task.sum;
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t t = reversed ? n - 1 - walked : walked, number = packed_step(t, rows);
    const V step = load(dt + t * W);
    h = fma(exp2(step * exponent), h, step * load(xs + order[t] * int64_t{W}) * all(B[number]));
    const V term = h * all(C[number]);
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
  if constexpr (interleaved)
    if (N == 1) return forward_alone<reversed, starts>(task, k, bias, load(exponents), boundary);
  for (int64_t walked = 0; walked < chunks; ++walked) {
    const int64_t j = reversed ? chunks - 1 - walked : walked, p = j * chunk, n = smaller_of(chunk, L - p);
    const float* steps = task.packed.at(task.b, k, p);
    const uint32_t* order = task.order.of(k) + p;
    low_rank(steps, rows, R, task.weight, bias, task.v, n);
    step_sizes_of_lanes(task.v, task.dt, n);
    for (int64_t state = 0; state < N; ++state) {
      V h = load(states + state * W);
      if (sizes.chunk != 0) scatter_lanes(h, boundary + j * N + state, sizes.chunks * N, task.channels);
      const float *B = steps + (R + state) * group, *C = B + N * group;
      const V exponent = load(exponents + state * W);
      h = N == 1 ? forward_steps_alone<reversed, starts>(task, order, n, exponent, B, C, rows, h)
                 : forward_steps<reversed>(task, order, n, exponent, B, C, rows, state == 0, h);
      store(states + state * W, h);
    }
    for (int64_t t = 0; N != 1 && t < n; ++t) {
      const int64_t at = order[t] * int64_t{W};
      store(task.y + at, (starts ? load(task.x + at) * task.skip : load(task.y + at)) + load(task.sum + t * W));
    }
  }
}

bool ss2d_forward_lanes(const Ss2dForward& f) {
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length(), N = sizes.state, blocks = divide_up(D, W);
  const PackedMaps packed(sizes);
  const MapOrder order(sizes);
  pack_and_order(packed, f.x_dbl, order);
  // With fewer blocks of channels than threads, each direction is a task of its own. Either way the directions' terms are rounded
  // before they are added, in the order 0, 1, 2, 3: the same bits.
  const bool split = sizes.batch * blocks < thread_count();
  const int64_t chunk = sizes.chunk == 0 ? lane_chunk : sizes.chunk, map = order.places() * W;
  const Buffer apart(split ? 4 * sizes.batch * blocks * 4 * map : 0);
  const auto x_rows = [&](int64_t b, int64_t d) {
    return element(sizes.io, f.x.data, b * f.x.batch + d * f.x.channel);
  };
  const uint32_t* place = order.of(0);
  const int64_t position = sizes.channels_last ? D : 1, channel = sizes.channels_last ? 1 : L, threads = thread_count();
  const auto y_rows = [&](int64_t b, int64_t d) { return element(sizes.out, f.y, b * D * L + d * channel); };
  const bool streamed = sizes.batch * D * L >= 1 << 14 && can_be_streamed(sizes.out, f.y, D, position, L);
  const bool small = L * W <= 1 << 15;  // so small that with the lane tiles all of this finds room in the second-level cache
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
    FetchedAhead ahead;
    const Ss2dForwardTask task{f, packed, order, b, d, channels, x, y, split ? all(0.0f) : skips(d, channels),
                               v, v + chunk * W, v + 2 * chunk * W, v + 3 * chunk * W, &ahead};
    const int64_t after = split ? i : i + threads, d_after = after % blocks * W;
    if (small && !split && !streamed) ahead.out = lines_of_map(sizes.out, y_rows(b, d), channel, position, channels, L);
    if (small && !split && after < sizes.batch * blocks)
      ahead.x = lines_of_map(sizes.io, x_rows(after / blocks, d_after), f.x.channel, position, smaller_of(W, D - d_after), L);
    map_to_lanes(sizes.io, x_rows(b, d), f.x.channel, position, channels, L, [&](int64_t p, V value) {
      store(x + place[p] * int64_t{W}, value);
    });
    for (int64_t k = split ? i % 4 : 0; k < (split ? i % 4 + 1 : 4); ++k) {
      const auto run = k >= 2 ? (split ? forward_direction<true, true> : forward_direction<true, false>)
                              : (split || k == 0 ? forward_direction<false, true> : forward_direction<false, false>);
      if (!split) ahead.weight = lines_of_weight(f.dt_weight, sizes, k < 3 ? k + 1 : 0, k < 3 ? d : d_after);
      run(task, k);
    }
    if (split) return;
    lanes_to_map(sizes.out, y_rows(b, d), channel, position, channels, L,
                 [&](int64_t p) { return load(y + place[p] * int64_t{W}); }, streamed);
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
    lanes_to_map(sizes.out, y_rows(b, d), channel, position, channels, L,
                 [&](int64_t p) { return load(y + place[p] * int64_t{W}); }, streamed);
  });
  return true;
}

}  // namespace
}  // namespace dass::cpu
