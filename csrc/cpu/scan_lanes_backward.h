// The selective scan in lanes of channels, backward: see dass_ops/SCAN.md for the equations, scan_lanes.h for the layout.
//
// A task goes through the tiles of a row, one for each saved state, against the direction of the scan, and in each through its blocks
// of channels. Four states at a time, a tile is walked forward, which leaves the decay factors and decayed states in the first
// levels of cache, and then backward.
//
// d_B and d_C are sums over channels, that is over lanes: those of four states are added up to 4 lanes per 128-bit piece as soon as
// they are computed, a quarter of the memory traffic; the pieces are added once for all blocks of a task. Each task leaves its sums in
// a slab, and the slabs are added in order at the end. How many there are depends on shapes alone.
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t states_chunk = 64;  // steps of a tile, and between two saved states
constexpr int four = 4;             // states

bool lanes_fit_backward(const ScanSizes& sizes, const Projection& B, const Projection& C) {
  return lanes_fit(sizes, B, C) && sizes.state > 2 && sizes.chunk == states_chunk;
}

struct LaneBackwardPlan {
  const ScanBackward& f;
  const ScanSizes& sizes;
  int64_t N;  // states, rounded up to whole fours
  PackedProjections packed;
  int64_t units, per_unit, blocks, splits, per_split, row;  // blocks of a unit, and of a split
  Buffer d_B, d_C;           // (batch, K, units, splits, state, row)
  Buffer d_A, d_D, d_bias;   // (batch, K, D, state), (batch, K, D) twice
  Buffer d_u;                // (batch, D, L): where directions are summed and d_u is too short to hold the sum

  explicit LaneBackwardPlan(const ScanBackward& f)
      : f(f),
        sizes(f.sizes),
        N(round_up(f.sizes.state, four)),
        packed(f.sizes, f.B, f.C, N),
        units(packed.units),
        per_unit(sizes.channels / units),
        blocks(divide_up(per_unit, W)),
        splits(divide_up(blocks, divide_up(blocks, wanted_splits(sizes, units)))),
        per_split(divide_up(blocks, splits)),
        row(round_up(sizes.length, block)),
        d_B(4 * slabs()),
        d_C(4 * slabs()),
        d_A(4 * sequences() * sizes.state),
        d_D(4 * sequences()),
        d_bias(4 * sequences()),
        d_u(sizes.shared && sizes.io != Dtype::float32 ? 4 * sizes.batch * sizes.channels * sizes.length : 0) {}

  int64_t sequences() const { return sizes.batch * sizes.directions * sizes.channels; }
  int64_t slabs() const { return sizes.batch * sizes.directions * units * splits * sizes.state * row; }
  int64_t quarters() const { return round_up(N / four, W / 4); }  // vectors of a step's d_B or d_C
};

// What a task keeps for each of its blocks: vectors.
struct LaneBackwardBlock {
  float *A, *exponent, *mu, *d_A;        // (N)
  float *bias, *skip, *d_D, *d_bias;     // one

  LaneBackwardBlock(float* at, int64_t N)
      : A(at), exponent(A + N * W), mu(exponent + N * W), d_A(mu + N * W), bias(d_A + N * W), skip(bias + W), d_D(skip + W), d_bias(d_D + W) {}
  static int64_t floats(int64_t N) { return (4 * N + 4) * W; }
};

struct alignas(64) LaneBackwardScratch {
  using Steps = float[states_chunk * W + 16];  // so that a step's vectors do not all fall into one set of the cache
  Steps dt, slope, u, input, g, by_input, by_decay, y, z;
  float decays[2 * states_chunk * four * W];  // a, a h of each state
};

// Lane 4 p + i: the sum over piece p of the i-th vector.
inline V sum_within_pieces(const V* x) {
  const V low = unpack_low(x[0], x[1]) + unpack_high(x[0], x[1]), high = unpack_low(x[2], x[3]) + unpack_high(x[2], x[3]);
  return unpack_low_pairs(low, high) + unpack_high_pairs(low, high);
}

