// A chunk of one direction of a map, backward: its states, the walk back through them, and the products with d_v. See ss2d_backward.h.
#pragma once

namespace dass::cpu {
namespace {

struct Ss2dBackwardPlan;

struct Ss2dBackwardTask {
  const Ss2dBackwardPlan& plan;
  int64_t b, first, channels;  // `first` channel of the block
  bool adds;                   // to the slab, which holds earlier blocks
  float *x, *g, *d_x;          // lane tiles of the map
  V skip;                      // d_x starts as skip g
  float *v, *dt, *a, *ah, *d_B, *d_C, *d_dt, *d_u;  // lane tiles of a chunk; v is the sigmoid after the step sizes
  float *turned;               // d_v as rows
  float *weight, *d_weight;    // (rank, W)
  float *mu, *A, *d_A;         // (N, W)
  FetchedAhead* ahead;
};

// The state after a step from the one before: a and a h_prev, and of several states g h, whose sum over channels is d_C. Pointers are
// copied first, here as elsewhere: to the compiler a vector that is stored may change the task.
template <bool alone>
struct StateTiles {
  const float *x, *g, *dt;
  float *a, *ah, *d_C;

  explicit StateTiles(const Ss2dBackwardTask& task)
      : x(task.x), g(task.g), dt(task.dt), a(task.a), ah(task.ah), d_C(task.d_C) {}
  void step(int64_t t, int64_t at, V exponent, const float* B, V& h) const {
    const V dt_t = load(dt + t * W), decay = exp2(dt_t * exponent), decayed = decay * h;
    h = fma(dt_t * load(x + at), all(*B), decayed);
    store(a + t * W, decay);
    store(ah + t * W, decayed);
    if constexpr (!alone) store(d_C + t * W, load(g + at) * h);
  }
};

// The states of a chunk from the one that enters it.
template <bool reversed, bool alone>
inline void recompute_apart(const Ss2dBackwardTask& task, const uint32_t* order, int64_t n, V exponent, const float* B, int64_t rows,
                             V h) {
  const StateTiles<alone> tiles(task);
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t t = reversed ? n - 1 - walked : walked;
    tiles.step(t, order[t] * int64_t{W}, exponent, B + packed_step(t, rows), h);
  }
}

// The same for a channel's only state, step sizes included, three octets at once as in the forward.
template <bool reversed>
inline void recompute_alone(const Ss2dBackwardTask& task, const uint32_t* order, int64_t n, V exponent, V bias, const float* steps,
                            int64_t rows, int64_t rank, V h) {
  const int64_t octets = divide_up(n, octet);
  const float *B = steps + rank * group, *weight = task.weight;
  const StateTiles<true> tiles(task);
  float *dt = task.dt, *slope = task.v;
  alignas(64) float v[octet * W];
  const auto place = [&](int64_t walked) { return (reversed ? octets - 1 - walked : walked) * octet; };
  const auto multiply = [&](int64_t walked) {
    if (walked < octets) low_rank(steps + packed_step(place(walked), rows), rows, rank, weight, bias, v, octet);
  };
  const auto to_step_sizes = [&](int64_t walked) {
    if (walked >= octets) return;
    step_sizes_and_slopes(v, dt + place(walked) * W, octet);
    __builtin_memcpy(slope + place(walked) * W, v, sizeof v);
  };
  const ProductParts parts(rank), none(0);
  FetchedAhead ahead = *task.ahead;
  multiply(0);
  to_step_sizes(0);
  multiply(1);
  for (int64_t walked = 0; walked < octets; ++walked) {
    const int64_t p = place(walked), count = smaller_of(octet, n - p);
    ahead.fetch();
    if (count < octet || walked + 1 == octets) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = p + (reversed ? count - 1 - i : i);
        tiles.step(t, order[t] * int64_t{W}, exponent, B + packed_step(t, rows), h);
      }
      to_step_sizes(walked + 1);
      multiply(walked + 2);
      continue;
    }
    const bool multiplies = walked + 2 < octets;
    const ProductParts& part = multiplies ? parts : none;
    const float *numbers = steps + packed_step(multiplies ? place(walked + 2) : 0, rows), *B_here = B + packed_step(p, rows);
    float *const next = dt + place(walked + 1) * W, *const next_slope = slope + place(walked + 1) * W;
    SoftplusAndSlope near;
    V sum[octet];
#pragma GCC unroll 8
    for (int i = 0; i < octet; ++i) sum[i] = bias;
    for (int64_t i = 0; i < octet; ++i) {
      add_low_rank(numbers, weight, part.begin[i], part.begin[i + 1], sum);
      const int64_t t = reversed ? octet - 1 - i : i;
      tiles.step(p + t, order[p + t] * int64_t{W}, exponent, B_here + t, h);
      V step_size = load(v + t * W), its_slope;
      near(step_size, its_slope);
      store(next + t * W, step_size);
      store(next_slope + t * W, its_slope);
    }
    if (near.was_far()) to_step_sizes(walked + 1);
#pragma GCC unroll 8
    for (int i = 0; i < octet; ++i) store(v + i * W, sum[i]);
  }
  *task.ahead = ahead;
}

