// The selective scan along rows, forward: a vector holds consecutive steps of one channel. For N = 1, and wherever too few
// channels share B and C to fill a vector with them.
//
// Rows are walked in batches that stay in the first-level cache, a batch in loops over blocks of one purpose each, which measured
// faster than one loop that does everything: step sizes; decays and inputs; the scan over runs; states and output.
#pragma once

namespace dass::cpu {
namespace {

// The lines of a block that will be wanted soon: hardware prefetchers stop at the end of a page, and rows end everywhere. Into
// the second-level cache: the first has no room for them.
template <Dtype type>
inline void fetch_block(const char* at) {
  for (int64_t line = 0; line < block * size_of(type); line += 64) __builtin_prefetch(at + line, 0, 2);
}

// Step sizes of a batch, 0 (which leaves the state as it is) beyond the end of a row; of `later` what it will need.
template <Dtype io>
void step_sizes(const RowBatch& batch, const RowBatch& later, RowForwardScratch& s, bool with_softplus) {
  constexpr int64_t size = size_of(io);
  const auto each = [&](auto step_size) {
    for (int64_t i = 0; i < batch.count; ++i) {
      const RowStretch& t = batch.stretches[i];
      const char *from = t.delta, *ahead = i < later.count ? later.stretches[i].delta : from;
      float* dt = s.dt + t.slot * block;
      const int64_t whole = t.whole();
      const V bias = all(t.bias);
      for (int64_t j = 0; j < t.n; j += block) {
        fetch_block<io>(ahead + j * size);
        const Block delta = j < whole ? load_block<io>(from + j * size) : load_part_of_block<io>(from + j * size, t.n - j);
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) store(dt + j + l * W, step_size(delta.v[l] + bias));
      }
      if (whole == t.n) continue;
      if (in_runs<io>)
        zero_beyond(dt + whole, t.n - whole);
      else
        load_part_of_block<io>(reinterpret_cast<const char*>(dt + whole), t.n - whole).to(dt + whole);
    }
  };
  if (!with_softplus) return each([&](V x) { return x; });
#if defined(DASS_VECTOR_TABLE)
  SoftplusNear near;
  each([&](V x) { return near(x); });
  if (near.was_far()) each([&](V x) { return softplus(x); });
#else
  each([&](V x) { return softplus(x); });
#endif
}

// Decays and inputs as runs, what each run does to the state, and what skips the state.
template <Dtype io, bool reversed>
void decays_and_inputs(const RowBatch& batch, const RowBatch& next, RowForwardScratch& s, bool starts) {
  constexpr int64_t size = size_of(io);
  for (int64_t i = 0; i < batch.count; ++i) {
    const RowStretch& t = batch.stretches[i];
    const char *u = t.u, *ahead = i < next.count ? next.stretches[i].u : u;
    const float *dt = s.dt + t.slot * block, *B = t.B;
    float *a_to = s.a + t.slot * block, *w_to = s.w + t.slot * block, *y_to = s.y + t.slot * block;
    Effect* runs = s.runs + t.slot;
    const V exponent = all(t.exponent), skip = all(t.skip);
    const int64_t whole = t.whole();
    for (int64_t j = 0; j < t.n; j += block) {
      fetch_block<io>(ahead + j * size);
      if (j == whole) B = t.B_rest;
      const Block x = j < whole ? load_block<io>(u + j * size) : load_part_of_block<io>(u + j * size, t.n - j);
      Block a, w;
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        const V step = load(dt + j + l * W);
        a.v[l] = exp2(step * exponent);
        w.v[l] = step * x.v[l] * load(B + j + l * W);
        if (starts) store(y_to + j + l * W, skip * x.v[l]);
      }
      if (!in_runs<io>) a = a.turned(), w = w.turned();
      a.to(a_to + j);
      w.to(w_to + j);
      *runs++ = compose_runs<reversed>(a, w);
    }
  }
}

// From the state that enters a stretch to those that enter its runs.
template <bool reversed>
void enter_stretch(const RowStretch& t, RowForwardScratch& s, float* state) {
  V carry = all(*state);
  enter_blocks<reversed>(s.runs + t.slot, s.entering + t.slot, t.blocks, carry);
  store_part(state, carry, 1);
}

