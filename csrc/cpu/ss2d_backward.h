// The four-direction scan of a map, backward: see ss2d_common.h and, for the equations, dass_ops/SCAN.md.
//
// A task goes through blocks of W channels; for each it walks every direction from its last chunk to its first, recomputing the states
// of a chunk from the one saved at its entry. d_x_dbl is a sum over channels: each task adds up its own blocks in a slab of its own,
// and the slabs are added in order at the end. How many there are depends on shapes alone.
#pragma once

namespace dass::cpu {
namespace {

struct Ss2dBackwardPlan {
  const Ss2dBackward& f;
  const Ss2dSizes& sizes;
  PackedMaps packed;
  MapOrder order;
  int64_t blocks, slabs, per_slab, length, slab_row;
  Buffer partial;                           // (batch, slabs, 4, rows, slab_row)
  Buffer d_A, d_bias, d_weight, d_skip;     // (batch, 4, D, N), (batch, 4, D), (batch, 4, D, R), (batch, D)

  explicit Ss2dBackwardPlan(const Ss2dBackward& f)
      : f(f),
        sizes(f.sizes),
        packed(sizes),
        order(sizes),
        blocks(divide_up(sizes.channels, W)),
        slabs(divide_up(blocks, divide_up(blocks, wanted_slabs(sizes)))),
        per_slab(divide_up(blocks, slabs)),
        length(sizes.length()),
        slab_row(round_up(length, 16)),
        partial(4 * sizes.batch * slabs * 4 * sizes.rows() * slab_row),
        d_A(4 * sizes.batch * 4 * sizes.channels * sizes.state),
        d_bias(4 * sizes.batch * 4 * sizes.channels),
        d_weight(4 * sizes.batch * 4 * sizes.channels * sizes.rank),
        d_skip(4 * sizes.batch * sizes.channels) {}

  static int64_t wanted_slabs(const Ss2dSizes& sizes) {
    return larger_of(1, (sizes.length() > 65536 ? 4 : 16) / larger_of(1, sizes.batch));
  }
  float* slab(int64_t b, int64_t s, int64_t k) const {
    return partial.floats() + ((b * slabs + s) * 4 + k) * sizes.rows() * slab_row;
  }
};

struct Ss2dBackwardTask {
  const Ss2dBackwardPlan& plan;
  int64_t b, first, channels;  // `first` channel of the block
  bool adds;                   // to the slab, which holds earlier blocks
  float *x, *g, *d_x;          // lane tiles of the map
  float *v, *dt, *a, *ah, *d_B, *d_C, *d_dt, *d_u;  // lane tiles of a chunk; v is the sigmoid after the step sizes
  float *turned;               // d_v as rows
  float *weight, *d_weight;    // (rank, W)
  float *mu, *A, *d_A;         // (N, W)
};

// The states of a chunk from the one that enters it: a, a h_prev, and g h, whose sum over channels is d_C. Pointers are copied first,
// here as elsewhere: to the compiler a vector that is stored may change the task.
template <bool reversed>
inline void recompute_states(const Ss2dBackwardTask& task, const uint32_t* order, int64_t n, V exponent, const float* B, int64_t rows,
                             V h) {
  const float *dt = task.dt, *x = task.x, *g = task.g;
  float *decay = task.a, *a_h = task.ah, *d_C = task.d_C;
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t t = reversed ? n - 1 - walked : walked, at = order[t] * int64_t{W};
    const V step = load(dt + t * W), a = exp2(step * exponent), ah = a * h;
    h = fma(step * load(x + at), all(B[t * rows]), ah);
    store(decay + t * W, a);
    store(a_h + t * W, ah);
    store(d_C + t * W, load(g + at) * h);
  }
}

// The adjoint recurrence against the direction of the scan. One state alone finishes d_v and adds to d_x at once.
template <bool reversed, bool alone>
inline void walk_back(const Ss2dBackwardTask& task, const uint32_t* order, int64_t n, const float* B, const float* C, int64_t rows,
                      int64_t state, V& d_bias) {
  const float *xs = task.x, *g = task.g, *dt = task.dt, *decay = task.a, *a_h = task.ah, *slope = task.v;
  float *d_x = task.d_x, *d_B = task.d_B, *d_dts = task.d_dt, *d_us = task.d_u;
  V mu = load(task.mu + state * W), d_A = load(task.d_A + state * W);
  const V A = load(task.A + state * W);
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t t = reversed ? walked : n - 1 - walked, at = order[t] * int64_t{W};
    const int64_t soon = order[t + (reversed ? steps_ahead : -steps_ahead)] * int64_t{W};
    __builtin_prefetch(xs + soon);
    __builtin_prefetch(g + soon);
    __builtin_prefetch(d_x + soon, 1);
    const V x = load(xs + at), b = all(B[t * rows]), ah = load(a_h + t * W);
    const V lambda = fma(all(C[t * rows]), load(g + at), mu);
    mu = load(decay + t * W) * lambda;
    const V by_step = lambda * load(dt + t * W);
    const V d_dt = lambda * fma(A, ah, b * x), d_u = by_step * b;
    d_A = fma(by_step, ah, d_A);
    store(d_B + t * W, by_step * x);
    if constexpr (alone) {
      const V d_v = d_dt * load(slope + t * W);
      d_bias = d_bias + d_v;
      store(d_dts + t * W, d_v);
      store(d_x + at, load(d_x + at) + d_u);
    } else {
      store(d_dts + t * W, state == 0 ? d_dt : load(d_dts + t * W) + d_dt);
      store(d_us + t * W, state == 0 ? d_u : load(d_us + t * W) + d_u);
    }
  }
  store(task.mu + state * W, mu);
  store(task.d_A + state * W, d_A);
}

