// The selective scan along rows, forward: a vector holds consecutive steps of one channel. For N = 1, and wherever too few
// channels share B and C to fill a vector with them.
//
// A channel is walked in tiles that stay in the first-level cache, and a tile in loops of one purpose each, which measured faster
// than one loop that does everything: step sizes; decays and inputs; the scan over runs; states and output.
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t row_tile = 256;
constexpr int64_t streaming_elements = int64_t{1} << 20;  // from here on outputs bypass the caches
constexpr int64_t tiles_ahead = 4;

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

struct alignas(64) RowForwardScratch {
  float dt[row_tile], a[row_tile], w[row_tile], y[row_tile], u[row_tile], delta[row_tile], z[row_tile], B[row_tile],
      C[row_tile];
  Effect runs[row_tile / block];
  V entering[row_tile / block];
};

// Decays and inputs of a tile as runs, and what each run does to the state; the rest of its last square leaves the state as it is.
template <bool reversed>
inline void decays_and_inputs(const float* u, const float* B, float A, RowForwardScratch& s, int64_t n, Ahead ahead) {
  const V exponent = all(A * log2_e);
  Effect* runs = s.runs;
  for (int64_t i = 0; i < n; i += block) {
    ahead.fetch_lines(i);
    Block a, w;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V step = load(s.dt + i + j * W);
      a.v[j] = exp2(step * exponent);
      w.v[j] = step * load(u + i + j * W) * load(B + i + j * W);
    }
    a = a.turned();
    w = w.turned();
    a.to(s.a + i);
    w.to(s.w + i);
    *runs++ = compose_runs<reversed>(a, w);
  }
  for (; (runs - s.runs) % square_blocks != 0; ++runs) *runs = {all(1.0f), all(0.0f)};
}

// From the state that enters a tile to those that enter its runs.
template <bool reversed>
inline void enter_tile(RowForwardScratch& s, int64_t n, V& carry) {
  const int64_t squares = divide_up(n, W * W);
  for (int64_t walked = 0; walked < squares; ++walked) {
    const int64_t first = (reversed ? squares - 1 - walked : walked) * square_blocks;
    enter_square<reversed>(s.runs + first, s.entering + first, carry);
  }
}

// From those to all states; emit(i, h) receives them vector by vector.
template <bool reversed, typename Emit>
inline void states_of_tile(const RowForwardScratch& s, int64_t n, Emit emit) {
  const V* entering = s.entering;
  for (int64_t i = 0; i < n; i += block) {
    V h = *entering++;
    Block states;
    along_run<reversed>([&](int j) { states.v[j] = h = fma(load(s.a + i + j * W), h, load(s.w + i + j * W)); });
    states = states.turned();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) emit(i + j * W, states.v[j]);
  }
}

// One channel in one direction.
struct RowChannel {
  const ScanForward* f;
  int64_t b, k, d, tiles;
  bool first, last;  // of the directions that are summed into out
  float* sum;        // where that sum is kept

  int64_t sequence() const { return (b * f->sizes.directions + k) * f->sizes.channels + d; }
  const void* row(const Sequence& of) const {
    return element(f->sizes.io, of.data, b * of.batch + k * of.direction + d * of.channel);
  }
  float parameter(const void* data) const {
    return data == nullptr ? 0.0f : static_cast<const float*>(data)[k * f->sizes.channels + d];
  }
  int64_t tile(int64_t walked) const { return f->sizes.reversed(k) ? tiles - 1 - walked : walked; }

  // Where the walk will be a few tiles on: in this row, or in that of a later channel.
  struct Place {
    int64_t channels, position;
  };
  Place soon(int64_t walked) const {
    int64_t channels = 0;
    for (walked += tiles_ahead; walked >= tiles; walked -= tiles) ++channels;
    return {channels, tile(walked) * row_tile};
  }
  Ahead ahead(const Sequence& of, const Place& place) const {
    return {static_cast<const char*>(element(f->sizes.io, row(of), place.channels * of.channel + place.position)),
            size_of(f->sizes.io)};
  }
};

// The next tile, of this channel or another: its step sizes are taken in the middle of this one.
struct Upcoming {
  const RowChannel* channel;  // null: none
  int64_t walked;

  void step_sizes(RowForwardScratch& s) const {
    if (channel == nullptr) return;
    const ScanForward& f = *channel->f;
    const int64_t begin = channel->tile(walked) * row_tile, n = smaller_of(row_tile, f.sizes.length - begin);
    const int64_t padded = round_up(n, block);
    const float* delta = row_of(f.sizes.io, element(f.sizes.io, channel->row(f.delta), begin), s.delta, n, padded);
    cpu::step_sizes(delta, channel->parameter(f.delta_bias), f.sizes.delta_softplus, s.dt, n, padded,
                    channel->ahead(f.delta, channel->soon(walked)));
  }
};