// Four states: what the walk back needs of them, the gradient of C, and y where it is wanted.
template <bool reversed, bool gated>
inline void recompute_states(LaneBackwardScratch& s, int64_t n, const float* exponents, const float* B, const float* C,
                             int64_t numbers, const float* entering, float* d_C, int64_t pitch) {
  const float *dt = s.dt, *input = s.input, *g = s.g;
  float *to_decays = s.decays, *to_y = s.y;
  V h[four], exponent[four];
#pragma GCC unroll 4
  for (int i = 0; i < four; ++i) {
    h[i] = load(entering + i * W);
    exponent[i] = load(exponents + i * W);
  }
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t l = reversed ? n - 1 - walked : walked;
    const V step = load(dt + l * W), w = load(input + l * W), by = load(g + l * W);
    V y = gated ? load(to_y + l * W) : by, by_state[four];
#pragma GCC unroll 4
    for (int i = 0; i < four; ++i) {
      const V a = exp2(step * exponent[i]), ah = a * h[i];
      store(to_decays + (l * four + i) * 2 * W, a);
      store(to_decays + (l * four + i) * 2 * W + W, ah);
      h[i] = fma(w, all(B[l * numbers + i]), ah);
      if (gated) y = fma(h[i], all(C[l * numbers + i]), y);
      by_state[i] = by * h[i];
    }
    if (gated) store(to_y + l * W, y);
    float* sum = d_C + l * pitch;
    store(sum, load(sum) + sum_within_pieces(by_state));
  }
}

template <bool reversed>
inline void walk_back(LaneBackwardScratch& s, int64_t n, const float* As, const float* B, const float* C, int64_t numbers, float* mus,
                      float* d_As, float* d_B, int64_t pitch) {
  const float *dt = s.dt, *input = s.input, *g = s.g, *decays = s.decays;
  float *to_by_input = s.by_input, *to_by_decay = s.by_decay;
  V mu[four], d_A[four];
#pragma GCC unroll 4
  for (int i = 0; i < four; ++i) {
    mu[i] = load(mus + i * W);
    d_A[i] = all(0.0f);
  }
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t l = reversed ? walked : n - 1 - walked;
    const V step = load(dt + l * W), w = load(input + l * W), by = load(g + l * W);
    V by_input = load(to_by_input + l * W), by_decay = load(to_by_decay + l * W), by_B[four];
#pragma GCC unroll 4
    for (int i = 0; i < four; ++i) {
      const V lambda = fma(by, all(C[l * numbers + i]), mu[i]);
      mu[i] = lambda * load(decays + (l * four + i) * 2 * W);
      const V of_decay = lambda * load(decays + (l * four + i) * 2 * W + W);
      by_input = fma(lambda, all(B[l * numbers + i]), by_input);
      by_decay = fma(of_decay, load(As + i * W), by_decay);
      d_A[i] = fma(of_decay, step, d_A[i]);
      by_B[i] = lambda * w;
    }
    store(to_by_input + l * W, by_input);
    store(to_by_decay + l * W, by_decay);
    float* sum = d_B + l * pitch;
    store(sum, load(sum) + sum_within_pieces(by_B));
  }
#pragma GCC unroll 4
  for (int i = 0; i < four; ++i) {
    store(mus + i * W, mu[i]);
    store(d_As + i * W, load(d_As + i * W) + d_A[i]);
  }
}