// One row of the slab from a lane tile: its sum over the channels.
inline void add_sums(const float* tile, float* row, bool adds, int64_t padded) {
  for (int64_t t = 0; t < padded; t += W) {
    const V sum = sum_each(tile + t * W);
    store(row + t, adds ? load(row + t) + sum : sum);
  }
}

// The low-rank rows of the slab, weight^T d_v, in blocks of rows that share the loads of d_v (turned: a row for each channel).
template <int together>
inline void add_low_rank(const float* turned, int64_t turned_row, const float* weight, float* rows, int64_t slab_row, bool adds,
                         int64_t padded) {
  for (int64_t t = 0; t < padded; t += W) {
    V sum[together];
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) sum[i] = adds ? load(rows + i * slab_row + t) : all(0.0f);
    for (int c = 0; c < W; ++c) {
      const V d_v = load(turned + c * turned_row + t);
#pragma GCC unroll 8
      for (int i = 0; i < together; ++i) sum[i] = fma(d_v, all(weight[i * W + c]), sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) store(rows + i * slab_row + t, sum[i]);
  }
}

template <int together>
inline void add_weight_gradient(const float* d_v, const float* x_dbl, int64_t rows, float* d_weight, int64_t n) {
  V sum[together];
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) sum[i] = load(d_weight + i * W);
  for (int64_t t = 0; t < n; ++t) {
    const V here = load(d_v + t * W);
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) sum[i] = fma(here, all(x_dbl[t * rows + i]), sum[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) store(d_weight + i * W, sum[i]);
}

