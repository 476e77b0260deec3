// One channel's tile in the backward along rows: the states anew, the adjoint, and from both the gradients. Which tiles a task goes
// through is in scan_rows_backward.h; the equations are in dass_ops/SCAN.md, the layout of runs in block_scan.h.
//
// Everything between loading and storing is in runs ("turned"): five turns a block, where one for each scan's operands and results
// would be six, and the shared ones are taken once for all channels.
#pragma once

namespace dass::cpu {
namespace {

struct RowBackwardPlan {
  const ScanBackward& f;
  const ScanSizes& sizes;
  int64_t units, per_unit, splits, per_split, row, pieces;
  Buffer d_B, d_C;           // (batch, K, units, splits, N, row), or of a constant (batch, pieces, K, D, N)
  Buffer d_A, d_D, d_bias;   // (batch, pieces, K, D, N), (batch, pieces, K, D) twice
  Buffer d_u;                // (batch, D, L): where directions are summed and d_u is too short to hold the sum
  bool streamed;

  explicit RowBackwardPlan(const ScanBackward& f)
      : f(f),
        sizes(f.sizes),
        units(units_of(f.B, f.C)),
        per_unit(sizes.channels / units),
        splits(divide_up(per_unit, divide_up(per_unit, wanted_splits(sizes, units)))),
        per_split(divide_up(per_unit, splits)),
        row(round_up(sizes.length, block)),
        pieces(divide_up(sizes.length, row_piece)),
        d_B(4 * slab_elements(f.B)),
        d_C(4 * slab_elements(f.C)),
        d_A(4 * sequences() * pieces * sizes.state),
        d_D(4 * sequences() * pieces),
        d_bias(4 * sequences() * pieces),
        d_u(sizes.shared && sizes.io != Dtype::float32 ? 4 * sizes.batch * sizes.channels * sizes.length : 0),
        streamed(sizes.io == Dtype::float32 && 2 * sequences() * sizes.length >= streaming_elements && sizes.length % 16 == 0 &&
                 (reinterpret_cast<uintptr_t>(f.d_u) | reinterpret_cast<uintptr_t>(f.d_delta)) % 64 == 0) {}

  int64_t sequences() const { return sizes.batch * sizes.directions * sizes.channels; }
  int64_t slab_elements(const Projection& p) const {
    return p.constant ? sequences() * pieces * sizes.state : sizes.batch * sizes.directions * units * splits * sizes.state * row;
  }
};

struct alignas(64) RowBackwardScratch {
  float dt[row_tile], slope[row_tile], u[row_tile], g[row_tile], a[row_tile], ah[row_tile], d_dt[row_tile], d_u[row_tile],
      y[row_tile], spare[row_tile];
  Effect runs[row_tile / block];
  V entering[row_tile / block];
  float constant_B[block], constant_C[block];
};

// B or C of a task for one state of a tile, and its gradient: rows as runs, or one block that serves every place.
struct TurnedProjection {
  const float* data;
  float* gradient;
  bool constant;

  int64_t place(int64_t i) const { return constant ? i % block : i; }
};

// The states of a tile anew, block by block: decays a, a times the state before, and the states. meanwhile() is work for the
// processor while the steps of enter_blocks wait for each other.
template <bool reversed, typename Meanwhile, typename Visit>
inline void along_states(RowBackwardScratch& s, const TurnedProjection& B, V exponent, int64_t n, V carry, Meanwhile meanwhile,
                         Visit visit) {
  for (int64_t i = 0; i < n; i += block) {
    const Block step = Block::at(s.dt + i), x = Block::at(s.u + i), b = Block::at(B.data + B.place(i));
    Block a, w;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      a.v[j] = exp2(step.v[j] * exponent);
      w.v[j] = step.v[j] * x.v[j] * b.v[j];
    }
    a.to(s.a + i);
    w.to(s.ah + i);
    s.runs[i / block] = compose_runs<reversed>(a, w);
  }
  enter_blocks<reversed>(s.runs, s.entering, n / block, carry);
  meanwhile();
  for (int64_t i = 0; i < n; i += block) {
    const Block a = Block::at(s.a + i), w = Block::at(s.ah + i);
    Block ah, states;
    V h = s.entering[i / block];
    along_run<reversed>([&](int j) {
      ah.v[j] = a.v[j] * h;
      states.v[j] = h = ah.v[j] + w.v[j];
    });
    visit(i, a, ah, states);
  }
}

// One channel's tile.
struct RowBackwardTile {
  const RowBackwardPlan& plan;
  RowBackwardScratch& s;
  int64_t b, k, d, begin, n, padded;
  const float* entering;              // states that enter the tile
  const TurnedProjection *B, *C;      // of each state
  float *mu, *d_A, *d_D, *d_bias;     // vectors: (N), (N), one, one
  float* d_u_sum;                     // where directions are summed: the channel's row
  bool first, last;                   // of the directions that are summed
  int64_t next_rows, next_steps;      // the next tile of the walk is so many rows and steps further on