// The same for short rows, `span` vectors each, that share squares.
template <bool reversed, int span>
void enter_short_rows(const RowBatch& batch, RowForwardScratch& s, int64_t n, bool from_zero) {
  constexpr int shared = W / span;
  for (int64_t begin = 0; begin < batch.count; begin += shared) {
    const RowStretch* rows = batch.stretches + begin;
    const int64_t present = smaller_of(shared, batch.count - begin), first = rows->slot;
    float lanes[W] = {};
    V carry = all(0.0f);
    if (!from_zero) {
      for (int64_t j = 0; j < present; ++j)
        for (int64_t lane = 0; lane < span; ++lane) lanes[j * span + lane] = rows[j].state[n];
      carry = load(lanes);
    }
    for (int64_t i = present * span / 4; i < square_blocks; ++i) s.runs[first + i] = {all(1.0f), all(0.0f)};
    enter_square<reversed, span>(s.runs + first, s.entering + first, carry);
    store(lanes, carry);
    for (int64_t j = 0; j < present; ++j) rows[j].state[n] = lanes[j * span + (reversed ? 0 : span - 1)];
  }
}

// One of N states through a batch.
template <bool reversed>
void enter_batch(const ScanForward& f, const RowBatch& batch, RowForwardScratch& s, int64_t n) {
  const int64_t N = f.sizes.state, chunk = f.sizes.chunk;
  if (!batch.shares) {
    for (int64_t i = 0; i < batch.count; ++i)
      enter_stretch<reversed>(batch.stretches[i], s, batch.stretches[i].state + n);
  } else if constexpr (W == 16) {
    batch.stretches[0].blocks == 1 ? enter_short_rows<reversed, 4>(batch, s, n, f.initial_state == nullptr) : enter_short_rows<reversed, 8>(batch, s, n, f.initial_state == nullptr);
  }
  if (chunk == 0) return;
  for (int64_t i = 0; i < batch.count; ++i) {
    const RowStretch& t = batch.stretches[i];
    const int64_t sequence = (t.b * f.sizes.directions + t.k) * f.sizes.channels + t.d;
    float* boundary = static_cast<float*>(f.boundary_states) + (sequence * f.sizes.chunks + t.begin / chunk) * N + n;
    for (int64_t begin = 0; begin < t.n; begin += chunk, boundary += N) {  // the state before a chunk's first run, or its last
      const int64_t entered = reversed ? smaller_of(begin + chunk, t.blocks * block) / block - 1 : begin / block;
      *boundary = reinterpret_cast<const float*>(s.entering + t.slot + entered)[reversed ? W - 1 : 0];
    }
  }
}

// Where outputs go: to the scratch memory, to be worked on; to their rows; or past the caches, from the registers where alignment
// and dtype allow it, else by way of the scratch memory.
enum class Way { kept, stored, streamed, stream_later };
constexpr int64_t later_from = 1024;  // bytes of a row: the ends of shorter ones cost more than is gained

// From those to all states, and what they add to y.
template <Dtype io, Dtype out, bool reversed>
void outputs(const RowBatch& batch, const RowBatch& next, RowForwardScratch& s, Way way) {
  constexpr int64_t size = size_of(out);
  for (int64_t i = 0; i < batch.count; ++i) {
    const RowStretch& t = batch.stretches[i];
    const float *a = s.a + t.slot * block, *w = s.w + t.slot * block;
    float* y = s.y + t.slot * block;
    const float* C = t.C;
    const V* entering = s.entering + t.slot;
    const int64_t whole = t.whole();
    char *later = s.out + t.slot * block * size, *to = way == Way::stream_later ? later : t.out;
    const char* ahead = i < next.count ? next.stretches[i].out : to;
    for (int64_t j = 0; j < t.n; j += block) {
      if (way == Way::stored) fetch_block<out>(ahead + j * size);
      if (way == Way::streamed && j == 0) __builtin_prefetch(ahead, 0, 2);  // for its page's address: stores would wait for that
      if (j == whole) C = t.C_rest, to = later;
      V h = *entering++;
      Block states;
      along_run<reversed>([&](int l) { states.v[l] = h = fma(load(a + j + l * W), h, load(w + j + l * W)); });
      if (!in_runs<io>) states = states.turned();
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) states.v[l] = fma(load(C + j + l * W), states.v[l], load(y + j + l * W));
      const bool streamed = way == Way::streamed && j < whole;
      if (way == Way::kept)
        states.to(y + j);
      else if (in_runs<io>)
        store_runs<out>(states, to + j * size, streamed);
      else
        streamed ? states.stream_to(reinterpret_cast<float*>(to) + j) : states.to(reinterpret_cast<float*>(to) + j);
    }
  }
}