// One block's tile of n steps from `begin` on. d_B, d_C: (steps, quarters, W), added to. d_u_sum: where directions are summed, rows of
// floats for it, from the block's first channel on. The next tile is so many rows and steps further on.
template <bool reversed>
void backward_tile_lanes(const LaneBackwardPlan& plan, LaneBackwardScratch& s, const LaneBlock& at, const LaneBackwardBlock& kept, float* states,
                         int64_t begin, int64_t n, float* d_B, float* d_C, float* d_u_sum, bool first, bool last, int64_t rows_ahead, int64_t steps_ahead) {
  const auto ahead = [&](int64_t channel) { return rows_ahead * channel + steps_ahead; };
  const ScanBackward& f = plan.f;
  const ScanSizes& sizes = plan.sizes;
  const int64_t N = plan.N, L = sizes.length, sequence = (at.b * sizes.directions + at.k) * sizes.channels + at.first;
  const bool gated = f.z.data != nullptr;
  const V bias = load(kept.bias), skip = load(kept.skip);
  const auto rows = [&](Dtype type, const Sequence& of) { return element(type, rows_of(type, of, at), begin); };
  rows_to_lanes(sizes.io, rows(sizes.io, f.delta), f.delta.channel, at.channels, n, [&](int64_t l, V x) { store(s.slope + l * W, x + bias); }, ahead(f.delta.channel));
  if (sizes.delta_softplus) {
    step_sizes_and_slopes(s.slope, s.dt, n);
  } else {
    for (int64_t i = 0; i < n * W; i += W) {
      store(s.dt + i, load(s.slope + i));
      store(s.slope + i, all(1.0f));
    }
  }
  rows_to_lanes(sizes.io, rows(sizes.io, f.u), f.u.channel, at.channels, n, [&](int64_t l, V x) {
    store(s.u + l * W, x);
    store(s.input + l * W, load(s.dt + l * W) * x);
    store(s.by_decay + l * W, all(0.0f));
    store(s.by_input + l * W, all(0.0f));
  }, ahead(f.u.channel));
  rows_to_lanes(sizes.out, rows(sizes.out, f.d_out), f.d_out.channel, at.channels, n, [&](int64_t l, V x) { store(s.g + l * W, x); }, ahead(f.d_out.channel));
  if (gated)  // the gradient of y; what z multiplies stays in z
    rows_to_lanes(sizes.io, rows(sizes.io, f.z), f.z.channel, at.channels, n, [&](int64_t l, V x) {
      const V gate = sigmoid_from(x, exp_of_negative_magnitude(x)), g = load(s.g + l * W);
      store(s.z + l * W, g * gate * fma(x, all(1.0f) - gate, all(1.0f)));
      store(s.g + l * W, g * x * gate);
      store(s.y + l * W, load(s.u + l * W) * skip);
    });
  const int64_t entries = sizes.chunks * sizes.state;
  const float* boundary = static_cast<const float*>(f.boundary_states) + sequence * entries + begin / states_chunk * sizes.state;
  rows_to_lanes(
      Dtype::float32, boundary, entries, at.channels, sizes.state, [&](int64_t state, V h) { store(states + state * W, h); },
      rows_ahead * entries + steps_ahead / states_chunk * sizes.state);
  const int64_t numbers = plan.packed.numbers, pitch = plan.quarters() * W;
  const float *B = plan.packed.at(at.b, at.k, at.unit) + begin * numbers, *C = B + N;
  for (int64_t state = 0; state < N; state += four) {
    (gated ? recompute_states<reversed, true> : recompute_states<reversed, false>)(
        s, n, kept.exponent + state * W, B + state, C + state, numbers, states + state * W, d_C + state / four * W, pitch);
    walk_back<reversed>(s, n, kept.A + state * W, B + state, C + state, numbers, kept.mu + state * W, kept.d_A + state * W,
                        d_B + state / four * W, pitch);
  }
  V d_D = all(0.0f), d_bias = all(0.0f);
  for (int64_t i = 0; i < n * W; i += W) {
    const V by_input = load(s.by_input + i), u = load(s.u + i), g = load(s.g + i);
    const V d_delta = fma(u, by_input, load(s.by_decay + i)) * load(s.slope + i);
    d_bias = d_bias + d_delta;
    d_D = fma(g, u, d_D);
    store(s.slope + i, d_delta);
    store(s.u + i, fma(load(s.dt + i), by_input, g * skip));
  }
  store(kept.d_D, load(kept.d_D) + d_D);
  store(kept.d_bias, load(kept.d_bias) + d_bias);
  lanes_to_rows(sizes.io, element(sizes.io, f.d_delta, sequence * L + begin), L, at.channels, n,
                [&](int64_t l) { return load(s.slope + l * W); }, ahead(L));
  if (gated)
    lanes_to_rows(sizes.io, element(sizes.io, f.d_z, sequence * L + begin), L, at.channels, n,
                  [&](int64_t l) { return load(s.z + l * W) * load(s.y + l * W); });
  const bool summed = sizes.shared && !last;
  const int64_t out = (sizes.shared ? at.b * sizes.channels + at.first : sequence) * L + begin;
  lanes_to_rows(summed ? Dtype::float32 : sizes.io, summed ? d_u_sum + begin : element(sizes.io, f.d_u, out), L, at.channels, n,
                [&](int64_t l) { return load(s.u + l * W); },
                [&](int64_t c, int64_t from, float* row, int64_t length) {
                  if (!sizes.shared || first) return;
                  const float* earlier = d_u_sum + c * L + begin + from;
                  for (int64_t i = 0; i < length; i += W)
                    store(row + i, load(row + i) + load_part(earlier + i, static_cast<int>(smaller_of(W, length - i))));
                }, ahead(L));
}

