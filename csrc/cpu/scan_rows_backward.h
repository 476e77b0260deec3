// The selective scan along rows, backward: scan_rows_tile.h has what is done to a tile.
//
// A task goes through the tiles of a row against the direction of the scan, and in each through its channels: B, C and their
// gradients stay in the first-level cache for all of them. The states of a tile are recomputed from the one saved at its entry.
//
// d_B and d_C are sums over channels: each task leaves its own in a slab, and the slabs are added in order at the end. How many
// there are depends on shapes alone. Sums over steps are taken piece by piece of a row, and added in order too.
//
// Where there are fewer tasks than threads a task is a piece of a row, and the carry passes from one to the next: see pieces.h.
#pragma once

namespace dass::cpu {
namespace {

// What a task keeps beside a tile's scratch, in vectors: for each channel mu and d_A of each state, d_D, d_bias, and the sums for
// constant B and C; for each state a tile of B, C and their gradients.
struct RowBackwardMemory {
  int64_t of_channel, channels, N;
  float* at;

  static int64_t vectors_of_channel(int64_t N) { return 2 * N + 2 + 8 * N; }
  static int64_t floats(int64_t channels, int64_t N) { return channels * vectors_of_channel(N) * W + 4 * N * row_tile; }

  float* mu(int64_t c) const { return at + c * of_channel; }
  float* d_A(int64_t c) const { return mu(c) + N * W; }
  float* d_D(int64_t c) const { return d_A(c) + N * W; }
  float* d_bias(int64_t c) const { return d_D(c) + W; }
  float* constant(int64_t c, bool is_C) const { return d_bias(c) + W + (is_C ? N * block : 0); }
  float* tile(int64_t which, int64_t state) const { return at + channels * of_channel + (which * N + state) * row_tile; }
};

inline float sum_of_row(const float* row, int64_t n) {
  V sum = load(row);
  for (int64_t i = W; i < n; i += W) sum = sum + load(row + i);
  return sum_of_lanes(sum);
}

// What a task works on: one channel or a few in one direction, for one piece of their rows (counted along the walk, which goes
// against the scan).
struct RowBackwardPiece {
  const RowBackwardPlan& plan;
  int64_t b, k, unit, split, piece;
  bool first_direction, last_direction;