// Of a direction: d_dt_bias, and of the first one d_Ds.
struct BackwardSums {
  V bias, skip;
};

// One row of the slab from a lane tile: its sum over the channels.
inline void add_sums(const float* tile, float* row, bool adds, int64_t padded) {
  for (int64_t t = 0; t < padded; t += W) {
    const V sum = sum_each(tile + t * W);
    store(row + t, adds ? load(row + t) + sum : sum);
  }
}

// A lane tile as rows, one for each channel.
inline void turn_tile(const float* tile, float* turned, int64_t turned_row, int64_t padded) {
  for (int64_t t = 0; t < padded; t += W) {
    V r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = load(tile + (t + i) * W);
    transpose_square(r);
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) store(turned + c * turned_row + t, r[c]);
  }
}

// The adjoint recurrence against the direction of the scan, of one of several states.
template <bool reversed>
inline void walk_back(const Ss2dBackwardTask& task, const uint32_t* order, int64_t n, const float* B, const float* C, int64_t rows,
                      int64_t state) {
  const float *xs = task.x, *g = task.g, *dt = task.dt, *decay = task.a, *a_h = task.ah;
  float *d_B = task.d_B, *d_dts = task.d_dt, *d_us = task.d_u;
  V mu = load(task.mu + state * W), d_A = load(task.d_A + state * W);
  const V A = load(task.A + state * W);
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t t = reversed ? walked : n - 1 - walked, at = order[t] * int64_t{W};
    const int64_t soon = order[t + (reversed ? steps_ahead : -steps_ahead)] * int64_t{W};
    __builtin_prefetch(xs + soon);
    __builtin_prefetch(g + soon);
    const V x = load(xs + at), b = all(B[packed_step(t, rows)]), ah = load(a_h + t * W);
    const V lambda = fma(all(C[packed_step(t, rows)]), load(g + at), mu);
    mu = load(decay + t * W) * lambda;
    const V by_step = lambda * load(dt + t * W);
    const V d_dt = lambda * fma(A, ah, b * x), d_u = by_step * b;
    d_A = fma(by_step, ah, d_A);
    store(d_B + t * W, by_step * x);
    store(d_dts + t * W, state == 0 ? d_dt : load(d_dts + t * W) + d_dt);
    store(d_us + t * W, state == 0 ? d_u : load(d_us + t * W) + d_u);
  }
  store(task.mu + state * W, mu);
  store(task.d_A + state * W, d_A);
}

