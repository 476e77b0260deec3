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
void step_sizes(const RowWalk& walk, const RowBatch& batch, const RowBatch& later, RowForwardScratch& s) {
  constexpr int64_t size = size_of(io);
  const auto each = [&](auto step_size) {
    const int64_t count = batch.count, n = batch.n, whole = batch.whole(), slot = walk.slots * block, stride = walk.delta_stride;
    const float* const bias = batch.bias;
    for (int64_t i = 0; i < count; ++i) {
      const char *from = batch.delta + i * stride, *ahead = i < later.count ? later.delta + i * stride : from;
      float* dt = s.dt + i * slot;
      const V shift_by = all(bias == nullptr ? 0.0f : bias[i]);
      for (int64_t j = 0; j < n; j += block) {
        fetch_block<io>(ahead + j * size);
        const Block delta = j < whole ? load_block<io>(from + j * size) : load_part_of_block<io>(from + j * size, n - j);
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) store(dt + j + l * W, step_size(delta.v[l] + shift_by));
      }
      if (whole == n) continue;
      if (in_runs<io>)
        zero_beyond(dt + whole, n - whole);
      else
        load_part_of_block<io>(reinterpret_cast<const char*>(dt + whole), n - whole).to(dt + whole);
    }
  };
  if (!walk.f.sizes.delta_softplus) return each([&](V x) { return x; });
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
void decays_and_inputs(const RowWalk& walk, const RowBatch& batch, const RowBatch& next, RowForwardScratch& s, int64_t state) {
  constexpr int64_t size = size_of(io);
  const int64_t count = batch.count, n = batch.n, whole = batch.whole(), slots = walk.slots, stride = walk.u_stride;
  const int64_t states = walk.f.sizes.state;
  const float *const A = batch.A + state, *const D = batch.skip;
  const bool starts = state == 0;
  auto lines = s.lines.whole;
  for (int64_t i = 0; i < count; ++i) {
    const char *u = batch.u + i * stride, *ahead = i < next.count ? next.u + i * stride : u;
    const int64_t slot = i * slots * block;
    const float *dt = s.dt + slot, *B = batch.B.row + i * batch.B.stride;
    float *a_to = s.a + slot, *w_to = s.w + slot, *y_to = s.y + slot;
    Effect* runs = s.runs + i * slots;
    const V exponent = all(A[i * states] * log2_e), skip = all(D == nullptr ? 0.0f : D[i]);
    for (int64_t j = 0; j < n; j += block) {
      fetch_block<io>(ahead + j * size);
      if (lines.bytes != 0) lines.put(4 * LineWriter::line);
      if (j == whole) B = batch.B.rest + i * batch.B.stride;
      const Block x = j < whole ? load_block<io>(u + j * size) : load_part_of_block<io>(u + j * size, n - j);
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
  s.lines.whole = lines;
}

// The states that enter the runs of short rows, `span` vectors each, that share squares.
template <bool reversed, int span>
void enter_short_rows(const RowBatch& batch, RowForwardScratch& s, int64_t N, int64_t n, bool from_zero) {
  constexpr int64_t shared = W / span, slots = span / 4;
  for (int64_t begin = 0; begin < batch.count; begin += shared) {
    float* const states = batch.state + begin * N + n;
    const int64_t present = smaller_of(shared, batch.count - begin), first = begin * slots;
    float lanes[W] = {};
    V carry = all(0.0f);
    if (!from_zero) {
      for (int64_t j = 0; j < present; ++j)
        for (int64_t lane = 0; lane < span; ++lane) lanes[j * span + lane] = states[j * N];
      carry = load(lanes);
    }
    for (int64_t i = present * slots; i < square_blocks; ++i) s.runs[first + i] = {all(1.0f), all(0.0f)};
    enter_square<reversed, span>(s.runs + first, s.entering + first, carry);
    store(lanes, carry);
    for (int64_t j = 0; j < present; ++j) states[j * N] = lanes[j * span + (reversed ? 0 : span - 1)];
  }
}

// One of N states through a batch.
template <bool reversed>
void enter_batch(const RowWalk& walk, const RowBatch& batch, RowForwardScratch& s, int64_t n) {
  const ScanForward& f = walk.f;
  const int64_t N = f.sizes.state, chunk = f.sizes.chunk, blocks = batch.blocks(), slots = walk.slots;
  if (!walk.shares) {
    for (int64_t i = 0; i < batch.count; ++i) {
      float* const state = batch.state + i * N + n;
      V carry = all(*state);
      enter_blocks<reversed>(s.runs + i * slots, s.entering + i * slots, blocks, carry);
      store_part(state, carry, 1);
    }
  } else if constexpr (W == 16) {
    const bool from_zero = f.initial_state == nullptr;
    blocks == 1 ? enter_short_rows<reversed, 4>(batch, s, N, n, from_zero) : enter_short_rows<reversed, 8>(batch, s, N, n, from_zero);
  }
  if (chunk == 0) return;
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t sequence = (batch.b * f.sizes.directions + batch.k) * f.sizes.channels + batch.d + i;
    float* boundary = static_cast<float*>(f.boundary_states) + (sequence * f.sizes.chunks + batch.begin / chunk) * N + n;
    for (int64_t begin = 0; begin < batch.n; begin += chunk, boundary += N) {  // the state before a chunk's first run, or its last
      const int64_t entered = reversed ? smaller_of(begin + chunk, blocks * block) / block - 1 : begin / block;
      *boundary = reinterpret_cast<const float*>(s.entering + i * slots + entered)[reversed ? W - 1 : 0];
    }
  }
}

// Where outputs go: to the scratch memory, to be worked on; to their rows; or past the caches, from the registers where alignment
// and dtype allow it, else by way of the scratch memory.
enum class Way { kept, stored, streamed, stream_later };

// From those to all states, and what they add to y.
template <Dtype io, Dtype out, bool reversed, bool converts = false>
void outputs(const RowWalk& walk, const RowBatch& batch, const RowBatch& next, RowForwardScratch& s, Way way) {
  constexpr int64_t size = size_of(out);
  const int64_t count = batch.count, n = batch.n, whole = batch.whole(), slots = walk.slots, stride = walk.out_stride;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = i * slots * block;
    const float *a = s.a + slot, *w = s.w + slot;
    float* y = s.y + slot;
    const V* entering = s.entering + i * slots;
    const float* C = batch.C.row + i * batch.C.stride;
    char *row = batch.out + i * stride, *later = s.place_of(batch.out) + i * stride;
    char *to = way == Way::stream_later ? later : row, *rest_to = way == Way::stream_later ? later : s.out + slot * size;
    const char* ahead = i < next.count ? next.out + i * stride : row;
    if (way == Way::streamed) __builtin_prefetch(ahead, 0, 2);  // for its page's address: stores would wait for that
    for (int64_t j = 0; j < n; j += block) {
      if (way == Way::stored) fetch_block<out>(ahead + j * size);
      if (j == whole) C = batch.C.rest + i * batch.C.stride, to = rest_to;
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
        store_runs<out, converts>(states, to + j * size, streamed);
      else
        streamed ? states.stream_to(reinterpret_cast<float*>(to) + j) : states.to(reinterpret_cast<float*>(to) + j);
    }
  }
}