  int64_t bk() const { return b * plan.sizes.directions + k; }
  int64_t first() const { return unit * plan.per_unit + split * plan.per_split; }
  int64_t channels() const { return smaller_of(first() + plan.per_split, (unit + 1) * plan.per_unit) - first(); }
  int64_t next_rows(int64_t c) const { return c + 1 < channels() ? 1 : -c; }
  template <bool reversed>
  int64_t next_steps(int64_t c) const {
    return c + 1 < channels() ? 0 : reversed ? row_tile : -row_tile;
  }
  // visit(begin, n) for its tiles, in the order of the walk.
  template <bool reversed, typename Visit>
  void tiles(Visit visit) const {
    const int64_t L = plan.sizes.length, all_tiles = divide_up(L, row_tile), from = piece * (row_piece / row_tile);
    for (int64_t walked = from; walked < smaller_of(from + row_piece / row_tile, all_tiles); ++walked) {
      const int64_t begin = (reversed ? walked : all_tiles - 1 - walked) * row_tile;
      visit(begin, smaller_of(row_tile, L - begin));
    }
  }
};

// B or C of a state from position `begin` on; not of constants.
inline TurnedRow row_of_projection(const RowBackwardPiece& p, const Projection& of, int64_t state, int64_t begin, int64_t n,
                                   int64_t padded, RowBackwardScratch& s) {
  const ScanSizes& sizes = p.plan.sizes;
  const int64_t group = p.first() / (sizes.channels / of.groups);
  const void* rows = element(sizes.io, of.data, p.b * of.batch + p.k * of.direction + group * of.group);
  return {sizes.io, element(sizes.io, rows, state * of.state), begin, n, padded, s.spare};
}

// The effects of a piece on mu, for each channel and state, with the operations of backward_tile, so that the carries come out
// the same.
template <bool reversed>
int64_t effects_of_piece(const RowBackwardPiece& p, RowBackwardScratch& s, const PieceEffects& effects) {
  const RowBackwardPlan& plan = p.plan;
  const ScanBackward& f = plan.f;
  const ScanSizes& sizes = plan.sizes;
  const int64_t N = sizes.state;
  int64_t found = 0;
  p.tiles<reversed>([&](int64_t begin, int64_t n) {
    const int64_t padded = round_up(n, block);
    for (int64_t c = 0; c < p.channels(); ++c) {
      const RowBackwardTile t{plan,    s,       p.b,     p.k,     p.first() + c, begin, n,    padded, nullptr,
                              nullptr, nullptr, nullptr, nullptr, nullptr,       nullptr, nullptr, false,  false,
                              p.next_rows(c), p.next_steps<reversed>(c)};
      load_steps(t, t.parameter(f.delta_bias));
      load_runs(t, sizes.out, f.d_out, s.g);
      if (f.z.data != nullptr) {
        const TurnedRow z(sizes.io, t.row(sizes.io, f.z), begin, n, padded, s.spare);
        for (int64_t i = 0; i < padded; i += block) {
          const Block gates = z(i);
          for (int j = 0; j < 4; ++j) {
            const V x = gates.v[j];
            store(s.g + i + j * W, load(s.g + i + j * W) * x * sigmoid_from(x, exp_of_negative_magnitude(x)));
          }
        }
      }
      for (int64_t state = 0; state < N; ++state) {
        const int64_t sequence = (p.k * sizes.channels + p.first() + c) * N + state;
        const V exponent = all(static_cast<const float*>(f.A)[sequence] * log2_e);
        if (f.C.constant)
          fill_row(s.y, static_cast<const float*>(f.C.data)[sequence], padded);
        else {
          const TurnedRow C = row_of_projection(p, f.C, state, begin, n, padded, s);
          for (int64_t i = 0; i < padded; i += block) C(i).to(s.y + i);
        }
        for (int64_t i = 0; i < padded; i += block) {
          Block a, aCg;
          for (int j = 0; j < 4; ++j) {
            a.v[j] = exp2(load(s.dt + i + j * W) * exponent);
            aCg.v[j] = a.v[j] * (load(s.y + i + j * W) * load(s.g + i + j * W));
          }
          s.runs[i / block] = compose_runs<!reversed>(a, aCg);
        }
        PieceEffects::find<!reversed>(effects, c * N + state, found, s.runs, s.entering, padded / block);
      }
    }
    found += divide_up(padded, W * W);
  });
  return found;
}

// mus: (channels, N), the gradients of the states that leave the piece in scan order, which become those of the states that enter.
template <bool reversed>
void backward_piece(const RowBackwardPiece& p, RowBackwardScratch& s, const RowBackwardMemory& memory, TurnedProjection* projections,
                    float* mus) {
  const RowBackwardPlan& plan = p.plan;
  const ScanBackward& f = plan.f;
  const ScanSizes& sizes = plan.sizes;
  const int64_t D = sizes.channels, L = sizes.length, N = sizes.state, bk = p.bk(), first = p.first(), channels = p.channels();
  const float* boundary = static_cast<const float*>(f.boundary_states) + (bk * D + first) * sizes.chunks * N;
  for (int64_t c = 0; c < channels; ++c) {
    fill_row(memory.mu(c), 0.0f, memory.of_channel);
    for (int64_t n = 0; n < N; ++n) store(memory.mu(c) + n * W, all(mus[c * N + n]));
  }
  const Projection* const sources[] = {&f.B, &f.C};
  const Buffer* const slabs[] = {&plan.d_B, &plan.d_C};
  p.tiles<reversed>([&](int64_t begin, int64_t n) {
    const int64_t padded = round_up(n, block), entry = reversed ? (begin + n - 1) / sizes.chunk : begin / sizes.chunk;
    for (int which = 0; which < 2; ++which) {
      if (sources[which]->constant) continue;
      for (int64_t state = 0; state < N; ++state) {
        float *to = memory.tile(which, state), *gradient = memory.tile(2 + which, state);
        const TurnedRow row = row_of_projection(p, *sources[which], state, begin, n, padded, s);
        for (int64_t i = 0; i < padded; i += block) {
          row.fetch(i + (reversed ? row_tile : -row_tile));
          row(i).to(to + i);
        }
        fill_row(gradient, 0.0f, padded);
        projections[which * N + state] = {to, gradient, false};
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int which = 0; which < 2; ++which) {
        if (!sources[which]->constant) continue;
        const float* values = static_cast<const float*>(sources[which]->data) + (p.k * D + first + c) * N;
        for (int64_t state = 0; state < N; ++state) {
          float* to = memory.tile(which, state);
          fill_row(to, values[state], block);
          projections[which * N + state] = {to, memory.constant(c, which == 1) + state * block, true};
        }
      }
      float* sum = !sizes.shared                       ? nullptr
                   : sizes.io == Dtype::float32 ? static_cast<float*>(f.d_u) + (p.b * D + first + c) * L
                                                : plan.d_u.floats() + (p.b * D + first + c) * L;
      backward_tile<reversed>({plan, s, p.b, p.k, first + c, begin, n, padded, boundary + (c * sizes.chunks + entry) * N, projections,
                               projections + N, memory.mu(c), memory.d_A(c), memory.d_D(c), memory.d_bias(c), sum, p.first_direction,
                               p.last_direction, p.next_rows(c), p.next_steps<reversed>(c)});
    }
    for (int which = 0; which < 2; ++which)
      if (!sources[which]->constant)
        for (int64_t state = 0; state < N; ++state) {
          float* slab = slabs[which]->floats() + (((bk * plan.units + p.unit) * plan.splits + p.split) * N + state) * plan.row + begin;
          for (int64_t i = 0; i < padded; i += block) Block::at(memory.tile(2 + which, state) + i).turned().to(slab + i);
        }
  });
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t sequence = ((p.b * plan.pieces + p.piece) * sizes.directions + p.k) * D + first + c;
    for (int64_t state = 0; state < N; ++state) {
      plan.d_A.floats()[sequence * N + state] = sum_of_lanes(load(memory.d_A(c) + state * W));
      store_part(mus + c * N + state, load(memory.mu(c) + state * W), 1);
      for (int which = 0; which < 2; ++which)
        if (sources[which]->constant)
          slabs[which]->floats()[sequence * N + state] = sum_of_row(memory.constant(c, which == 1) + state * block, block);
    }
    plan.d_D.floats()[sequence] = sum_of_lanes(load(memory.d_D(c)));
    plan.d_bias.floats()[sequence] = sum_of_lanes(load(memory.d_bias(c)));
  }
}

// A task's scratch memory.
struct RowBackwardSpace {
  RowBackwardScratch* s;
  RowBackwardMemory memory;
  TurnedProjection* projections;
  PieceEffects effects;

