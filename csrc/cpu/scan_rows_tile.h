// A tile of a few channels in the backward along rows: its states anew and what is then known of the adjoint. The gradients that
// follow from both are in scan_rows_gradients.h, the tiles that a task goes through in scan_rows_backward.h; the equations are in
// dass_ops/SCAN.md, the layout of runs in block_scan.h.
//
// Everything between loading and storing is in runs ("turned"): five turns a block, where one for each scan's operands and results
// would be six, and the shared ones are taken once for all channels. Channels that are worked on at the same time wait for the steps
// of enter_blocks together.
#pragma once

#include <type_traits>

namespace dass::cpu {
namespace {

constexpr int64_t backward_steps = 512;  // that are worked on at a time: a tile of two channels, or of more where rows are short

struct RowBackwardPlan {
  const ScanBackward& f;
  const ScanSizes& sizes;
  int64_t units, per_unit, splits, per_split, row, pieces;
  int64_t at_a_time;         // channels
  bool shares;               // short rows: several to a square of block_scan.h
  Buffer d_B, d_C;           // (batch, K, units, splits, N, row), or of a constant (batch, pieces, K, D, N)
  Buffer parts_of_d_A, parts_of_d_D, parts_of_d_bias;  // (batch, pieces, K, D, N), (batch, pieces, K, D) twice
  float *d_A, *d_D, *d_bias;                           // those, or where there is one part the outputs
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
        at_a_time(f.B.constant || f.C.constant ? 1 : backward_steps / smaller_of(row, row_tile)),
        shares(W == 16 && (row == 4 * W || row == 8 * W)),
        d_B(4 * slab_elements(f.B)),
        d_C(4 * slab_elements(f.C)),
        parts_of_d_A(bytes_of_parts(f.d_A, sizes.state)),
        parts_of_d_D(bytes_of_parts(f.D == nullptr ? nullptr : f.d_D, 1)),
        parts_of_d_bias(bytes_of_parts(f.delta_bias == nullptr ? nullptr : f.d_delta_bias, 1)),
        d_A(parts_or(parts_of_d_A, f.d_A)),
        d_D(parts_or(parts_of_d_D, f.d_D)),
        d_bias(parts_or(parts_of_d_bias, f.d_delta_bias)),
        d_u(sizes.shared && sizes.io != Dtype::float32 ? 4 * sizes.batch * sizes.channels * sizes.length : 0),
        streamed(2 * sequences() * sizes.length * size_of(sizes.io) >= streaming_bytes) {}

  int64_t sequences() const { return sizes.batch * sizes.directions * sizes.channels; }
  int64_t parts() const { return sizes.batch * pieces; }
  int64_t bytes_of_parts(const void* output, int64_t states) const {
    return parts() == 1 && output != nullptr ? 0 : 4 * sequences() * pieces * states;
  }
  static float* parts_or(const Buffer& parts, void* output) {
    return parts.floats() == nullptr ? static_cast<float*>(output) : parts.floats();
  }
  int64_t slab_elements(const Projection& p) const {
    return p.constant ? sequences() * pieces * sizes.state : sizes.batch * sizes.directions * units * splits * sizes.state * row;
  }
};

// What has yet to be put past the caches: a tile after it was written, or loads would wait for the stores.
struct Pending {
  char* to;
  const char* from;
  int64_t bytes;
};

struct alignas(64) RowBackwardScratch {
  float dt[backward_steps], slope[backward_steps], u[backward_steps], g[backward_steps], a[backward_steps], ah[backward_steps],
      d_dt[backward_steps], d_u[backward_steps], y[backward_steps];
  float within[block];  // runs: negative beyond the end of the tile's last block
  Effect runs[backward_steps / block * square_blocks];
  V entering[backward_steps / block * square_blocks];

  Pending pending[2 * backward_steps / block];  // gradients in d_dt and d_u
  int64_t pending_count = 0;

  void stream_pending() {
    for (const Pending* p = pending; p < pending + pending_count; ++p) stream_bytes(p->to, p->from, p->bytes);
    pending_count = 0;
  }
  void begin_tile(int64_t n, int64_t padded) {
    if (n == padded) return;
    for (int64_t i = 0; i < block; ++i) within[i] = padded - block + i < n ? 1.0f : -1.0f;
    Block::at(within).turned().to(within);
  }
};

// B or C of a task for one state of a tile, and its gradient, as runs.
struct TurnedProjection {
  const float* data;
  float* gradient;
};

// What a task keeps beside a tile's scratch. For each channel, as vectors: mu and d_A of each state, d_D, d_bias, and the sums for
// constant B and C. For each state a tile of B, C and their gradients.
struct RowBackwardMemory {
  int64_t channels, N;
  float* at;