// The same for a channel's only state, which finishes d_v and adds to d_x at once. Group by group, so that what is summed over the
// channels or turned is still in the first-level cache. `starts`: d_x holds nothing yet.
template <bool reversed, bool starts>
inline void walk_back_alone(const Ss2dBackwardTask& task, const uint32_t* order, int64_t n, const float* B, const float* C, int64_t rows,
                            float* slab_B, float* slab_C, int64_t turned_row, BackwardSums& sums) {
  const float *xs = task.x, *g = task.g, *dt = task.dt, *decay = task.a, *a_h = task.ah, *slope = task.v;
  float *d_x = task.d_x, *d_vs = task.d_dt, *turned = task.turned;
  alignas(64) float d_B[group * W], d_C[group * W];
  const bool adds = task.adds;
  V mu = load(task.mu), d_A = load(task.d_A);
  V d_bias = sums.bias, d_skip = sums.skip;
  const V A = load(task.A), skip = task.skip;
  const int64_t groups = divide_up(n, group);
  for (int64_t walked = 0; walked < groups; ++walked) {
    const int64_t place = reversed ? walked : groups - 1 - walked, begin = place * group, count = smaller_of(group, n - begin);
    const float *B_here = B + place * rows * group, *C_here = C + place * rows * group;
    float* const rests[] = {d_B, d_C, d_vs + begin * W};
    for (float* rest : rests) fill_row(rest + count * W, 0.0f, (group - count) * W);
    for (int64_t step = 0; step < count; ++step) {
      const int64_t i = reversed ? step : count - 1 - step, t = begin + i, at = order[t] * int64_t{W};
      const int64_t soon = order[t + (reversed ? steps_ahead : -steps_ahead)] * int64_t{W};
      __builtin_prefetch(xs + soon);
      __builtin_prefetch(g + soon);
      __builtin_prefetch(d_x + soon, 1);
      const V x = in_register(load(xs + at)), g_t = in_register(load(g + at)), ah = in_register(load(a_h + t * W));
      const V dt_t = in_register(load(dt + t * W)), b = in_register(all(B_here[i])), bx = b * x;
      const V lambda = fma(all(C_here[i]), g_t, mu);
      mu = load(decay + t * W) * lambda;
      const V by_step = lambda * dt_t, d_v = lambda * fma(A, ah, bx) * load(slope + t * W);
      d_A = fma(by_step, ah, d_A);
      d_bias = d_bias + d_v;
      store(d_B + i * W, by_step * x);
      store(d_C + i * W, g_t * fma(dt_t, bx, ah));
      store(d_vs + t * W, d_v);
      store(d_x + at, (starts ? g_t * skip : load(d_x + at)) + by_step * b);
      if constexpr (starts) d_skip = fma(g_t, x, d_skip);
    }
    add_sums(d_B, slab_B + begin, adds, group);
    add_sums(d_C, slab_C + begin, adds, group);
    turn_tile(d_vs + begin * W, turned + begin, turned_row, group);
  }
  sums = {d_bias, d_skip};
  store(task.mu, mu);
  store(task.d_A, d_A);
}

// The low-rank rows of the slab, weight^T d_v, in blocks of rows that share the loads of d_v (turned: a row for each channel).
template <int together>
inline void add_to_slab(const float* turned, int64_t turned_row, const float* weight, float* rows, int64_t slab_row, bool adds,
                         int64_t padded) {
  for (int64_t t = 0; t < padded; t += W) {
    // Each row's place from that of the first: the compiler would keep a pointer for each, in vector registers, and to read one of those
    // waits for the products before it.
    float* to = rows + t;
    asm("" : "+r"(to));
    V sum[together];
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) sum[i] = adds ? load(to + i * slab_row) : all(0.0f);
    for (int c = 0; c < W; ++c) {
      const V d_v = load(turned + c * turned_row + t);
#pragma GCC unroll 8
      for (int i = 0; i < together; ++i) sum[i] = fma(d_v, all(weight[i * W + c]), sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) store(to + i * slab_row, sum[i]);
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
    for (int i = 0; i < together; ++i) sum[i] = fma(here, all(x_dbl[packed_step(t, rows) + i * group]), sum[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) store(d_weight + i * W, sum[i]);
}

}  // namespace
}  // namespace dass::cpu