  explicit RowBackwardSpace(const RowBackwardPlan& plan)
      : s(static_cast<RowBackwardScratch*>(thread_scratch(sizeof(RowBackwardScratch) + bytes(plan)))),
        memory{RowBackwardMemory::vectors_of_channel(plan.sizes.state) * W, plan.per_split, plan.sizes.state,
               reinterpret_cast<float*>(s + 1)},
        projections(reinterpret_cast<TurnedProjection*>(memory.at + RowBackwardMemory::floats(plan.per_split, plan.sizes.state))),
        effects{reinterpret_cast<float*>(projections + 2 * plan.sizes.state)} {}
  static int64_t bytes(const RowBackwardPlan& plan) {
    const int64_t N = plan.sizes.state, effects = plan.pieces > 1 ? PieceEffects::floats(plan.per_split * N) : 0;
    return 4 * (RowBackwardMemory::floats(plan.per_split, N) + effects) + 2 * N * sizeof(TurnedProjection);
  }
};

bool scan_backward_rows(const ScanBackward& f) {
  const RowBackwardPlan plan(f);
  const ScanSizes& sizes = f.sizes;
  const int64_t N = sizes.state, K = sizes.directions, outputs = sizes.outputs(), split_units = plan.units * plan.splits;
  const int64_t items = sizes.batch * outputs * split_units, summed = sizes.shared ? K : 1;
  const Buffer mus(4 * items * summed * plan.per_split * N);
  const auto piece_at = [&](int64_t item, int64_t direction, int64_t piece) {
    const int64_t bo = item / split_units;
    return RowBackwardPiece{plan, bo / outputs, sizes.shared ? direction : bo % outputs, item / plan.splits % plan.units,
                            item % plan.splits, piece, direction == 0, direction == summed - 1};
  };
  const auto mu_of = [&](int64_t item, int64_t direction) { return mus.floats() + (item * summed + direction) * plan.per_split * N; };
  const auto seed = [&](const RowBackwardPiece& p, float* mu) {
    const auto* seeds = static_cast<const float*>(f.d_last_state);
    for (int64_t i = 0; i < p.channels() * N; ++i)
      mu[i] = seeds == nullptr ? 0.0f : seeds[(p.bk() * sizes.channels + p.first()) * N + i];
  };
  const auto run = [&](const RowBackwardPiece& p, const RowBackwardSpace& at, float* mu) {
    (sizes.reversed(p.k) ? backward_piece<true> : backward_piece<false>)(p, *at.s, at.memory, at.projections, mu);
  };
  const auto finish_rows = [&](const RowBackwardPiece& p, const float* mu) {
    auto* to = static_cast<float*>(f.d_initial_state);
    if (f.initial_state != nullptr)
      for (int64_t i = 0; i < p.channels() * N; ++i) to[(p.bk() * sizes.channels + p.first()) * N + i] = mu[i];
  };
  if (!worth_pieces(items, plan.pieces)) {
    parallel(items, [&](int64_t item) {
      const RowBackwardSpace at(plan);
      for (int64_t direction = 0; direction < summed; ++direction) {
        float* mu = mu_of(item, direction);
        seed(piece_at(item, direction, 0), mu);
        for (int64_t piece = 0; piece < plan.pieces; ++piece) run(piece_at(item, direction, piece), at, mu);
        finish_rows(piece_at(item, direction, 0), mu);
      }
    });
  } else {
    run_pieces(items, summed, plan.pieces, plan.per_split * N, [&](const PieceCarry& carry) {
      const RowBackwardPiece p = piece_at(carry.row, carry.direction, carry.piece);
      const RowBackwardSpace at(plan);
      const bool reversed = sizes.reversed(p.k);
      carry.pass([&](float* mu) { seed(p, mu); },
                 [&] { return (reversed ? effects_of_piece<true> : effects_of_piece<false>)(p, *at.s, at.effects); },
                 [&](int64_t found, float* mu) { at.effects.apply(found, mu, p.channels() * N); },
                 [&](float* mu) { run(p, at, mu); },
                 // A direction that adds to the sums of the one before waits for those of the same positions.
                 carry.direction != 0 && reversed != sizes.reversed(p.k - 1));
      if (carry.piece == plan.pieces - 1) finish_rows(p, carry.leaving());
    });
  }
  const auto finish = [&](const Projection& p, const Buffer& slabs, void* to) {
    finish_projection(sizes, p, plan.units / p.groups * plan.splits, plan.row, plan.pieces, slabs, to);
  };
  const int64_t parts = sizes.batch * plan.pieces, channels = K * sizes.channels;
  finish(f.B, plan.d_B, f.d_B);
  finish(f.C, plan.d_C, f.d_C);
  add_over_batch(plan.d_A, f.d_A, parts, channels * N);
  if (f.D != nullptr) add_over_batch(plan.d_D, f.d_D, parts, channels);
  if (f.delta_bias != nullptr) add_over_batch(plan.d_bias, f.d_delta_bias, parts, channels);
  return true;
}

}  // namespace
}  // namespace dass::cpu