  static int64_t floats(int64_t channels, int64_t N) { return channels * (4 * N + 2) * W + 4 * N * row_tile; }

  int64_t of_channel() const { return (4 * N + 2) * W; }
  float* mu(int64_t c) const { return at + c * of_channel(); }
  float* d_A(int64_t c) const { return mu(c) + N * W; }
  float* d_D(int64_t c) const { return d_A(c) + N * W; }
  float* d_bias(int64_t c) const { return d_D(c) + W; }
  float* constant(int64_t c, int64_t which) const { return d_bias(c) + W + which * N * W; }
  float* tile(int64_t which, int64_t state) const { return at + channels * of_channel() + (which * N + state) * row_tile; }
};

// The tile of a few channels. Channel j of them has its place in the scratch memory.
struct RowBackwardTile {
  const RowBackwardPlan& plan;
  RowBackwardScratch& s;
  const RowBackwardMemory& memory;
  int64_t b, k, first, channels;       // those of the task
  int64_t c, count;                    // of them those that are worked on
  int64_t begin, n, padded, entry;     // the tile, and the boundary state that enters it
  const TurnedProjection *B, *C;       // of each state
  bool first_direction, last_direction;  // of those that are summed
  int64_t next_steps;                  // the next tile of the walk is so many steps further on

