// The selective scan along rows, backward: scan_rows_tile.h and scan_rows_gradients.h have what is done to a tile.
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

// What a task works on: one channel or a few in one direction, for one piece of their rows (counted along the walk, which goes
// against the scan).
struct RowBackwardPiece {
  const RowBackwardPlan& plan;
  int64_t b, k, unit, split, piece;
  bool first_direction, last_direction;

  int64_t bk() const { return b * plan.sizes.directions + k; }
  int64_t first() const { return unit * plan.per_unit + split * plan.per_split; }
  int64_t channels() const { return smaller_of(first() + plan.per_split, (unit + 1) * plan.per_unit) - first(); }
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
inline TurnedRow row_of_projection(const RowBackwardPiece& p, const Projection& of, int64_t state, int64_t begin, int64_t n) {
  const ScanSizes& sizes = p.plan.sizes;
  const int64_t group = p.first() / (sizes.channels / of.groups);
  return {sizes.io, element(sizes.io, of.data, p.b * of.batch + p.k * of.direction + group * of.group + state * of.state), begin, n};
}

// The effects of a piece on mu, for each channel and state, with the operations of backward_tile, so that the carries come out
// the same.
template <bool reversed>
int64_t effects_of_piece(const RowBackwardPiece& p, RowBackwardScratch& s, const RowBackwardMemory& memory,
                         const PieceEffects& effects) {
  const RowBackwardPlan& plan = p.plan;
  const ScanBackward& f = plan.f;
  const int64_t N = f.sizes.state;
  int64_t found = 0;
  p.tiles<reversed>([&](int64_t begin, int64_t n) {
    const int64_t padded = round_up(n, block);
    s.begin_tile(n, padded);
    for (int64_t c = 0; c < p.channels(); ++c) {
      const RowBackwardTile t{plan, s, memory, p.b, p.k, p.first(), p.channels(), c, 1, begin, n, padded, 0, nullptr, nullptr,
                              false, false, reversed ? row_tile : -row_tile};
      load_steps(t);
      load_tile(t, f.sizes.out, f.d_out, s.g);
      if (f.z.data != nullptr) {
        load_tile(t, f.sizes.io, f.z, s.y);
        for (int64_t i = 0; i < padded; i += W) {
          const V x = load(s.y + i);
          store(s.g + i, load(s.g + i) * x * sigmoid_from(x, exp_of_negative_magnitude(x)));
        }
      }
      for (int64_t state = 0; state < N; ++state) {
        const V exponent = all(t.A(0, state) * log2_e);
        if (f.C.constant) {
          fill_row(s.y, t.of_channel(f.C.data, 0, state, N), padded);
        } else {
          const TurnedRow C = row_of_projection(p, f.C, state, begin, n);
          for (int64_t i = 0; i < padded; i += block) C(i).to(s.y + i);
        }
        const Exp2 exp2_of;
        for (int64_t i = 0; i < padded; i += block) {
          Block a, aCg;
          for (int j = 0; j < 4; ++j) {
            a.v[j] = exp2_of(load(s.dt + i + j * W) * exponent);
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
  const int64_t D = sizes.channels, N = sizes.state, bk = p.bk(), first = p.first(), channels = p.channels();
  for (int64_t c = 0; c < channels; ++c) {
    fill_row(memory.mu(c), 0.0f, memory.of_channel());
    for (int64_t n = 0; n < N; ++n) store(memory.mu(c) + n * W, all(mus[c * N + n]));
  }
  const Projection* const sources[] = {&f.B, &f.C};
  const Buffer* const slabs[] = {&plan.d_B, &plan.d_C};
  p.tiles<reversed>([&](int64_t begin, int64_t n) {
    const int64_t padded = round_up(n, block), next_steps = reversed ? row_tile : -row_tile;
    s.begin_tile(n, padded);
    const auto each_tile = [&](auto visit) {  // of B and C
      for (int which = 0; which < 2; ++which)
        for (int64_t state = 0; state < N; ++state) visit(which, state, memory.tile(which, state), memory.tile(2 + which, state));
    };
    each_tile([&](int which, int64_t state, float* to, float* gradient) {
      projections[which * N + state] = {to, gradient};
      if (sources[which]->constant) return;
      const TurnedRow row = row_of_projection(p, *sources[which], state, begin, n);
      for (int64_t i = 0; i < padded; i += block) {
        row.fetch(i + next_steps);
        row(i).to(to + i);
      }
      fill_row(gradient, 0.0f, padded);
    });
    for (int64_t c = 0; c < channels; c += plan.at_a_time) {
      const int64_t count = smaller_of(plan.at_a_time, channels - c);
      const int64_t entry = reversed ? (begin + n - 1) / sizes.chunk : begin / sizes.chunk;
      const RowBackwardTile t{plan, s, memory, p.b, p.k, first, channels, c, count, begin, n, padded, entry, projections,
                              projections + N, p.first_direction, p.last_direction, next_steps};
      each_tile([&](int which, int64_t state, float* to, float* gradient) {
        if (!sources[which]->constant) return;
        fill_row(to, t.of_channel(sources[which]->data, 0, state, N), padded);
        fill_row(gradient, 0.0f, padded);
      });
      backward_tile<reversed>(t);
      each_tile([&](int which, int64_t state, float*, float* gradient) {
        if (!sources[which]->constant) return;
        float* const sum = memory.constant(c, which) + state * W;
        for (int64_t i = 0; i < padded; i += W) store(sum, load(sum) + load(gradient + i));
      });
    }
    each_tile([&](int which, int64_t state, float*, float* gradient) {
      if (sources[which]->constant) return;
      float* slab = slabs[which]->floats() + (((bk * plan.units + p.unit) * plan.splits + p.split) * N + state) * plan.row + begin;
      for (int64_t i = 0; i < padded; i += block) Block::at(gradient + i).turned().to(slab + i);
    });
  });
  s.stream_pending();
  const int64_t sequence = ((p.b * plan.pieces + p.piece) * sizes.directions + p.k) * D + first, apart = memory.of_channel();
  for (int64_t state = 0; state < N; ++state) {
    sums_of_lanes(memory.d_A(0) + state * W, apart, channels, plan.d_A + sequence * N + state, N);
    for (int which = 0; which < 2; ++which)
      if (sources[which]->constant)
        sums_of_lanes(memory.constant(0, which) + state * W, apart, channels, slabs[which]->floats() + sequence * N + state, N);
    for (int64_t c = 0; c < channels; ++c) mus[c * N + state] = memory.mu(c)[state * W];
  }
  sums_of_lanes(memory.d_D(0), apart, channels, plan.d_D + sequence, 1);
  sums_of_lanes(memory.d_bias(0), apart, channels, plan.d_bias + sequence, 1);
}

// A task's scratch memory.
struct RowBackwardSpace {
  RowBackwardScratch* s;
  RowBackwardMemory memory;
  TurnedProjection* projections;
  PieceEffects effects;

  explicit RowBackwardSpace(const RowBackwardPlan& plan)
      : s(static_cast<RowBackwardScratch*>(thread_scratch(sizeof(RowBackwardScratch) + bytes(plan)))),
        memory{plan.per_split, plan.sizes.state, reinterpret_cast<float*>(s + 1)},
        projections(reinterpret_cast<TurnedProjection*>(memory.at + RowBackwardMemory::floats(plan.per_split, plan.sizes.state))),
        effects{reinterpret_cast<float*>(projections + 2 * plan.sizes.state)} {
    s->pending_count = 0;
  }
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
  // d_B and d_C of a direction, by its last task; of long rows by all threads in the end.
  const bool by_last_task = plan.pieces == 1;
  const auto slabs_of_group = [&](const Projection& p) { return plan.units / p.groups * plan.splits; };
  const Buffer counters(by_last_task ? 4 * sizes.batch * K : 0);
  auto* const done = reinterpret_cast<int32_t*>(counters.floats());
  for (int64_t i = 0; by_last_task && i < sizes.batch * K; ++i) done[i] = 0;
  const auto task_done = [&](int64_t bk) {
    if (count_up(done + bk) != split_units) return;
    const auto finish = [&](const Projection& p, const Buffer& slabs, void* to) {
      const int64_t rows = p.groups * N;
      for (int64_t i = bk * rows; !p.constant && i < (bk + 1) * rows; ++i)
        finish_steps(sizes, p, slabs_of_group(p), plan.row, slabs, to, i, 0, sizes.length);
    };
    finish(f.B, plan.d_B, f.d_B);
    finish(f.C, plan.d_C, f.d_C);
  };
  if (!worth_pieces(items, plan.pieces)) {
    parallel(items, [&](int64_t item) {
      const RowBackwardSpace at(plan);
      for (int64_t direction = 0; direction < summed; ++direction) {
        float* mu = mu_of(item, direction);
        seed(piece_at(item, direction, 0), mu);
        for (int64_t piece = 0; piece < plan.pieces; ++piece) run(piece_at(item, direction, piece), at, mu);
        finish_rows(piece_at(item, direction, 0), mu);
        if (by_last_task) task_done(piece_at(item, direction, 0).bk());
      }
    });
  } else {
    run_pieces(items, summed, plan.pieces, plan.per_split * N, [&](const PieceCarry& carry) {
      const RowBackwardPiece p = piece_at(carry.row, carry.direction, carry.piece);
      const RowBackwardSpace at(plan);
      const bool reversed = sizes.reversed(p.k);
      carry.pass([&](float* mu) { seed(p, mu); },
                 [&] { return (reversed ? effects_of_piece<true> : effects_of_piece<false>)(p, *at.s, at.memory, at.effects); },
                 [&](int64_t found, float* mu) { at.effects.apply(found, mu, p.channels() * N); },
                 [&](float* mu) { run(p, at, mu); },
                 // A direction that adds to the sums of the one before waits for those of the same positions.
                 carry.direction != 0 && reversed != sizes.reversed(p.k - 1));
      if (carry.piece == plan.pieces - 1) finish_rows(p, carry.leaving());
    });
  }
  const auto finish = [&](const Projection& p, const Buffer& slabs, void* to) {
    if (p.constant || !by_last_task) finish_projection(sizes, p, slabs_of_group(p), plan.row, plan.pieces, slabs, to);
  };
  const int64_t channels = K * sizes.channels;
  finish(f.B, plan.d_B, f.d_B);
  finish(f.C, plan.d_C, f.d_C);
  if (plan.parts() == 1) return true;
  add_over_batch(plan.parts_of_d_A, f.d_A, plan.parts(), channels * N);
  if (f.D != nullptr) add_over_batch(plan.parts_of_d_D, f.d_D, plan.parts(), channels);
  if (f.delta_bias != nullptr) add_over_batch(plan.parts_of_d_bias, f.d_delta_bias, plan.parts(), channels);
  return true;
}

}  // namespace
}  // namespace dass::cpu
