// The selective scan in lanes of channels, for N > 1 states whose B and C are shared by enough channels: a turn of u and delta
// serves all states, and the recurrence needs no exchange between lanes. See lanes.h.
//
// B and C are packed first, once for all channels of a group: the 2N numbers of a step together.
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t fewest_lanes = W / 2;  // with fewer channels in a block the lanes that idle cost more than rows do
constexpr int64_t lane_tile = 64;        // steps: step sizes, inputs, outputs, B and C of these stay in the first-level cache

bool lanes_fit(const ScanSizes& sizes, const Projection& B, const Projection& C) {
  return sizes.state > 1 && sizes.chunk % lane_tile == 0 && !B.constant && !C.constant &&
         sizes.channels / units_of(B, C) >= fewest_lanes;
}

struct PackedProjections {
  const ScanSizes& sizes;
  int64_t units, numbers;  // of a step: those of B, those of C
  Buffer buffer;           // (batch, K, units, L, 2 states)

  // `states`: N, or more; the others are 0.
  PackedProjections(const ScanSizes& sizes, const Projection& B, const Projection& C, int64_t states)
      : sizes(sizes),
        units(units_of(B, C)),
        numbers(2 * states),
        buffer(4 * sizes.batch * sizes.directions * units * sizes.length * numbers) {
    constexpr int64_t steps = 1024;
    const int64_t parts = divide_up(sizes.length, steps), K = sizes.directions, N = sizes.state;
    parallel(sizes.batch * K * units * parts, [&](int64_t task) {
      const int64_t bku = task / parts, begin = task % parts * steps, n = smaller_of(steps, sizes.length - begin);
      const Projection* const both[] = {&B, &C};
      for (const Projection* p : both) {
        const int64_t group = bku % units / (units / p->groups);
        const void* from = element(sizes.io, p->data, bku / units / K * p->batch + bku / units % K * p->direction +
                                                          group * p->group + begin);
        float* to = buffer.floats() + (bku * sizes.length + begin) * numbers + (p == &C ? states : 0);
        for (int64_t state = 0; state < N; state += W) {
          const int64_t count = smaller_of(W, N - state), stored = smaller_of(W, states - state);
          rows_to_lanes(sizes.io, element(sizes.io, from, state * p->state), p->state, count, n,
                        [&](int64_t l, V x) { store_part(to + l * numbers + state, x, static_cast<int>(stored)); });
        }
      }
    });
  }
  const float* at(int64_t b, int64_t k, int64_t unit) const {
    return buffer.floats() + ((b * sizes.directions + k) * units + unit) * sizes.length * numbers;
  }
};

// A block of W channels in one direction.
struct LaneBlock {
  int64_t b, k, unit, first, channels;
};

inline const void* rows_of(Dtype type, const Sequence& of, const LaneBlock& at) {
  return element(type, of.data, at.b * of.batch + at.k * of.direction + at.first * of.channel);
}

// The states (or parameters) of the block's channels, (W, N) `stride` apart in memory, as N vectors, and back.
inline void load_states(const float* from, int64_t stride, int64_t channels, int64_t N, float* to) {
  for (int64_t n = 0; n < N; ++n) store(to + n * W, from == nullptr ? all(0.0f) : lane_parameter(from + n, stride, channels));
}
inline void store_states(const float* from, int64_t stride, int64_t channels, int64_t N, float* to) {
  for (int64_t n = 0; n < N; ++n) scatter_lanes(load(from + n * W), to + n, stride, channels);
}

// -- forward -----------------------------------------------------------------------------------------------------------------

// A tile of W channels. What concerns one channel at a time is done along rows, which lie so far apart that they do not compete for
// the same places of the cache; then whole squares are turned.
struct alignas(64) LaneForwardScratch {
  float dt[lane_tile * W], dtu[lane_tile * W], y[lane_tile * W];  // (steps, W)
  float dt_rows[W][lane_tile + 16], dtu_rows[W][lane_tile + 16];  // y's rows where those of dt were
};

// n steps (a multiple of W) of W rows as (steps, W), and back.
[[gnu::noinline]] inline void rows_to_squares(const float (*rows)[lane_tile + 16], float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    V r[W];
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) r[c] = load(rows[c] + i);
    transpose_square(r);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) store(to + (i + j) * W, r[j]);
  }
}
[[gnu::noinline]] inline void squares_to_rows(const float* from, float (*rows)[lane_tile + 16], int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    V r[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) r[j] = load(from + (i + j) * W);
    transpose_square(r);
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) store(rows[c] + i, r[c]);
  }
}