  int64_t place(int64_t j) const { return j * padded; }
  int64_t runs_of(int64_t j) const { return j * (plan.shares ? padded / block : round_up(padded / block, square_blocks)); }
  int64_t sequence(int64_t j) const { return (b * plan.sizes.directions + k) * plan.sizes.channels + first + c + j; }
  float of_channel(const void* data, int64_t j, int64_t state = 0, int64_t states = 1) const {
    return data == nullptr ? 0.0f : static_cast<const float*>(data)[(k * plan.sizes.channels + first + c + j) * states + state];
  }
  float A(int64_t j, int64_t state) const { return of_channel(plan.f.A, j, state, plan.sizes.state); }
  TurnedRow row(Dtype type, const Sequence& of, int64_t j) const {
    return {type, element(type, of.data, b * of.batch + k * of.direction + (first + c + j) * of.channel), begin, n};
  }
  // The same stretch of a row in the channels that come next. Its end, which lies on one cache line more where rows begin anywhere, is
  // fetched at once.
  Ahead ahead(Dtype type, const Sequence& of, int64_t j) const {
    const int64_t next = c + count + j;
    const int64_t further = next < channels ? count * of.channel : -(c + j - smaller_of(j, channels - 1)) * of.channel + next_steps;
    const auto* at = static_cast<const char*>(element(type, row(type, of, j).at, further));
    __builtin_prefetch(at + n * size_of(type) - 1, 0, 2);
    return {at, size_of(type)};
  }
};

// The end of a row, less than a block, and zeros beyond it.
template <Dtype type>
inline Block load_end_of_runs(const char* from, int64_t n) {
  if constexpr (type == Dtype::float32) {
    const float* p = reinterpret_cast<const float*>(from);
    return Block{{load_clipped(p, n), load_clipped(p + W, n - W), load_clipped(p + 2 * W, n - 2 * W), load_clipped(p + 3 * W, n - 3 * W)}}
        .turned();
  } else {
    alignas(64) char end[block * size_of(type)] = {};
    __builtin_memcpy(end, from, n * size_of(type));
    return load_runs<type>(end);
  }
}

// Whether some were too far for the function. Nothing but the loop over whole blocks: what else stands in it takes registers from the coefficients.
template <Dtype type, typename Function>
__attribute__((noinline)) bool each_step_size(const RowBackwardTile& t) {
  Function function;
  const int64_t padded = t.padded, whole = t.n / block * block;
  for (int64_t j = 0; j < t.count; ++j) {
    float *const dt = t.s.dt + t.place(j), *const slope = t.s.slope + t.place(j);
    const V shift_by = all(t.of_channel(t.plan.f.delta_bias, j));
    const auto* row = static_cast<const char*>(t.row(type, t.plan.f.delta, j).at);
    const Ahead ahead = t.ahead(type, t.plan.f.delta, j);
    const auto step_sizes = [&](Block v, int64_t i) {
      Block slopes;
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) v.v[q] = v.v[q] + shift_by;
      function(v, slopes);
      v.to(dt + i);
      slopes.to(slope + i);
    };
    for (int64_t i = 0; i < whole; i += block) {
      ahead.fetch_lines(i);
      step_sizes(load_runs<type>(row + i * size_of(type)), i);
    }
    if (whole != padded) {
      ahead.fetch_lines(whole);
      step_sizes(load_end_of_runs<type>(row + whole * size_of(type), t.n - whole), whole);
    }
  }
  return function.was_far();
}
struct FarSoftplusAndSlope {
  void operator()(Block& v, Block& slopes) const {
    for (int q = 0; q < 4; ++q) {
      v.v[q] = softplus(v.v[q]);
      slopes.v[q] = slope_of_softplus(v.v[q]);
    }
  }
  bool was_far() const { return false; }
};
struct NoSoftplus {
  void operator()(Block&, Block& slopes) const { slopes = {{all(1.0f), all(1.0f), all(1.0f), all(1.0f)}}; }
  bool was_far() const { return false; }
};

// Step sizes and their slopes with respect to delta. What lies beyond the end gets a step size of 0, which leaves the state as it is.
inline void load_steps(const RowBackwardTile& t) {
  const ScanBackward& f = t.plan.f;
  RowBackwardScratch& s = t.s;
  with_dtype(f.sizes.io, [&](auto type) {
    if (!f.sizes.delta_softplus)
      each_step_size<type.value, NoSoftplus>(t);
    else if (each_step_size<type.value, SoftplusAndSlope>(t))
      each_step_size<type.value, FarSoftplusAndSlope>(t);
  });
  if (t.n == t.padded) return;
  for (int64_t at = t.padded - block; at < t.place(t.count); at += t.padded)
    for (int64_t i = 0; i < block; i += W) {
      const V within = load(s.within + i);
      store(s.dt + at + i, where_not_negative(within, load(s.dt + at + i), all(0.0f)));
      store(s.slope + at + i, where_not_negative(within, load(s.slope + at + i), all(0.0f)));
    }
}

// A stretch of a row of each channel as runs.
template <Dtype type>
inline void load_row_of_runs(const TurnedRow& row, int64_t padded, float* to) {
  const auto* at = static_cast<const char*>(row.at);
  const int64_t n = row.n, whole = n / block * block;
  for (int64_t i = 0; i < whole; i += block) load_runs<type>(at + i * size_of(type)).to(to + i);
  if (whole != padded) load_end_of_runs<type>(at + whole * size_of(type), n - whole).to(to + whole);
}
inline void load_tile(const RowBackwardTile& t, Dtype type, const Sequence& of, float* to) {
  const auto load = type == Dtype::float32    ? load_row_of_runs<Dtype::float32>
                    : type == Dtype::bfloat16 ? load_row_of_runs<Dtype::bfloat16>
                                              : load_row_of_runs<Dtype::float16>;
  for (int64_t j = 0; j < t.count; ++j) load(t.row(type, of, j), t.padded, to + t.place(j));
}

// enter_square of block_scan.h for `count` squares that lie `apart` runs apart, step by step for all of them: the steps wait for each
// other, and the processor looks no further ahead than one square.
template <bool reversed, int span, int count>
inline void enter_squares(const Effect* runs, int64_t apart, V* entering, V* carry) {
  constexpr int first = reversed ? square_blocks - 1 : 0, step = reversed ? -1 : 1;
  V P[count][square_blocks], q[count][square_blocks], h[count][square_blocks], a[count], b[count];
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < square_blocks; ++i) P[m][i] = runs[m * apart + i].P, q[m][i] = runs[m * apart + i].q;
    transpose_pieces(P[m]);
    transpose_pieces(q[m]);
    a[m] = P[m][first], b[m] = q[m][first];
  }
#pragma GCC unroll 4
  for (int i = 1; i < square_blocks; ++i)