template <bool reversed>
void backward_direction(const Ss2dBackwardTask& task, int64_t k, float* slab) {
  const Ss2dBackwardPlan& plan = task.plan;
  const Ss2dBackward& f = plan.f;
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = plan.length, N = sizes.state, R = sizes.rank, rows = sizes.rows();
  const int64_t chunk = sizes.chunk, chunks = sizes.chunks, channel = k * D + task.first;
  const int64_t sequence = (task.b * 4 + k) * D + task.first;
  turn_weight(static_cast<const float*>(f.dt_weight) + channel * R, R, task.channels, task.weight);
  const V bias = lane_parameter(static_cast<const float*>(f.dt_bias) + channel, 1, task.channels);
  const float* boundary = static_cast<const float*>(f.boundary_states) + sequence * chunks * N;
  V d_bias = all(0.0f);
  fill_row(task.d_weight, 0.0f, R * W);
  for (int64_t n = 0; n < N; ++n) {
    store(task.mu + n * W, all(0.0f));
    store(task.d_A + n * W, all(0.0f));
    const V A_log = lane_parameter(static_cast<const float*>(f.A_logs) + channel * N + n, N, task.channels);
    store(task.A + n * W, exp2(A_log * all(log2_e)) * all(-1.0f));
  }
  for (int64_t walked = 0; walked < chunks; ++walked) {
    const int64_t j = reversed ? walked : chunks - 1 - walked, p = j * chunk, n = smaller_of(chunk, L - p);
    const int64_t padded = round_up(n, W);
    const float* steps = plan.packed.at(task.b, k) + p * rows;
    const uint32_t* order = plan.order.of(k) + p;
    low_rank(steps, rows, R, task.weight, bias, task.v, n);
    step_sizes_and_slopes(task.v, task.dt, n);
    float* const tiles[] = {task.d_B, task.d_C, task.d_dt};
    for (float* tile : tiles) fill_row(tile + n * W, 0.0f, (padded - n) * W);
    for (int64_t state = 0; state < N; ++state) {
      const float *B = steps + R + state, *C = B + N;
      const V entering = lane_parameter(boundary + j * N + state, chunks * N, task.channels);
      recompute_states<reversed>(task, order, n, load(task.A + state * W) * all(log2_e), B, rows, entering);
      N == 1 ? walk_back<reversed, true>(task, order, n, B, C, rows, state, d_bias)
             : walk_back<reversed, false>(task, order, n, B, C, rows, state, d_bias);
      add_sums(task.d_B, slab + (R + state) * plan.slab_row + p, task.adds, padded);
      add_sums(task.d_C, slab + (R + N + state) * plan.slab_row + p, task.adds, padded);
    }
    if (N != 1)
      for (int64_t t = 0; t < n; ++t) {
        const int64_t at = order[t] * int64_t{W};
        const V d_v = load(task.d_dt + t * W) * load(task.v + t * W);
        d_bias = d_bias + d_v;
        store(task.d_dt + t * W, d_v);
        store(task.d_x + at, load(task.d_x + at) + load(task.d_u + t * W));
      }
    const int64_t turned_row = chunk + 16;  // off a power of two
    for (int64_t t = 0; t < padded; t += W) {
      V r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = load(task.d_dt + (t + i) * W);
      transpose_square(r);
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) store(task.turned + c * turned_row + t, r[c]);
    }
    int64_t r = 0;
    for (; r + 8 <= R; r += 8) {
      add_low_rank<8>(task.turned, turned_row, task.weight + r * W, slab + r * plan.slab_row + p, plan.slab_row, task.adds, padded);
      add_weight_gradient<8>(task.d_dt, steps + r, rows, task.d_weight + r * W, n);
    }
    for (; r + 2 <= R; r += 2) {
      add_low_rank<2>(task.turned, turned_row, task.weight + r * W, slab + r * plan.slab_row + p, plan.slab_row, task.adds, padded);
      add_weight_gradient<2>(task.d_dt, steps + r, rows, task.d_weight + r * W, n);
    }
    for (; r < R; ++r) {
      add_low_rank<1>(task.turned, turned_row, task.weight + r * W, slab + r * plan.slab_row + p, plan.slab_row, task.adds, padded);
      add_weight_gradient<1>(task.d_dt, steps + r, rows, task.d_weight + r * W, n);
    }
  }
  scatter_lanes(d_bias, plan.d_bias.floats() + sequence, 1, task.channels);
  for (int64_t n = 0; n < N; ++n)  // d_A_logs = A d_A
    scatter_lanes(load(task.d_A + n * W) * load(task.A + n * W), plan.d_A.floats() + sequence * N + n, N, task.channels);
  lanes_to_rows(Dtype::float32, plan.d_weight.floats() + sequence * R, R, task.channels, R,
                [&](int64_t r) { return load(task.d_weight + r * W); });
}