// What is left to be done to y of the i-th row where it does not go straight to `out`.
template <Dtype io>
inline void finish_stretch(const RowWalk& walk, const RowBatch& batch, int64_t i, RowForwardScratch& s) {
  const ScanForward& f = walk.f;
  const int64_t slot = i * walk.slots * block, padded = batch.blocks() * block, n = batch.n;
  float *y = s.y + slot, *sum = walk.sum + batch.begin;
  if (in_runs<io>)
    for (int64_t j = 0; j < n; j += block) Block::at(y + j).turned().to(y + j);
  if (f.sizes.shared) {
    if (!batch.first)
      for (int64_t j = 0; j < n; j += W) store(y + j, load(y + j) + load_part(sum + j, static_cast<int>(smaller_of(W, n - j))));
    if (!batch.last) return store_row(Dtype::float32, sum, y, n);
  }
  if (f.z.data != nullptr) {
    const void* z = element(f.sizes.io, f.z.data,
                            batch.b * f.z.batch + batch.k * f.z.direction + (batch.d + i) * f.z.channel + batch.begin);
    gate_row(y, row_of(f.sizes.io, z, s.z, n, padded), padded);
  }
  store_row(f.sizes.out, batch.out + i * walk.out_stride, y, n);
}

// The step sizes of the batch are there; those of the next are taken on the way.
template <Dtype io, bool reversed>
void forward_batch(const RowWalk& walk, RowBatch& batch, const RowBatch& next, const RowBatch& later, RowForwardScratch& s,
                   Way way) {
  const ScanForward& f = walk.f;
  const ScanSizes& sizes = f.sizes;
  const int64_t N = sizes.state, n = batch.n;
  if (reversed ? batch.begin + n == sizes.length : batch.begin == 0) {
    const int64_t sequence = (batch.b * sizes.directions + batch.k) * sizes.channels + batch.d;
    const auto* initial = static_cast<const float*>(f.initial_state);
    for (int64_t i = 0; i < batch.count * N; ++i) batch.state[i] = initial == nullptr ? 0.0f : initial[sequence * N + i];
  }
  for (int64_t i = 0; i < N; ++i) {
    find_state<io>(walk, batch, i, s);
    if (s.pending.bytes != 0) s.stream_pending();
    decays_and_inputs<io, reversed>(walk, batch, next, s, i);
    enter_batch<reversed>(walk, batch, s, i);
    const bool ends = i == N - 1;
    s.lines.whole.put(s.lines.whole.bytes);
    if (ends) step_sizes<io>(walk, next, later, s);  // worked on while the steps of enter_batch wait for each other
    if (ends && way != Way::kept)
      with_dtype(sizes.out, [&](auto out) {
#if defined(DASS_VECTOR_BFLOAT16)
        if constexpr (in_runs<io> && out() == Dtype::bfloat16)
          if (converts_bfloat16()) return outputs<io, out(), reversed, true>(walk, batch, next, s, way);
#endif
        outputs<io, out(), reversed>(walk, batch, next, s, way);
      });
    else
      outputs<io, Dtype::float32, reversed>(walk, batch, next, s, Way::kept);
  }
  if (way == Way::kept) {
    for (int64_t i = 0; i < batch.count; ++i) finish_stretch<io>(walk, batch, i, s);
  } else if (way == Way::stream_later) {
    s.pending = {batch.out, (batch.count - 1) * walk.out_stride + n * walk.out_size, reversed && walk.parts > 1};
  } else if (const int64_t done = batch.whole(); done < n) {
    const int64_t bytes = (n - done) * walk.out_size;
    for (int64_t i = 0; i < batch.count; ++i)
      __builtin_memcpy(batch.out + i * walk.out_stride + done * walk.out_size, s.out + (i * walk.slots * block + done) * walk.out_size,
                       bytes);
  }
}