template <bool reversed>
void backward_lanes(const LaneBackwardPlan& plan, int64_t b, int64_t k, int64_t unit, int64_t split, LaneBackwardScratch& s, bool first,
                    bool last) {
  const ScanBackward& f = plan.f;
  const ScanSizes& sizes = plan.sizes;
  const int64_t D = sizes.channels, L = sizes.length, N = plan.N, states = sizes.state, bk = b * sizes.directions + k;
  const int64_t begin = split * plan.per_split, blocks = smaller_of(plan.per_split, plan.blocks - begin), pitch = plan.quarters() * W;
  float *d_B = reinterpret_cast<float*>(&s + 1), *d_C = d_B + states_chunk * pitch, *entering = d_C + states_chunk * pitch;
  float* kept_blocks = entering + N * W;
  const auto block_at = [&](int64_t i) {
    const int64_t in_unit = (begin + i) * W;
    return LaneBlock{b, k, unit, unit * plan.per_unit + in_unit, smaller_of(W, plan.per_unit - in_unit)};
  };
  const auto kept = [&](int64_t i) { return LaneBackwardBlock(kept_blocks + i * LaneBackwardBlock::floats(N), N); };
  fill_row(entering, 0.0f, N * W);
  for (int64_t i = 0; i < blocks; ++i) {
    const LaneBlock at = block_at(i);
    const LaneBackwardBlock block = kept(i);
    const int64_t channel = k * D + at.first;
    const auto parameter = [&](const void* data) {
      return data == nullptr ? all(0.0f) : lane_parameter(static_cast<const float*>(data) + channel, 1, at.channels);
    };
    fill_row(block.A, 0.0f, LaneBackwardBlock::floats(N));
    load_states(static_cast<const float*>(f.A) + channel * states, states, at.channels, states, block.A);
    for (int64_t j = 0; j < N * W; j += W) store(block.exponent + j, load(block.A + j) * all(log2_e));
    if (f.d_last_state != nullptr)
      load_states(static_cast<const float*>(f.d_last_state) + (bk * D + at.first) * states, states, at.channels, states, block.mu);
    store(block.bias, parameter(f.delta_bias));
    store(block.skip, parameter(f.D));
  }
  const int64_t tiles = divide_up(L, states_chunk);
  for (int64_t walked = 0; walked < tiles; ++walked) {
    const int64_t from = (reversed ? walked : tiles - 1 - walked) * states_chunk, n = smaller_of(states_chunk, L - from);
    fill_row(d_B, 0.0f, 2 * states_chunk * pitch);
    for (int64_t i = 0; i < blocks; ++i) {
      const LaneBlock at = block_at(i);
      float* sums = sizes.io == Dtype::float32 ? static_cast<float*>(f.d_u) : plan.d_u.floats();
      backward_tile_lanes<reversed>(plan, s, at, kept(i), entering, from, n, d_B, d_C, sums + (b * D + at.first) * L, first, last,
                                    i + 1 < blocks ? W : W * (1 - blocks), i + 1 < blocks ? 0 : reversed ? states_chunk : -states_chunk);
    }
    for (int which = 0; which < 2; ++which) {
      const float* sums = which == 0 ? d_B : d_C;
      float* slab = (which == 0 ? plan.d_B : plan.d_C).floats() + ((bk * plan.units + unit) * plan.splits + split) * states * plan.row + from;
      for (int64_t state = 0; state < states; state += W)
        lanes_to_rows(Dtype::float32, slab + state * plan.row, plan.row, smaller_of(W, states - state), n, [&](int64_t l) {
          V pieces[W / 4];
          for (int i = 0; i < W / 4; ++i) pieces[i] = load(sums + l * pitch + (state / 4 + i) * W);
          return sum_pieces(pieces);
        });
    }
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const LaneBlock at = block_at(i);
    const LaneBackwardBlock block = kept(i);
    const int64_t sequence = bk * D + at.first;
    store_states(block.d_A, states, at.channels, states, plan.d_A.floats() + sequence * states);
    if (f.initial_state != nullptr)
      store_states(block.mu, states, at.channels, states, static_cast<float*>(f.d_initial_state) + sequence * states);
    scatter_lanes(load(block.d_D), plan.d_D.floats() + sequence, 1, at.channels);
    scatter_lanes(load(block.d_bias), plan.d_bias.floats() + sequence, 1, at.channels);
  }
}