// d_x_dbl from the slabs, put back into the order of the map.
void finish_low_rank(const Ss2dBackwardPlan& plan) {
  const Ss2dSizes& sizes = plan.sizes;
  const int64_t rows = sizes.rows(), L = plan.length, height = sizes.height, width = sizes.width, slab = 4 * rows * plan.slab_row;
  parallel(sizes.batch * 4 * rows, [&](int64_t i) {
    const int64_t b = i / (4 * rows), k = i / rows % 4, row = i % rows;
    const float* first = plan.slab(b, 0, k) + row * plan.slab_row;
    float* sum = static_cast<float*>(thread_scratch(8 * plan.slab_row));
    for (int64_t l = 0; l < L; l += W) {
      V total = load(first + l);
      for (int64_t s = 1; s < plan.slabs; ++s) total = total + load(first + s * slab + l);
      store(sum + l, total);
    }
    void* to = element(sizes.io, plan.f.d_x_dbl, i * L);
    if (k % 2 == 0) return store_row(sizes.io, to, sum, L);
    float* map = sum + plan.slab_row;
    for (int64_t w = 0; w < width; w += W) {
      const int64_t count = smaller_of(W, width - w);
      rows_to_lanes(Dtype::float32, sum + w * height, height, count, height,
                    [&](int64_t h, V x) { store_part(map + h * width + w, x, static_cast<int>(count)); });
    }
    store_row(sizes.io, to, map, L);
  });
}