// n steps of `together` states, whose h and exponents stay in registers; y is added to, but for the first of them. On its own, not
// inlined: the compiler otherwise runs out of registers here.
template <bool reversed, int together>
[[gnu::noinline]] void forward_states(LaneForwardScratch& t, int64_t n, const float* exponents, const float* B, const float* C,
                                      int64_t numbers, float* states, bool first) {
  const Exp2 exp2;
  V h[together], exponent[together];
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) {
    h[i] = load(states + i * W);
    exponent[i] = load(exponents + i * W);
  }
  const float *dt = t.dt, *dtu = t.dtu;
  float* y_to = t.y;
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t at = reversed ? n - 1 - walked : walked;
    const V step = load(dt + at * W), input = load(dtu + at * W);
    V y = first ? all(0.0f) : load(y_to + at * W);
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) {
      h[i] = fma(exp2(step * exponent[i]), h[i], input * all(B[at * numbers + i]));
      y = fma(h[i], all(C[at * numbers + i]), y);
    }
    store(y_to + at * W, y);
  }
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) store(states + i * W, h[i]);
}

// One direction of a block, of which a tile of n steps from `begin` on is worked on.
struct LaneForward {
  const ScanForward& f;
  const LaneBlock at;
  LaneForwardScratch& s;
  float* sum;        // where directions are summed, rows of floats for it
  bool first, last;  // of those directions
  bool streamed;
  int64_t ahead;     // from a tile to the next
  int64_t begin = 0, n = 0, padded = 0;

  int64_t channel() const { return at.k * f.sizes.channels + at.first; }
  float parameter(const void* data, int64_t c) const {
    return data == nullptr ? 0.0f : static_cast<const float*>(data)[channel() + c];
  }
  // The tile's part of a row, in the dtype of rows(): as it lies, or, where its end is within a vector, as floats in `spare`.
  const void* row(const Sequence& of, int64_t c, float* spare) const {
    const Dtype io = f.sizes.io;
    const void* from = element(io, rows_of(io, of, at), c * of.channel + begin);
    fetch(io, from);
    if (n == padded) return from;
    load_row(io, from, spare, n, padded);
    return spare;
  }
  Dtype rows() const { return n == padded ? f.sizes.io : Dtype::float32; }
  void fetch(Dtype type, const void* from) const {
    for (int64_t i = 0; i < lane_tile; i += 64 / size_of(type)) __builtin_prefetch(element(type, from, ahead + i), 0, 2);
  }

  template <Dtype io, typename StepSize>
  [[gnu::always_inline]] void steps_and_inputs(StepSize step_size) const {
    const int64_t padded = this->padded;
    for (int64_t c = 0; c < at.channels; ++c) {
      float *dt_to = s.dt_rows[c], *dtu_to = s.dtu_rows[c];
      const void *delta = row(f.delta, c, dt_to), *u = row(f.u, c, dtu_to);
      const V bias = all(parameter(f.delta_bias, c));
      for (int64_t i = 0; i < padded; i += W) {
        const V dt = step_size(load_as<io>(delta, i) + bias);
        store(dtu_to + i, dt * load_as<io>(u, i));
        store(dt_to + i, dt);
      }
    }
  }
  void enter() const {
    with_dtype(rows(), [&](auto type) {
      constexpr Dtype io = type();
      if (f.sizes.delta_softplus) {
        SoftplusNear near;
        steps_and_inputs<io>([&](V v) { return near(v); });
        if (near.was_far()) steps_and_inputs<io>([&](V v) { return softplus(v); });
      } else {
        steps_and_inputs<io>([&](V v) { return v; });
      }
    });
    rows_to_squares(s.dt_rows, s.dt, padded);
    rows_to_squares(s.dtu_rows, s.dtu, padded);
  }

  template <bool reversed>
  void walk(const float* B, const float* C, int64_t numbers, float* states, const float* exponents) const {
    const int64_t N = f.sizes.state;
    int64_t state = 0;
    const auto run = [&](auto walk, int together) {
      for (; state + together <= N; state += together)
        walk(s, n, exponents + state * W, B + state, C + state, numbers, states + state * W, state == 0);
    };
    run(forward_states<reversed, 4>, 4);
    run(forward_states<reversed, 1>, 1);
  }

  void leave() const {
    const ScanSizes& sizes = f.sizes;
    const int64_t D = sizes.channels, L = sizes.length, n = this->n, padded = this->padded;
    const int64_t out = (sizes.shared ? at.b * D + at.first : at.b * sizes.directions * D + channel()) * L + begin;
    const bool alone = first && last, direct = alone && f.z.data == nullptr && n == padded;
    squares_to_rows(s.y, s.dt_rows, padded);
    with_dtype(rows(), [&](auto type) {
      constexpr Dtype io = type();
      for (int64_t c = 0; c < at.channels; ++c) {
        const void* u = row(f.u, c, s.dtu_rows[c]);
        const V skip = all(parameter(f.D, c));
        float* y = s.dt_rows[c];
        void* to = element(sizes.out, f.out, out + c * L);
        const auto finished = [&](int64_t i) { return fma(load_as<io>(u, i), skip, load(y + i)); };
        if (direct && streamed) {
          for (int64_t i = 0; i < n; i += W) stream(static_cast<float*>(to) + i, finished(i));
          continue;
        }
        fetch(sizes.out, to);
        if (!direct)
          for (int64_t i = 0; i < padded; i += W) store(y + i, finished(i));
        else if (sizes.out == Dtype::float32)
          for (int64_t i = 0; i < n; i += W) store(static_cast<float*>(to) + i, finished(i));
        else
          for (int64_t i = 0; i < n; i += W) store_as<io>(to, i, finished(i));
      }
    });
    if (direct) return;
    for (int64_t c = 0; c < at.channels; ++c) {
      float* y = s.dt_rows[c];
      void* to = element(sizes.out, f.out, out + c * L);
      float* const earlier = sum + c * L + begin;
      if (!first)
        for (int64_t i = 0; i < n; i += W)
          store(y + i, load(y + i) + load_part(earlier + i, static_cast<int>(smaller_of(W, n - i))));
      if (f.z.data != nullptr) {
        const void* z = element(sizes.io, rows_of(sizes.io, f.z, at), c * f.z.channel + begin);
        fetch(sizes.io, z);
        load_row(sizes.io, z, s.dtu_rows[c], n, padded);
        gate_row(y, s.dtu_rows[c], n);
      }
      if (last)
        store_row(sizes.out, to, y, n);
      else
        store_row(Dtype::float32, earlier, y, n);
    }
  }
};