  const void* row(Dtype type, const Sequence& of) const {
    return element(type, of.data, b * of.batch + k * of.direction + d * of.channel);
  }
  void fetch_next(Dtype type, const Sequence& of, const void* row, int64_t i) const {
    const void* at = element(type, row, next_rows * of.channel + next_steps + begin + i);
    for (int64_t line = 0; line < block; line += 16) __builtin_prefetch(element(type, at, line), 0, 2);
  }
  float parameter(const void* data) const {
    return data == nullptr ? 0.0f : static_cast<const float*>(data)[k * plan.sizes.channels + d];
  }
};

// A stretch of a row as runs; the next tile's is fetched meanwhile.
inline void load_runs(const RowBackwardTile& t, Dtype type, const Sequence& of, float* to) {
  const void* at = t.row(type, of);
  const TurnedRow row(type, at, t.begin, t.n, t.padded, t.s.spare);
  for (int64_t i = 0; i < t.padded; i += block) {
    t.fetch_next(type, of, at, i);
    row(i).to(to + i);
  }
}

// Step sizes, as runs. What lies beyond the end gets a step size of 0, which leaves the state as it is.
inline void load_steps(const RowBackwardTile& t, float bias) {
  const ScanBackward& f = t.plan.f;
  const ScanSizes& sizes = t.plan.sizes;
  RowBackwardScratch& s = t.s;
  const V shift_by = all(bias);
  const void* delta_row = t.row(sizes.io, f.delta);
  const TurnedRow delta(sizes.io, delta_row, t.begin, t.n, t.padded, s.spare, sizes.delta_softplus ? -__builtin_inff() : -bias);
  const auto each = [&](auto step_size) {
    for (int64_t i = 0; i < t.padded; i += block) {
      t.fetch_next(sizes.io, f.delta, delta_row, i);
      const Block v = delta(i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(s.dt + i + j * W, step_size(v.v[j] + shift_by));
    }
  };
  if (sizes.delta_softplus) {
    SoftplusNear near;
    each([&](V x) { return near(x); });
    if (near.was_far()) each([&](V x) { return softplus(x); });
  } else {
    each([&](V x) { return x; });
  }
}

// The slope of the step size with respect to delta, as runs.
inline void slopes_of_tile(const RowBackwardTile& t) {
  RowBackwardScratch& s = t.s;
  if (t.plan.sizes.delta_softplus) {
    for (int64_t i = 0; i < t.padded; i += W) store(s.slope + i, slope_of_softplus(load(s.dt + i)));
    return;
  }
  for (int64_t i = 0; i < t.padded; i += block) {
    for (int64_t j = i; j < i + block; ++j) s.slope[j] = j < t.n ? 1.0f : 0.0f;
    Block::at(s.slope + i).turned().to(s.slope + i);
  }
}

// Through the gate: y again, d_z from it, and g becomes the gradient of y.
template <bool reversed>
inline void gate_tile(const RowBackwardTile& t, const float* A, float skip) {
  const ScanBackward& f = t.plan.f;
  const ScanSizes& sizes = t.plan.sizes;
  RowBackwardScratch& s = t.s;
  for (int64_t i = 0; i < t.padded; i += W) store(s.y + i, load(s.u + i) * all(skip));
  for (int64_t state = 0; state < sizes.state; ++state) {
    const TurnedProjection& C = t.C[state];
    along_states<reversed>(
        s, t.B[state], all(A[state] * log2_e), t.padded, all(t.entering[state]), [] {},
        [&](int64_t i, const Block&, const Block&, const Block& h) {
          const Block c = Block::at(C.data + C.place(i));
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) store(s.y + i + j * W, fma(c.v[j], h.v[j], load(s.y + i + j * W)));
        });
  }
  const TurnedRow z(sizes.io, t.row(sizes.io, f.z), t.begin, t.n, t.padded, s.spare);
  for (int64_t i = 0; i < t.padded; i += block) {
    const Block gates = z(i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + j * W;
      const V x = gates.v[j], gate = sigmoid_from(x, exp_of_negative_magnitude(x)), g = load(s.g + at);
      store(s.g + at, g * x * gate);
      store(s.y + at, g * load(s.y + at) * gate * fma(x, all(1.0f) - gate, all(1.0f)));
    }
  }
  const int64_t sequence = (t.b * sizes.directions + t.k) * sizes.channels + t.d;
  store_turned(sizes.io, f.d_z, sequence * sizes.length + t.begin, t.n, t.padded, s.y, false);
}

// Sums over a row, kept as vectors.
struct TileGradients {
  float *d_A, *d_D, *d_bias;
};

// From what enters the runs of the adjoint to the gradients, for one state; those of delta and u go on from state to state in the
// scratch memory, and at the last to rows, if given.
template <bool reversed, bool starts, bool ends>
void gradients_of_tile(RowBackwardScratch& s, const TurnedProjection& B, const TurnedProjection& C, float A_value, float skip_value,
                       int64_t n, const TileGradients& sums, float* d_delta_to, float* d_u_to, bool streamed) {
  const V A = all(A_value), skip = all(skip_value);
  V d_A = load(sums.d_A), d_D = load(sums.d_D), d_bias = load(sums.d_bias);
  for (int64_t i = 0; i < n; i += block) {
    const Block a = Block::at(s.a + i), g = Block::at(s.g + i), c = Block::at(C.data + C.place(i));
    Block d_dt, d_u;
    V leaving = s.entering[i / block];
    along_run<!reversed>([&](int j) {
      const int64_t at = i + j * W;
      const V lambda = fma(c.v[j], g.v[j], leaving);
      leaving = a.v[j] * lambda;
      const V by_step = lambda * load(s.dt + at), b = load(B.data + B.place(at)), u = load(s.u + at), ah = load(s.ah + at);
      float* d_B = B.gradient + B.place(at);
      store(d_B, fma(by_step, u, load(d_B)));
      d_A = fma(by_step, ah, d_A);
      d_dt.v[j] = lambda * fma(A, ah, b * u);
      d_u.v[j] = fma(by_step, b, starts ? g.v[j] * skip : load(s.d_u + at));
      if (!starts) d_dt.v[j] = d_dt.v[j] + load(s.d_dt + at);
      if (ends) {
        d_dt.v[j] = d_dt.v[j] * load(s.slope + at);
        d_bias = d_bias + d_dt.v[j];
        d_D = fma(g.v[j], u, d_D);
      }
    });
    const auto put = [&](const Block& gradient, float* row, float* spare) {
      if (row == nullptr) return gradient.to(spare + i);
      streamed ? gradient.turned().stream_to(row + i) : gradient.turned().to(row + i);
    };
    put(d_dt, d_delta_to, s.d_dt);
    put(d_u, d_u_to, s.d_u);
  }
  store(sums.d_A, d_A);
  store(sums.d_D, d_D);
  store(sums.d_bias, d_bias);
}

template <bool reversed>
void backward_tile(const RowBackwardTile& t) {
  const RowBackwardPlan& plan = t.plan;
  const ScanBackward& f = plan.f;
  const ScanSizes& sizes = plan.sizes;
  RowBackwardScratch& s = t.s;
  const int64_t N = sizes.state, L = sizes.length;
  const float skip = t.parameter(f.D);
  const float* As = static_cast<const float*>(f.A) + (t.k * sizes.channels + t.d) * N;
  const bool gated = f.z.data != nullptr;
  load_steps(t, t.parameter(f.delta_bias));
  load_runs(t, sizes.io, f.u, s.u);
  if (gated) {
    load_runs(t, sizes.out, f.d_out, s.g);
    gate_tile<reversed>(t, As, skip);
  }
  // Gradients go straight to where they belong if nothing is left to be done to them.
  const int64_t at = ((t.b * sizes.directions + t.k) * sizes.channels + t.d) * L + t.begin;
  const bool straight = sizes.io == Dtype::float32 && t.n == t.padded;
  float* const d_delta_to = straight ? static_cast<float*>(f.d_delta) + at : nullptr;
  float* const d_u_to = straight && !sizes.shared ? static_cast<float*>(f.d_u) + at : nullptr;
  for (int64_t state = 0; state < N; ++state) {
    const TurnedProjection &B = t.B[state], &C = t.C[state];
    const bool starts = state == 0, ends = state == N - 1;
    along_states<reversed>(
        s, B, all(As[state] * log2_e), t.padded, all(t.entering[state]),
        [&] {
          if (starts && !gated) load_runs(t, sizes.out, f.d_out, s.g);
        },
        [&](int64_t i, const Block& a, const Block& ah, const Block& h) {
          const Block c = Block::at(C.data + C.place(i)), g = Block::at(s.g + i);
          float* d_C = C.gradient + C.place(i);
          Block aCg;
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            store(d_C + j * W, fma(g.v[j], h.v[j], load(d_C + j * W)));
            aCg.v[j] = a.v[j] * (c.v[j] * g.v[j]);
          }
          ah.to(s.ah + i);
          s.runs[i / block] = compose_runs<!reversed>(a, aCg);
        });
    V mu = load(t.mu + state * W);
    enter_blocks<!reversed>(s.runs, s.entering, t.padded / block, mu);
    store(t.mu + state * W, mu);
    if (ends) slopes_of_tile(t);
    const TileGradients sums{t.d_A + state * W, t.d_D, t.d_bias};
    if (N == 1)
      gradients_of_tile<reversed, true, true>(s, B, C, As[state], skip, t.padded, sums, d_delta_to, d_u_to, plan.streamed);
    else if (starts)
      gradients_of_tile<reversed, true, false>(s, B, C, As[state], skip, t.padded, sums, nullptr, nullptr, false);
    else if (ends)
      gradients_of_tile<reversed, false, true>(s, B, C, As[state], skip, t.padded, sums, d_delta_to, d_u_to, plan.streamed);
    else
      gradients_of_tile<reversed, false, false>(s, B, C, As[state], skip, t.padded, sums, nullptr, nullptr, false);
  }
  if (d_delta_to == nullptr) store_turned(sizes.io, f.d_delta, at, t.n, t.padded, s.d_dt, false);
  if (!sizes.shared) {
    if (d_u_to == nullptr) store_turned(sizes.io, f.d_u, at, t.n, t.padded, s.d_u, false);
    return;
  }
  float* sum = t.d_u_sum + t.begin;
  for (int64_t i = 0; i < t.padded; i += block) Block::at(s.d_u + i).turned().to(s.d_u + i);
  if (!t.first)
    for (int64_t i = 0; i < t.n; i += W)
      store(s.d_u + i, load(s.d_u + i) + load_part(sum + i, static_cast<int>(smaller_of(W, t.n - i))));
  t.last ? store_row(sizes.io, element(sizes.io, f.d_u, (t.b * sizes.channels + t.d) * L + t.begin), s.d_u, t.n)
         : store_row(Dtype::float32, sum, s.d_u, t.n);
}

}  // namespace
}  // namespace dass::cpu
