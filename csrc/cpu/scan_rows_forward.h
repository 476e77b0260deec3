// The selective scan along rows, forward: a vector holds consecutive steps of one channel. For N = 1, and wherever too few
// channels share B and C to fill a vector with them.
//
// A channel is walked in tiles that stay in the first-level cache, and a tile in loops of one purpose each, which measured faster
// than one loop that does everything: step sizes; decays and inputs; the scan over runs; states and output.
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t row_tile = 256;
constexpr int64_t streaming_elements = int64_t{1} << 18;  // from here on outputs bypass the caches
constexpr int64_t batch_steps = 512, most_segments = batch_steps / block;
constexpr int64_t fetched_ahead = 512;  // of what is fetched early

// B or C of a channel as rows of floats from position `begin` on: row(n).
struct RowSource {
  const Projection& p;
  Dtype type;
  const char* at = nullptr;

  RowSource(const Projection& p, Dtype io, int64_t channels, int64_t b, int64_t k, int64_t channel)
      : p(p), type(p.constant ? Dtype::float32 : io) {
    const int64_t group = p.groups == 1 ? 0 : channel / (channels / p.groups);
    at = static_cast<const char*>(element(type, p.data, b * p.batch + k * p.direction + group * p.group));
  }

  const float* row(int64_t n, int64_t begin, int64_t length, int64_t padded, float* spare) const {
    if (!p.constant) return row_of(type, element(type, at, n * p.state + begin), spare, length, padded);
    fill_row(spare, reinterpret_cast<const float*>(at)[n], padded);
    return spare;
  }
};

// What is worked on at a time: a stretch of a row, or several short rows, each from a multiple of `block` on.
struct alignas(64) RowForwardScratch {
  float dt[batch_steps], a[batch_steps], w[batch_steps], y[batch_steps], u[batch_steps], delta[batch_steps], z[batch_steps],
      B[batch_steps], C[batch_steps];
  Effect runs[most_segments * square_blocks];
  V entering[most_segments * square_blocks];
};

// One channel in one direction, of whose row `n` steps from `begin` on are worked on.
struct RowSegment {
  const ScanForward* f;
  int64_t b, k, d, begin, n, padded;
  bool reversed, first, last;       // of the directions that are summed into out
  float* sum;                       // where that sum is kept
  float* state;                     // (N), that enters and becomes the one that leaves
  int64_t offset, runs;             // places in the scratch memory
  bool shares;                      // a square with other rows
  int64_t later_channels, later;    // where the walk will be `fetched_ahead` on: so many channels on, at this position

  int64_t sequence() const { return (b * f->sizes.directions + k) * f->sizes.channels + d; }
  const void* row(const Sequence& of) const {
    return element(f->sizes.io, of.data, b * of.batch + k * of.direction + d * of.channel);
  }
  const float* floats(const Sequence& of, float* spare) const {
    return row_of(f->sizes.io, element(f->sizes.io, row(of), begin), spare + offset, n, padded);
  }
  float parameter(const void* data) const {
    return data == nullptr ? 0.0f : static_cast<const float*>(data)[k * f->sizes.channels + d];
  }
  Ahead ahead(const Sequence& of) const {
    return {static_cast<const char*>(element(f->sizes.io, row(of), later_channels * of.channel + later)), size_of(f->sizes.io)};
  }
};

// Decays and inputs as runs, and what each run does to the state.
template <bool reversed>
void decays_and_inputs(const RowSegment& t, RowForwardScratch& s, const float* u, const float* B, float A, Ahead ahead) {
  const V exponent = all(A * log2_e);
  const float* dt = s.dt + t.offset;
  float *a_to = s.a + t.offset, *w_to = s.w + t.offset;
  Effect* runs = s.runs + t.runs;
  for (int64_t i = 0; i < t.padded; i += block) {
    ahead.fetch_lines(i);
    Block a, w;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V step = load(dt + i + j * W);
      a.v[j] = exp2(step * exponent);
      w.v[j] = step * load(u + i + j * W) * load(B + i + j * W);
    }
    a = a.turned();
    w = w.turned();
    a.to(a_to + i);
    w.to(w_to + i);
    *runs++ = compose_runs<reversed>(a, w);
  }
}

// From the state that enters a segment to those that enter its runs.
template <bool reversed>
void enter_segment(const RowSegment& t, RowForwardScratch& s, float* state) {
  V carry = all(*state);
  enter_blocks<reversed>(s.runs + t.runs, s.entering + t.runs, t.padded / block, carry);
  store_part(state, carry, 1);
}