// What is left to be done to y where it does not go straight to `out`.
template <Dtype io>
inline void finish_stretch(const ScanForward& f, const RowStretch& t, RowForwardScratch& s, float* sum) {
  float* y = s.y + t.slot * block;
  if (in_runs<io>)
    for (int64_t j = 0; j < t.n; j += block) Block::at(y + j).turned().to(y + j);
  if (f.sizes.shared) {
    sum += t.begin;
    if (!t.first)
      for (int64_t i = 0; i < t.n; i += W)
        store(y + i, load(y + i) + load_part(sum + i, static_cast<int>(smaller_of(W, t.n - i))));
    if (!t.last) return store_row(Dtype::float32, sum, y, t.n);
  }
  if (f.z.data != nullptr) {
    const int64_t padded = t.blocks * block;
    const void* z = element(f.sizes.io, f.z.data, t.b * f.z.batch + t.k * f.z.direction + t.d * f.z.channel + t.begin);
    gate_row(y, row_of(f.sizes.io, z, s.z, t.n, padded), padded);
  }
  store_row(f.sizes.out, t.out, y, t.n);
}

// The step sizes of the batch are there; those of the next are taken on the way.
template <Dtype io, bool reversed>
void forward_batch(const RowWalk& walk, RowBatch& batch, const RowBatch& next, const RowBatch& later, RowForwardScratch& s,
                   bool streamed) {
  const ScanForward& f = walk.f;
  const ScanSizes& sizes = f.sizes;
  const int64_t L = sizes.length, N = sizes.state, size = size_of(sizes.out);
  const bool aligned = (reinterpret_cast<uintptr_t>(f.out) | L * size) % 64 == 0, straight = f.z.data == nullptr && !sizes.shared;
  const Way way = !straight                               ? Way::kept
                  : streamed && aligned                   ? Way::streamed
                  : streamed && L * size >= later_from    ? Way::stream_later
                                                          : Way::stored;
  const RowStretch *const begin = batch.stretches, *const end = begin + batch.count;
  for (const RowStretch* t = begin; t < end; ++t) {
    const auto* initial = static_cast<const float*>(f.initial_state);
    const int64_t sequence = (t->b * sizes.directions + t->k) * sizes.channels + t->d;
    if (reversed ? t->begin + t->n == L : t->begin == 0)
      for (int64_t i = 0; i < N; ++i) t->state[i] = initial == nullptr ? 0.0f : initial[sequence * N + i];
  }
  for (int64_t i = 0; i < N; ++i) {
    find_state<io>(f, batch, i, s);
    decays_and_inputs<io, reversed>(batch, next, s, i == 0);
    s.stream_pending();
    enter_batch<reversed>(f, batch, s, i);
    const bool ends = i == N - 1;
    if (ends) step_sizes<io>(next, later, s, sizes.delta_softplus);  // worked on while the steps of enter_batch wait for each other
    if (ends && way != Way::kept)
      with_dtype(sizes.out, [&](auto out) { outputs<io, out(), reversed>(batch, next, s, way); });
    else
      outputs<io, Dtype::float32, reversed>(batch, next, s, Way::kept);
  }
  for (const RowStretch* t = begin; t < end; ++t) {
    const int64_t done = way == Way::stream_later ? 0 : t->whole();
    const char* rest = s.out + (t->slot * block + done) * size;
    if (way == Way::kept)
      finish_stretch<io>(f, *t, s, walk.sum);
    else if (way == Way::stream_later)
      s.pending[s.pending_count++] = {t->out, rest, t->n * size};
    else if (done < t->n)
      __builtin_memcpy(t->out + done * size, rest, (t->n - done) * size);
  }
}

void forward_walk(RowWalk& walk, RowForwardScratch& s, bool streamed) {
  RowBatch batches[3];
  s.forget();
  with_dtype(walk.f.sizes.io, [&](auto io) {
    walk.fill(batches[0]);
    walk.fill(batches[1]);
    step_sizes<io()>(batches[0], batches[1], s, walk.f.sizes.delta_softplus);
    for (int64_t i = 0; batches[i].count != 0; i = (i + 1) % 3) {
      RowBatch &batch = batches[i], &next = batches[(i + 1) % 3], &later = batches[(i + 2) % 3];
      walk.fill(later);
      (batch.reversed ? forward_batch<io(), true> : forward_batch<io(), false>)(walk, batch, next, later, s, streamed);
    }
  });
  s.stream_pending();
}