template <bool reversed, bool streamed>
void forward_tile(const RowChannel& c, int64_t walked, RowForwardScratch& s, const Upcoming& upcoming) {
  const ScanForward& f = *c.f;
  const ScanSizes& sizes = f.sizes;
  const int64_t L = sizes.length, N = sizes.state, sequence = c.sequence();
  const int64_t begin = c.tile(walked) * row_tile, n = smaller_of(row_tile, L - begin), padded = round_up(n, block);
  const float* A = static_cast<const float*>(f.A) + (c.k * sizes.channels + c.d) * N;
  float* state = static_cast<float*>(f.last_state) + sequence * N;
  if (walked == 0)
    for (int64_t i = 0; i < N; ++i)
      state[i] = f.initial_state == nullptr ? 0.0f : static_cast<const float*>(f.initial_state)[sequence * N + i];
  if (sizes.chunk != 0)
    __builtin_memcpy(static_cast<float*>(f.boundary_states) + (sequence * sizes.chunks + c.tile(walked)) * N, state, 4 * N);
  const RowSource B(f.B, sizes.io, sizes.channels, c.b, c.k, c.d), C(f.C, sizes.io, sizes.channels, c.b, c.k, c.d);
  const Dtype io = sizes.io;
  const bool gated = f.z.data != nullptr, shared = sizes.shared;
  void* out_row = element(sizes.out, f.out, (shared ? c.b * sizes.channels + c.d : sequence) * L);
  const float* u = row_of(io, element(io, c.row(f.u), begin), s.u, n, padded);
  // Straight into out where nothing is left to be done to y.
  const bool direct = sizes.out == Dtype::float32 && !gated && !shared && n == padded;
  float* y = direct ? static_cast<float*>(out_row) + begin : s.y;
  const RowChannel::Place soon = c.soon(walked);
  if (!streamed) {
    const void* place = element(sizes.out, out_row, (shared ? 0 : soon.channels * L) + soon.position);
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(element(sizes.out, place, i), 1);
  }
  const V weight = all(c.parameter(f.D));
  for (int64_t i = 0; i < N; ++i) {
    const float *B_row = B.row(i, begin, n, padded, s.B), *C_row = C.row(i, begin, n, padded, s.C);
    decays_and_inputs<reversed>(u, B_row, A[i], s, padded, i == 0 ? c.ahead(f.u, soon) : Ahead{});
    V carry = all(state[i]);
    enter_tile<reversed>(s, padded, carry);
    store_part(state + i, carry, 1);
    if (i == N - 1) upcoming.step_sizes(s);  // the processor works on these while the steps of enter_tile wait for each other
    float* to = i == N - 1 ? y : s.y;
    if (i == 0)
      states_of_tile<reversed>(s, padded, [&](int64_t at, V h) {
        const V value = fma(load(C_row + at), h, weight * load(u + at));
        streamed && to != s.y ? stream(to + at, value) : store(to + at, value);
      });
    else
      states_of_tile<reversed>(s, padded,
                               [&](int64_t at, V h) { store(to + at, fma(load(C_row + at), h, load(s.y + at))); });
  }
  if (direct) return;
  if (shared) {
    float* sum = c.sum + begin;
    if (!c.first)
      for (int64_t i = 0; i < n; i += W)
        store(s.y + i, load(s.y + i) + load_part(sum + i, static_cast<int>(smaller_of(W, n - i))));
    if (!c.last) return store_row(Dtype::float32, sum, s.y, n);
  }
  if (gated) gate_row(s.y, row_of(io, element(io, c.row(f.z), begin), s.z, n, padded), padded);
  store_row(sizes.out, element(sizes.out, out_row, begin), s.y, n);
}

bool scan_forward_rows(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  if (sizes.chunk != 0 && sizes.chunk != row_tile) return false;
  const int64_t D = sizes.channels, L = sizes.length, outputs = sizes.outputs();
  const int64_t per_task = larger_of(1, smaller_of(D, 32768 / (L * sizes.state))), tasks = divide_up(D, per_task);
  const int64_t tiles = divide_up(L, row_tile);
  const bool streamed = sizes.out == Dtype::float32 && sizes.batch * outputs * D * L >= streaming_elements &&
                        reinterpret_cast<uintptr_t>(f.out) % 64 == 0 && L % 16 == 0;
  parallel(sizes.batch * outputs * tasks, [&](int64_t task) {
    const int64_t b = task / (outputs * tasks), o = task / tasks % outputs, begin = task % tasks * per_task;
    const int64_t end = smaller_of(begin + per_task, D), first = sizes.shared ? 0 : o, last = sizes.shared ? sizes.directions - 1 : o;
    const size_t row = sizes.shared ? round_up(L, 16) : 0;
    auto* scratch = static_cast<RowForwardScratch*>(thread_scratch(sizeof(RowForwardScratch) + 4 * row));
    const auto channel = [&](int64_t d, int64_t k) {
      return RowChannel{&f, b, k, d, tiles, k == first, k == last, reinterpret_cast<float*>(scratch + 1)};
    };
    RowChannel now = channel(begin, first);
    Upcoming{&now, 0}.step_sizes(*scratch);
    for (int64_t d = begin; d < end; ++d)
      for (int64_t k = first; k <= last; ++k) {
        const RowChannel next = k < last ? channel(d, k + 1) : channel(d + 1, first);
        const bool more = k < last || d + 1 < end;
        const auto run = sizes.reversed(k) ? (streamed ? forward_tile<true, true> : forward_tile<true, false>)
                                           : (streamed ? forward_tile<false, true> : forward_tile<false, false>);
        for (int64_t walked = 0; walked < tiles; ++walked)
          run(now, walked, *scratch,
              walked + 1 < tiles ? Upcoming{&now, walked + 1} : Upcoming{more ? &next : nullptr, 0});
        now = next;
      }
  });
  return true;
}

}  // namespace
}  // namespace dass::cpu