// The same for short rows, `span` vectors each, that share squares.
template <bool reversed, int span>
void enter_short_rows(const RowSegment* rows, int64_t count, RowForwardScratch& s, float* const* states) {
  constexpr int shared = W / span;
  for (int64_t begin = 0; begin < count; begin += shared) {
    const int64_t present = smaller_of(shared, count - begin), first = rows[begin].runs;
    float lanes[W] = {};
    for (int64_t j = 0; j < present; ++j)
      for (int64_t lane = 0; lane < span; ++lane) lanes[j * span + lane] = *states[begin + j];
    for (int64_t i = present * span / 4; i < square_blocks; ++i) s.runs[first + i] = {all(1.0f), all(0.0f)};
    V carry = load(lanes);
    enter_square<reversed, span>(s.runs + first, s.entering + first, carry);
    store(lanes, carry);
    for (int64_t j = 0; j < present; ++j) *states[begin + j] = lanes[j * span + (reversed ? 0 : span - 1)];
  }
}

// From those to all states; emit(i, h) receives them vector by vector.
template <bool reversed, typename Emit>
inline void states_of_segment(const RowSegment& t, const RowForwardScratch& s, Ahead ahead, Emit emit) {
  const V* entering = s.entering + t.runs;
  const float *a = s.a + t.offset, *w = s.w + t.offset;
  for (int64_t i = 0; i < t.padded; i += block) {
    ahead.fetch_lines(i);
    V h = *entering++;
    Block states;
    along_run<reversed>([&](int j) { states.v[j] = h = fma(load(a + i + j * W), h, load(w + i + j * W)); });
    states = states.turned();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) emit(i + j * W, states.v[j]);
  }
}

// The output of a segment, or what the states up to this one add to it.
template <bool reversed>
void outputs_of_segment(const RowSegment& t, RowForwardScratch& s, const float* C, const float* u, bool starts, float* to,
                        bool streamed, Ahead ahead) {
  const V weight = all(t.parameter(t.f->D));
  const float* y = s.y + t.offset;
  if (!starts)
    states_of_segment<reversed>(t, s, Ahead{}, [=](int64_t i, V h) { store(to + i, fma(load(C + i), h, load(y + i))); });
  else if (streamed)
    states_of_segment<reversed>(t, s, Ahead{}, [=](int64_t i, V h) { stream(to + i, fma(load(C + i), h, weight * load(u + i))); });
  else
    states_of_segment<reversed>(t, s, ahead, [=](int64_t i, V h) { store(to + i, fma(load(C + i), h, weight * load(u + i))); });
}

struct RowBatch {
  RowSegment segments[most_segments];
  int64_t count = 0;

  void step_sizes(RowForwardScratch& s) const {
    for (const RowSegment* t = segments; t < segments + count; ++t) {
      const ScanForward& f = *t->f;
      cpu::step_sizes(t->floats(f.delta, s.delta), t->parameter(f.delta_bias), f.sizes.delta_softplus, s.dt + t->offset, t->n,
                      t->padded, t->ahead(f.delta));
    }
  }
};

// What is left to be done to y where it does not go straight to `out`.
inline void finish_segment(const RowSegment& t, RowForwardScratch& s, void* out_row) {
  const ScanForward& f = *t.f;
  float* y = s.y + t.offset;
  if (f.sizes.shared) {
    float* sum = t.sum + t.begin;
    if (!t.first)
      for (int64_t i = 0; i < t.n; i += W)
        store(y + i, load(y + i) + load_part(sum + i, static_cast<int>(smaller_of(W, t.n - i))));
    if (!t.last) return store_row(Dtype::float32, sum, y, t.n);
  }
  if (f.z.data != nullptr) gate_row(y, t.floats(f.z, s.z), t.padded);
  store_row(f.sizes.out, element(f.sizes.out, out_row, t.begin), y, t.n);
}

// enter_segment for one of N states.
inline void enter_batch(const RowBatch& batch, RowForwardScratch& s, int64_t n) {
  const ScanForward& f = *batch.segments[0].f;
  const int64_t N = f.sizes.state, chunk = f.sizes.chunk;
  const RowSegment& one = batch.segments[0];
  float* states[most_segments];
  for (int64_t i = 0; i < batch.count; ++i) states[i] = batch.segments[i].state + n;
  if (!one.shares) {
    for (int64_t i = 0; i < batch.count; ++i) {
      const RowSegment& t = batch.segments[i];
      t.reversed ? enter_segment<true>(t, s, states[i]) : enter_segment<false>(t, s, states[i]);
    }
  } else if constexpr (W == 16) {
    const auto run = one.padded == block ? one.reversed ? enter_short_rows<true, 4> : enter_short_rows<false, 4>
                     : one.reversed      ? enter_short_rows<true, 8>
                                         : enter_short_rows<false, 8>;
    run(batch.segments, batch.count, s, states);
  }
  if (chunk == 0) return;
  for (int64_t i = 0; i < batch.count; ++i) {
    const RowSegment& t = batch.segments[i];
    float* boundary = static_cast<float*>(f.boundary_states) + (t.sequence() * f.sizes.chunks + t.begin / chunk) * N + n;
    for (int64_t begin = 0; begin < t.n; begin += chunk, boundary += N) {  // the state before a chunk's first run, or its last
      const int64_t entered = t.reversed ? smaller_of(begin + chunk, t.padded) / block - 1 : begin / block;
      *boundary = reinterpret_cast<const float*>(s.entering + t.runs + entered)[t.reversed ? W - 1 : 0];
    }
  }
}