// The effects of a piece on its states, with the operations of forward_batch, so that the carries come out the same.
template <Dtype io, bool reversed>
int64_t effects_of_piece(RowWalk walk, RowForwardScratch& s, const PieceEffects& effects) {
  const ScanForward& f = walk.f;
  int64_t found = 0;
  RowBatch batch;
  const RowBatch none{};
  s.forget();
  for (walk.fill(batch); batch.count != 0; walk.fill(batch)) {
    const RowStretch& t = batch.stretches[0];  // alone: rows in pieces are long
    step_sizes<io>(batch, none, s, f.sizes.delta_softplus);
    for (int64_t i = 0; i < f.sizes.state; ++i) {
      find_state<io>(f, batch, i, s);
      decays_and_inputs<io, reversed>(batch, none, s, false);
      PieceEffects::find<reversed>(effects, i, found, s.runs + t.slot, s.entering + t.slot, t.blocks);
    }
    found += divide_up(t.blocks * block, W * W);
  }
  return found;
}

bool scan_forward_rows(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length, N = sizes.state, outputs = sizes.outputs();
  const int64_t per_task = larger_of(1, smaller_of(D, 32768 / (L * N))), tasks = divide_up(D, per_task);
  const int64_t pieces = divide_up(L, row_piece), padded = sizes.shared ? round_up(L, 16) : 0;
  const bool streamed = sizes.batch * outputs * D * L * size_of(sizes.out) >= streaming_bytes;
  if (!worth_pieces(sizes.batch * outputs * tasks, pieces)) {
    parallel(sizes.batch * outputs * tasks, [&](int64_t task) {
      const int64_t b = task / (outputs * tasks), o = task / tasks % outputs, begin = task % tasks * per_task;
      const int64_t first = sizes.shared ? 0 : o, last = sizes.shared ? sizes.directions - 1 : o;
      auto* scratch = static_cast<RowForwardScratch*>(thread_scratch(sizeof(RowForwardScratch) + 4 * padded));
      RowWalk walk(f, b, begin, smaller_of(begin + per_task, D), first, last, reinterpret_cast<float*>(scratch + 1));
      forward_walk(walk, *scratch, streamed);
    });
    return true;
  }
  const int64_t rows = sizes.batch * outputs * D;
  const Buffer sums(4 * rows * padded);
  run_pieces(rows, sizes.shared ? sizes.directions : 1, pieces, N, [&](const PieceCarry& at) {
    const int64_t d = at.row % D, k = sizes.shared ? at.direction : at.row / D % outputs, b = at.row / (D * outputs);
    auto* s = static_cast<RowForwardScratch*>(thread_scratch(sizeof(RowForwardScratch) + 4 * PieceEffects::floats(N)));
    const PieceEffects effects{reinterpret_cast<float*>(s + 1)};
    const int64_t sequence = ((b * sizes.directions + k) * D + d) * N;
    const auto walk = [&](float* state) { return RowWalk(f, b, d, k, at.piece, sums.floats() + at.row * padded, state); };
    at.pass([&](float* state) {
              const auto* initial = static_cast<const float*>(f.initial_state);
              for (int64_t i = 0; i < N; ++i) state[i] = initial == nullptr ? 0.0f : initial[sequence + i];
            },
            [&] {
              int64_t found = 0;
              with_dtype(sizes.io, [&](auto io) {
                const auto find = sizes.reversed(k) ? effects_of_piece<io(), true> : effects_of_piece<io(), false>;
                found = find(walk(nullptr), *s, effects);
              });
              return found;
            },
            [&](int64_t found, float* state) { effects.apply(found, state, N); },
            [&](float* state) {
              RowWalk along = walk(state);
              forward_walk(along, *s, streamed);
            },
            at.direction != 0 && sizes.reversed(k) != sizes.reversed(k - 1));
    if (at.piece == pieces - 1) __builtin_memcpy(static_cast<float*>(f.last_state) + sequence, at.leaving(), 4 * N);
  });
  return true;
}

}  // namespace
}  // namespace dass::cpu