bool scan_backward_lanes(const ScanBackward& f) {
  const LaneBackwardPlan plan(f);
  const ScanSizes& sizes = f.sizes;
  const int64_t outputs = sizes.outputs();
  parallel(sizes.batch * outputs * plan.units * plan.splits, [&](int64_t task) {
    const int64_t split = task % plan.splits, unit = task / plan.splits % plan.units, bo = task / (plan.splits * plan.units);
    const int64_t b = bo / outputs, o = bo % outputs;
    const int64_t floats = 2 * states_chunk * plan.quarters() * W + plan.N * W + plan.per_split * LaneBackwardBlock::floats(plan.N);
    auto* s = static_cast<LaneBackwardScratch*>(thread_scratch(sizeof(LaneBackwardScratch) + 4 * floats));
    const int64_t first = sizes.shared ? 0 : o, last = sizes.shared ? sizes.directions - 1 : o;
    for (int64_t k = first; k <= last; ++k)
      (sizes.reversed(k) ? backward_lanes<true> : backward_lanes<false>)(plan, b, k, unit, split, *s, k == first, k == last);
  });
  const auto finish = [&](const Projection& p, const Buffer& slabs, void* to) {
    finish_projection(sizes, p, plan.units / p.groups * plan.splits, plan.row, 1, slabs, to);
  };
  finish(f.B, plan.d_B, f.d_B);
  finish(f.C, plan.d_C, f.d_C);
  const int64_t channels = sizes.directions * sizes.channels;
  add_over_batch(plan.d_A, f.d_A, sizes.batch, channels * sizes.state);
  if (f.D != nullptr) add_over_batch(plan.d_D, f.d_D, sizes.batch, channels);
  if (f.delta_bias != nullptr) add_over_batch(plan.d_bias, f.d_delta_bias, sizes.batch, channels);
  return true;
}

}  // namespace
}  // namespace dass::cpu