// The step sizes of the batch are there; those of the next are taken on the way.
void forward_batch(const RowBatch& batch, const RowBatch& next, RowForwardScratch& s, bool streamed) {
  const RowSegment *const begin = batch.segments, *const end = begin + batch.count;
  const ScanForward& f = *begin->f;
  const ScanSizes& sizes = f.sizes;
  const int64_t L = sizes.length, N = sizes.state;
  const bool straight = sizes.out == Dtype::float32 && f.z.data == nullptr && !sizes.shared;
  const float* u[most_segments];
  for (const RowSegment* t = begin; t < end; ++t) {
    u[t - begin] = t->floats(f.u, s.u);
    float* state = t->state;
    const auto* initial = static_cast<const float*>(f.initial_state);
    if (t->reversed ? t->begin + t->n == L : t->begin == 0)
      for (int64_t i = 0; i < N; ++i) state[i] = initial == nullptr ? 0.0f : initial[t->sequence() * N + i];
  }
  for (int64_t i = 0; i < N; ++i) {
    const float *B_row = nullptr, *C_rows[most_segments];
    const void *B_at = nullptr, *C_at = nullptr;
    for (const RowSegment* t = begin; t < end; ++t) {
      const RowSource B(f.B, sizes.io, sizes.channels, t->b, t->k, t->d), C(f.C, sizes.io, sizes.channels, t->b, t->k, t->d);
      const bool again = t > begin && t->begin == t[-1].begin;  // the same steps of the next channel: often of the same B and C
      if (!again || B.at != B_at) B_row = B.row(i, t->begin, t->n, t->padded, s.B + t->offset);
      C_rows[t - begin] = again && C.at == C_at ? C_rows[t - begin - 1] : C.row(i, t->begin, t->n, t->padded, s.C + t->offset);
      B_at = f.B.constant ? nullptr : B.at;
      C_at = f.C.constant ? nullptr : C.at;
      const float A = static_cast<const float*>(f.A)[(t->k * sizes.channels + t->d) * N + i];
      const auto run = t->reversed ? decays_and_inputs<true> : decays_and_inputs<false>;
      run(*t, s, u[t - begin], B_row, A, i == 0 ? t->ahead(f.u) : Ahead{});
    }
    enter_batch(batch, s, i);
    if (i == N - 1) next.step_sizes(s);  // the processor works on these while the steps of enter_segment wait for each other
    for (const RowSegment* t = begin; t < end; ++t) {
      void* out_row =
          element(sizes.out, f.out, (sizes.shared ? t->b * sizes.channels + t->d : t->sequence()) * L);
      const bool direct = i == N - 1 && straight && t->n == t->padded;
      float* to = direct ? static_cast<float*>(out_row) + t->begin : s.y + t->offset;
      const void* later = element(sizes.out, out_row, (sizes.shared ? 0 : t->later_channels * L) + t->later);
      const auto run = t->reversed ? outputs_of_segment<true> : outputs_of_segment<false>;
      run(*t, s, C_rows[t - begin], u[t - begin], i == 0, to, streamed && direct,
          Ahead{static_cast<const char*>(later), size_of(sizes.out)});
      if (i == N - 1 && !direct) finish_segment(*t, s, out_row);
    }
  }
}

// The segments of a task in their order: channel by channel, in each the directions that are summed, in each its row in scan order.
struct RowWalk {
  const ScanForward& f;
  int64_t b, d, end, first, last;
  float* sum;
  int64_t k = first, parts = divide_up(f.sizes.length, batch_steps), from = 0, until = parts, walked = from;
  int64_t first_of_sum = first, last_of_sum = last;
  float* state = nullptr;  // null: in last_state
  int64_t later_parts = divide_up(fetched_ahead, smaller_of(f.sizes.length, batch_steps)), later_channels = later_parts / parts;