void forward_walk(RowWalk& walk, RowForwardScratch& s, bool streamed) {
  const ScanForward& f = walk.f;
  const int64_t row_bytes = walk.out_stride;
  const bool aligned = (reinterpret_cast<uintptr_t>(f.out) | row_bytes) % 64 == 0, straight = f.z.data == nullptr && !f.sizes.shared;
  const Way way = !straight                            ? Way::kept
                  : streamed && aligned                ? Way::streamed
                  : streamed ? Way::stream_later : Way::stored;
  RowBatch batches[3];
  s.forget();
  with_dtype(f.sizes.io, [&](auto io) {
    walk.fill(batches[0]);
    walk.fill(batches[1]);
    step_sizes<io()>(walk, batches[0], batches[1], s);
    for (int64_t i = 0; batches[i].count != 0; i = (i + 1) % 3) {
      RowBatch &batch = batches[i], &next = batches[(i + 1) % 3], &later = batches[(i + 2) % 3];
      walk.fill(later);
      (batch.reversed ? forward_batch<io(), true> : forward_batch<io(), false>)(walk, batch, next, later, s, way);
    }
  });
  s.stream_pending();
  s.lines.whole.put(s.lines.whole.bytes);
  s.lines.close();
}

// The effects of a piece on its states, with the operations of forward_batch, so that the carries come out the same.
template <Dtype io, bool reversed>
int64_t effects_of_piece(RowWalk walk, RowForwardScratch& s, const PieceEffects& effects) {
  int64_t found = 0;
  RowBatch batch;
  const RowBatch none{};
  s.forget();
  for (walk.fill(batch); batch.count != 0; walk.fill(batch)) {
    step_sizes<io>(walk, batch, none, s);
    for (int64_t i = 0; i < walk.f.sizes.state; ++i) {
      find_state<io>(walk, batch, i, s);
      decays_and_inputs<io, reversed>(walk, batch, none, s, i);
      PieceEffects::find<reversed>(effects, i, found, s.runs, s.entering, batch.blocks());
    }
    found += divide_up(batch.blocks() * block, W * W);
  }
  return found;
}

constexpr int64_t range_steps = 8192;  // of the shortest range of rows that a thread takes

bool scan_forward_rows(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length, N = sizes.state, outputs = sizes.outputs();
  const int64_t rows = sizes.batch * outputs * D, pieces = divide_up(L, row_piece), padded = sizes.shared ? round_up(L, 16) : 0;
  const bool streamed = rows * L * size_of(sizes.out) >= streaming_bytes;
  if (!worth_pieces(rows, pieces)) {
    parallel_in_ranges(rows, larger_of(1, range_steps / (L * N)), [&](int64_t begin, int64_t end) {
      auto* scratch = static_cast<RowForwardScratch*>(thread_scratch(sizeof(RowForwardScratch) + 4 * padded));
      while (begin < end) {  // of each direction
        const int64_t b = begin / (outputs * D), o = begin / D % outputs, d = begin % D, until = smaller_of(D, d + end - begin);
        const int64_t first = sizes.shared ? 0 : o, last = sizes.shared ? sizes.directions - 1 : o;
        RowWalk walk(f, b, d, until, first, last, reinterpret_cast<float*>(scratch + 1));
        forward_walk(walk, *scratch, streamed);
        begin += until - d;
      }
    });
    return true;
  }
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