template <bool reversed>
void forward_block(LaneForward t, const PackedProjections& packed, float* states) {
  const ScanSizes& sizes = t.f.sizes;
  const LaneBlock& at = t.at;
  const int64_t L = sizes.length, N = sizes.state, channel = t.channel(), sequence = at.b * sizes.directions * sizes.channels + channel;
  float* exponents = states + N * W;
  load_states(static_cast<const float*>(t.f.A) + channel * N, N, at.channels, N, exponents);
  for (int64_t n = 0; n < N; ++n) store(exponents + n * W, load(exponents + n * W) * all(log2_e));
  const float* initial = static_cast<const float*>(t.f.initial_state);
  load_states(initial == nullptr ? nullptr : initial + sequence * N, N, at.channels, N, states);
  float* boundary = static_cast<float*>(t.f.boundary_states) + sequence * sizes.chunks * N;
  for (int64_t c = at.channels; c < W; ++c) {
    fill_row(t.s.dt_rows[c], 0.0f, lane_tile);
    fill_row(t.s.dtu_rows[c], 0.0f, lane_tile);
  }
  const int64_t tiles = divide_up(L, lane_tile);
  t.ahead = reversed ? -lane_tile : lane_tile;
  for (int64_t walked = 0; walked < tiles; ++walked) {
    t.begin = (reversed ? tiles - 1 - walked : walked) * lane_tile;
    t.n = smaller_of(lane_tile, L - t.begin);
    t.padded = round_up(t.n, W);
    const int64_t end = t.begin + t.n;
    if (sizes.chunk != 0 && (reversed ? end == L || end % sizes.chunk == 0 : t.begin % sizes.chunk == 0))
      lanes_to_rows(Dtype::float32, boundary + t.begin / sizes.chunk * N, sizes.chunks * N, at.channels, N,
                    [&](int64_t state) { return load(states + state * W); });
    t.enter();
    const float* B = packed.at(at.b, at.k, at.unit) + t.begin * packed.numbers;
    t.walk<reversed>(B, B + packed.numbers / 2, packed.numbers, states, exponents);
    t.leave();
  }
  store_states(states, N, at.channels, N, static_cast<float*>(t.f.last_state) + sequence * N);
}

bool scan_forward_lanes(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  const PackedProjections packed(sizes, f.B, f.C, sizes.state);
  const int64_t units = packed.units, per_unit = sizes.channels / units, blocks = divide_up(per_unit, W), outputs = sizes.outputs();
  const bool streamed = sizes.out == Dtype::float32 && sizes.batch * outputs * sizes.channels * sizes.length >= streaming_elements &&
                        reinterpret_cast<uintptr_t>(f.out) % 64 == 0 && sizes.length % 16 == 0;
  // Sums over directions are kept in out itself where it is long enough.
  const bool apart = sizes.shared && sizes.out != Dtype::float32;
  const Buffer sums(apart ? 4 * sizes.batch * sizes.channels * sizes.length : 0);
  parallel(sizes.batch * outputs * units * blocks, [&](int64_t task) {
    const int64_t block = task % blocks, unit = task / blocks % units, o = task / (blocks * units) % outputs;
    const int64_t b = task / (blocks * units * outputs), first = unit * per_unit + block * W;
    auto* scratch = static_cast<LaneForwardScratch*>(thread_scratch(sizeof(LaneForwardScratch) + 4 * W * 2 * sizes.state));
    float* sum = (apart ? sums.floats() : static_cast<float*>(f.out)) + (b * sizes.channels + first) * sizes.length;
    const int64_t first_k = sizes.shared ? 0 : o, last_k = sizes.shared ? sizes.directions - 1 : o;
    for (int64_t k = first_k; k <= last_k; ++k) {
      const LaneForward run{f, {b, k, unit, first, smaller_of(W, per_unit - block * W)}, *scratch, sum, k == first_k, k == last_k,
                            streamed};
      (sizes.reversed(k) ? forward_block<true> : forward_block<false>)(run, packed, reinterpret_cast<float*>(scratch + 1));
    }
  });
  return true;
}

}  // namespace
}  // namespace dass::cpu