#pragma GCC unroll 2
    for (int m = 0; m < count; ++m) {
      b[m] = fma(P[m][first + i * step], b[m], q[m][first + i * step]);
      a[m] = P[m][first + i * step] * a[m];
    }
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) compose_step<1, reversed, span>(a[m], b[m]);
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) compose_step<2, reversed, span>(a[m], b[m]);
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) compose_step<4, reversed, span>(a[m], b[m]);
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) compose_step<8, reversed, span>(a[m], b[m]);
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) {
    const V after = fma(a[m], carry[m], b[m]);
    h[m][first] = shift<1, reversed, span>(after, carry[m]);
    carry[m] = span == W ? last_everywhere<reversed>(after) : after;
  }
#pragma GCC unroll 4
  for (int i = 1; i < square_blocks; ++i)
#pragma GCC unroll 2
    for (int m = 0; m < count; ++m)
      h[m][first + i * step] = fma(P[m][first + (i - 1) * step], h[m][first + (i - 1) * step], q[m][first + (i - 1) * step]);
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) {
    transpose_pieces(h[m]);
#pragma GCC unroll 4
    for (int i = 0; i < square_blocks; ++i) entering[m * apart + i] = h[m][i];
  }
}

// For so many things, two at a time and the last alone: visit(j, 2 or 1), the number a constant. What is done to a channel is a chain
// of steps that wait for each other; the processor has work where two chains are interleaved.
template <typename Visit>
inline void in_pairs(int64_t all, Visit visit) {
  int64_t j = 0;
  for (; j + 1 < all; j += 2) visit(j, std::integral_constant<int, 2>());
  if (j < all) visit(j, std::integral_constant<int, 1>());
}

// From what enters each channel, carry(j) and put(j, after), to what enters its runs.
template <bool reversed, typename Carry, typename Put>
inline void enter_tile(const RowBackwardTile& t, Carry carry, Put put) {
  RowBackwardScratch& s = t.s;
  if (!t.plan.shares) {
    const int64_t blocks = t.padded / block, slots = t.runs_of(1);
    in_pairs(t.count, [&](int64_t j, auto pair) {
      constexpr int count = pair.value;
      Effect* const runs = s.runs + j * slots;
      V x[count];
      for (int m = 0; m < count; ++m) {
        x[m] = all(carry(j + m));
        for (int64_t i = blocks; i < slots; ++i) runs[m * slots + i] = {all(1.0f), all(0.0f)};
      }
      for (int64_t walked = 0; walked < slots; walked += square_blocks) {
        const int64_t at = reversed ? slots - square_blocks - walked : walked;
        enter_squares<reversed, W, count>(runs + at, slots, s.entering + j * slots + at, x);
      }
      for (int m = 0; m < count; ++m) put(j + m, x[m]);
    });
  } else if constexpr (W == 16) {
    alignas(64) static constexpr float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t span = t.padded / W, shared = t.padded == 4 * W ? 4 : 2;
    const int64_t present = t.count * span / 4;  // runs
    for (int64_t i = present; i < round_up(present, square_blocks); ++i) s.runs[i] = {all(1.0f), all(0.0f)};
    in_pairs(divide_up(t.count, shared), [&](int64_t square, auto pair) {
      constexpr int count = pair.value;
      const int64_t first = square * shared, end = smaller_of(first + count * shared, t.count);
      // Not by way of memory: a load waits for narrower stores before it until all before them is done.
      V x[count];
      for (int m = 0; m < count; ++m) {
        const int64_t j = first + m * shared;
        x[m] = all(j < end ? carry(j) : 0.0f);
        for (int64_t row = 1; row < shared && j + row < end; ++row)
          x[m] = where_not_negative(all(row * span - 1) - load(lane), x[m], all(carry(j + row)));
      }
      (span == 4 ? enter_squares<reversed, 4, count> : enter_squares<reversed, 8, count>)(
          s.runs + square * square_blocks, square_blocks, s.entering + square * square_blocks, x);
      float lanes[count * W];
      for (int m = 0; m < count; ++m) store(lanes + m * W, x[m]);
      for (int64_t j = first; j < end; ++j) put(j, all(lanes[(j - first) * span + (reversed ? 0 : span - 1)]));
    });
  }
}