bool ss2d_backward_lanes(const Ss2dBackward& f) {
  const Ss2dBackwardPlan plan(f);
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = plan.length, N = sizes.state, R = sizes.rank, chunk = sizes.chunk;
  const int64_t map = plan.order.places() * W, blocks = plan.blocks;
  plan.packed.pack(f.x_dbl);
  const uint32_t* place = plan.order.of(0);
  const int64_t position = sizes.channels_last ? D : 1, channel = sizes.channels_last ? 1 : L;
  // As in the forward: with few slabs each direction is a task of its own, and d_x the same to the bit.
  const bool split = sizes.batch * plan.slabs < thread_count();
  const Buffer apart(split ? 4 * sizes.batch * blocks * 4 * map : 0);
  const auto skip_of = [&](int64_t d, int64_t channels) {
    const float* Ds = static_cast<const float*>(f.Ds) + d;
    V sum = lane_parameter(Ds, 1, channels);
    for (int k = 1; k < 4; ++k) sum = sum + lane_parameter(Ds + k * D, 1, channels);
    return sum;
  };
  const auto store_d_x = [&](int64_t b, int64_t d, int64_t channels, const float* d_x) {
    lanes_to_map(sizes.io, element(sizes.io, f.d_x, b * D * L + d * channel), channel, position, channels, L,
                  [&](int64_t p) { return load(d_x + place[p] * int64_t{W}); });
  };
  parallel(sizes.batch * plan.slabs * (split ? 4 : 1), [&](int64_t i) {
    const int64_t item = split ? i / 4 : i, b = item / plan.slabs, slab = item % plan.slabs;
    const int64_t tile = round_up(chunk, W) * W;
    float* scratch = static_cast<float*>(
        thread_scratch(4 * ((split ? 2 : 3) * map + 8 * tile + W * (chunk + 16) + (2 * R + 3 * N) * W)));
    const int64_t end = smaller_of((slab + 1) * plan.per_slab, blocks);
    for (int64_t block = slab * plan.per_slab; block < end; ++block) {
      const int64_t d = block * W, channels = smaller_of(W, D - d);
      float* next = scratch;
      const auto take = [&](int64_t n) { return next += n, next - n; };
      Ss2dBackwardTask task{plan, b, d, channels, block != slab * plan.per_slab};
      task.x = take(map), task.g = take(map);
      task.d_x = split ? apart.floats() + ((b * blocks + block) * 4 + i % 4) * map : take(map);
      float** const tiles[] = {&task.v, &task.dt, &task.a, &task.ah, &task.d_B, &task.d_C, &task.d_dt, &task.d_u};
      for (float** at : tiles) *at = take(tile);
      task.turned = take(W * (chunk + 16));
      task.weight = take(R * W), task.d_weight = take(R * W);
      task.mu = take(N * W), task.A = take(N * W), task.d_A = take(N * W);
      map_to_lanes(sizes.io, element(sizes.io, f.x.data, b * f.x.batch + d * f.x.channel), f.x.channel, position, channels, L,
                    [&](int64_t p, V x) { store(task.x + place[p] * int64_t{W}, x); });
      const V skip = split ? all(0.0f) : skip_of(d, channels);
      V d_skip = all(0.0f);
      map_to_lanes(sizes.out, element(sizes.out, f.d_y.data, b * f.d_y.batch + d * f.d_y.channel), f.d_y.channel, position, channels, L,
                    [&](int64_t p, V g) {
                      const int64_t at = place[p] * int64_t{W};
                      store(task.g + at, g);
                      store(task.d_x + at, g * skip);
                      d_skip = fma(g, load(task.x + at), d_skip);
                    });
      for (int64_t k = split ? i % 4 : 0; k < (split ? i % 4 + 1 : 4); ++k)
        (k < 2 ? backward_direction<false> : backward_direction<true>)(task, k, plan.slab(b, slab, k));
      if (!split || i % 4 == 0) scatter_lanes(d_skip, plan.d_skip.floats() + b * D + d, 1, channels);
      if (!split) store_d_x(b, d, channels, task.d_x);
    }
  });
  if (split)
    parallel(sizes.batch * blocks, [&](int64_t item) {
      const int64_t b = item / blocks, d = item % blocks * W, channels = smaller_of(W, D - d);
      float* d_x = apart.floats() + item * 4 * map;
      const V skip = skip_of(d, channels);
      map_to_lanes(sizes.out, element(sizes.out, f.d_y.data, b * f.d_y.batch + d * f.d_y.channel), f.d_y.channel, position, channels, L,
                    [&](int64_t p, V g) {
                      const int64_t at = place[p] * int64_t{W};
                      V sum = g * skip;
                      for (int k = 0; k < 4; ++k) sum = sum + load(d_x + k * map + at);
                      store(d_x + at, sum);
                    });
      store_d_x(b, d, channels, d_x);
    });
  finish_low_rank(plan);
  const auto over_batch = [&](const Buffer& from, void* to, int64_t n) {
    float* sum = static_cast<float*>(to);
    for (int64_t i = 0; i < n; ++i) {
      float total = 0.0f;
      for (int64_t b = 0; b < sizes.batch; ++b) total += from.floats()[b * n + i];
      sum[i] = total;
    }
  };
  over_batch(plan.d_weight, f.d_dt_weight, 4 * D * R);
  over_batch(plan.d_bias, f.d_dt_bias, 4 * D);
  over_batch(plan.d_A, f.d_A_logs, 4 * D * N);
  float* d_Ds = static_cast<float*>(f.d_Ds);
  over_batch(plan.d_skip, d_Ds, D);
  for (int k = 1; k < 4; ++k) __builtin_memcpy(d_Ds + k * D, d_Ds, 4 * D);  // the same number for every direction
  return true;
}

}  // namespace
}  // namespace dass::cpu