  RowWalk(const ScanForward& f, int64_t b, int64_t d, int64_t end, int64_t first, int64_t last, float* sum)
      : f(f), b(b), d(d), end(end), first(first), last(last), sum(sum) {
    later_parts %= parts;
  }
  // Of one row in one direction a piece (pieces.h).
  RowWalk(const ScanForward& f, int64_t b, int64_t d, int64_t k, int64_t piece, float* sum, float* state)
      : RowWalk(f, b, d, d + 1, k, k, sum) {
    constexpr int64_t of_piece = row_piece / batch_steps;
    from = walked = piece * of_piece;
    until = smaller_of(from + of_piece, parts);
    this->state = state;
    if (f.sizes.shared) first_of_sum = 0, last_of_sum = f.sizes.directions - 1;
  }
  bool more() const { return d < end; }
  void fill(RowBatch& batch) {
    const int64_t L = f.sizes.length, most = round_up(smaller_of(L, batch_steps), block);
    const bool share = W == 16 && most <= W * W / 2 && first == last;  // and so in the same direction
    int64_t offset = 0, runs = 0;
    for (batch.count = 0; more() && offset + most <= batch_steps; ++batch.count) {
      RowSegment& t = batch.segments[batch.count];
      const bool reversed = f.sizes.reversed(k);
      const auto begin_of = [&](int64_t part) { return (reversed ? parts - 1 - part : part) * batch_steps; };
      const int64_t begin = begin_of(walked), n = smaller_of(batch_steps, L - begin), padded = round_up(n, block);
      const int64_t later = walked + later_parts, wraps = later >= parts;
      t = {&f,   b,        k,         d,   begin,  n,    padded,  reversed,
           k == first_of_sum, k == last_of_sum, sum, nullptr, offset, runs, share, later_channels + wraps, begin_of(wraps ? later - parts : later)};
      t.state = state != nullptr ? state : static_cast<float*>(f.last_state) + t.sequence() * f.sizes.state;
      offset += padded;
      runs += round_up(padded / block, share ? 1 : square_blocks);
      if (++walked < until) continue;
      walked = from;
      if (++k <= last) continue;
      k = first;
      ++d;
    }
  }
};

void forward_walk(RowWalk& walk, RowForwardScratch& s, bool streamed) {
  RowBatch batches[2];
  walk.fill(batches[0]);
  batches[0].step_sizes(s);
  for (int64_t now = 0; batches[now].count != 0; now = 1 - now) {
    walk.fill(batches[1 - now]);
    forward_batch(batches[now], batches[1 - now], s, streamed);
  }
}

// The effects of a piece on its states, with the operations of forward_batch, so that the carries come out the same.
int64_t effects_of_piece(RowWalk walk, RowForwardScratch& s, const PieceEffects& effects) {
  const ScanForward& f = walk.f;
  int64_t found = 0;
  RowBatch batch;
  for (walk.fill(batch); batch.count != 0; walk.fill(batch)) {
    const RowSegment& t = batch.segments[0];  // as long as a batch
    batch.step_sizes(s);
    const float* u = t.floats(f.u, s.u);
    const RowSource B(f.B, f.sizes.io, f.sizes.channels, t.b, t.k, t.d);
    for (int64_t i = 0; i < f.sizes.state; ++i) {
      const float* B_row = B.row(i, t.begin, t.n, t.padded, s.B + t.offset);
      const float A = static_cast<const float*>(f.A)[(t.k * f.sizes.channels + t.d) * f.sizes.state + i];
      (t.reversed ? decays_and_inputs<true> : decays_and_inputs<false>)(t, s, u, B_row, A, i == 0 ? t.ahead(f.u) : Ahead{});
      const auto find = t.reversed ? PieceEffects::find<true> : PieceEffects::find<false>;
      find(effects, i, found, s.runs + t.runs, s.entering + t.runs, t.padded / block);
    }
    found += divide_up(t.padded, W * W);
  }
  return found;
}

bool scan_forward_rows(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length, N = sizes.state, outputs = sizes.outputs();
  const int64_t per_task = larger_of(1, smaller_of(D, 32768 / (L * N))), tasks = divide_up(D, per_task);
  const int64_t pieces = divide_up(L, row_piece), padded = sizes.shared ? round_up(L, 16) : 0;
  const bool streamed = sizes.out == Dtype::float32 && sizes.batch * outputs * D * L >= streaming_elements &&
                        reinterpret_cast<uintptr_t>(f.out) % 64 == 0 && L % 16 == 0;
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
            [&] { return effects_of_piece(walk(nullptr), *s, effects); },
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