// Decays, inputs (where a times the state before will be) and what each run does to the state.
template <bool reversed>
inline void decays_of_tile(const RowBackwardTile& t, int64_t state) {
  RowBackwardScratch& s = t.s;
  const int64_t padded = t.padded;
  const float* const B = t.B[state].data;
  for (int64_t j = 0; j < t.count; ++j) {
    const V exponent = all(t.A(j, state) * log2_e);
    const float *const dt = s.dt + t.place(j), *const u = s.u + t.place(j);
    float *const a_to = s.a + t.place(j), *const w_to = s.ah + t.place(j);
    Effect* runs = s.runs + t.runs_of(j);
    const Ahead ahead = state == 0 ? t.ahead(t.plan.sizes.io, t.plan.f.u, j) : Ahead{};
    const Exp2 exp2_of;
    for (int64_t i = 0; i < padded; i += block) {
      ahead.fetch_lines(i);
      const Block step = Block::at(dt + i), x = Block::at(u + i), b = Block::at(B + i);
      Block a, w;
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        a.v[q] = exp2_of(step.v[q] * exponent);
        w.v[q] = step.v[q] * x.v[q] * b.v[q];
      }
      a.to(a_to + i);
      w.to(w_to + i);
      *runs++ = compose_runs<reversed>(a, w);
    }
  }
  const int64_t chunks = t.plan.sizes.chunks, N = t.plan.sizes.state;
  const auto* boundary = static_cast<const float*>(t.plan.f.boundary_states) + (t.sequence(0) * chunks + t.entry) * N + state;
  enter_tile<reversed>(t, [&](int64_t j) { return boundary[j * chunks * N]; }, [](int64_t, V) {});
}

// The states of `count` channels: visit(i, m, q, a, a times the state before, the state), vector q of a block of runs of channel m.
template <bool reversed, int count, typename Visit, typename After>
inline void along_states(const RowBackwardTile& t, int64_t j, Visit visit, After after) {
  RowBackwardScratch& s = t.s;
  const int64_t padded = t.padded, runs_apart = t.runs_of(1);
  const V* entering = s.entering + t.runs_of(j);
  const float *const a_at = s.a + t.place(j), *const w_at = s.ah + t.place(j);
  for (int64_t i = 0; i < padded; i += block) {
    V h[count];
#pragma GCC unroll 2
    for (int m = 0; m < count; ++m) h[m] = entering[m * runs_apart];
    ++entering;
    along_run<reversed>([&](int q) {
#pragma GCC unroll 2
      for (int m = 0; m < count; ++m) {
        const int64_t at = i + q * W + m * padded;
        const V a = in_register(load(a_at + at)), ah = a * h[m];
        h[m] = ah + load(w_at + at);
        visit(at, i + q * W, m, q, a, ah, h[m]);
      }
    });
    after(i);
  }
}

// d_C, and of the adjoint what each run does to it.
template <bool reversed>
inline void adjoint_of_tile(const RowBackwardTile& t, int64_t state) {
  RowBackwardScratch& s = t.s;
  const float* const C = t.C[state].data;
  float* const d_C_to = t.C[state].gradient;
  in_pairs(t.count, [&](int64_t j, auto pair) {
    constexpr int count = pair.value;
    const int64_t runs_apart = t.runs_of(1);
    const float* const g_at = s.g + t.place(j);
    float* const ah_to = s.ah + t.place(j);
    Effect* runs = s.runs + t.runs_of(j);
    Block a[count], aCg[count];
    V c, d_C;
    along_states<reversed, count>(
        t, j,
        [&](int64_t at, int64_t i, int m, int q, V a_here, V ah, V h) {
          if (m == 0) c = in_register(load(C + i)), d_C = load(d_C_to + i);
          const V g = in_register(load(g_at + at));
          d_C = fma(g, h, d_C);
          if (m == count - 1) store(d_C_to + i, d_C);
          store(ah_to + at, ah);
          a[m].v[q] = a_here;
          aCg[m].v[q] = a_here * (c * g);
        },
        [&](int64_t) {
#pragma GCC unroll 2
          for (int m = 0; m < count; ++m) runs[m * runs_apart] = compose_runs<!reversed>(a[m], aCg[m]);
          ++runs;
        });
  });
  const RowBackwardMemory& memory = t.memory;
  enter_tile<!reversed>(t, [&](int64_t j) { return memory.mu(t.c + j)[state * W]; },
                        [&](int64_t j, V mu) { store(memory.mu(t.c + j) + state * W, mu); });
}

}  // namespace
}  // namespace dass::cpu
