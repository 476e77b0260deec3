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

struct LaneForwardTile {
  float *dt, *dtu, *y;  // (steps, W)
};

// n steps of `together` states, whose h and exponents stay in registers; y is added to.
template <bool reversed, int together>
inline void forward_states(const LaneForwardTile& t, int64_t n, const float* exponents, const float* B, const float* C,
                           int64_t numbers, float* states) {
  V h[together], exponent[together];
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) {
    h[i] = load(states + i * W);
    exponent[i] = load(exponents + i * W);
  }
  for (int64_t walked = 0; walked < n; ++walked) {
    const int64_t at = reversed ? n - 1 - walked : walked;
    const V step = load(t.dt + at * W), input = load(t.dtu + at * W);
    V y = load(t.y + at * W);
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) {
      h[i] = fma(exp2(step * exponent[i]), h[i], input * all(B[at * numbers + i]));
      y = fma(h[i], all(C[at * numbers + i]), y);
    }
    store(t.y + at * W, y);
  }
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) store(states + i * W, h[i]);
}

// One direction of a block. `sum`: where directions are summed, rows of floats for it.
template <bool reversed>
void forward_block(const ScanForward& f, const PackedProjections& packed, const LaneBlock& at, float* scratch, float* sum,
                   bool first, bool last) {
  constexpr int64_t steps = lane_tile;
  const ScanSizes& sizes = f.sizes;
  const int64_t L = sizes.length, N = sizes.state, numbers = packed.numbers, D = sizes.channels;
  const int64_t channel = at.k * D + at.first, sequence = (at.b * sizes.directions + at.k) * D + at.first;
  const LaneForwardTile t{scratch, scratch + steps * W, scratch + 2 * steps * W};
  float *states = t.y + steps * W, *exponents = states + N * W;
  const auto parameter = [&](const void* data) {
    return data == nullptr ? all(0.0f) : lane_parameter(static_cast<const float*>(data) + channel, 1, at.channels);
  };
  const V bias = parameter(f.delta_bias), skip = parameter(f.D);
  load_states(static_cast<const float*>(f.A) + channel * N, N, at.channels, N, exponents);
  for (int64_t n = 0; n < N; ++n) store(exponents + n * W, load(exponents + n * W) * all(log2_e));
  const float* initial = static_cast<const float*>(f.initial_state);
  load_states(initial == nullptr ? nullptr : initial + sequence * N, N, at.channels, N, states);
  float* boundary = static_cast<float*>(f.boundary_states) + sequence * sizes.chunks * N;
  const int64_t tiles = divide_up(L, steps);
  const bool kept = sizes.shared && !(first && last);
  constexpr int64_t ahead = reversed ? -steps : steps;
  for (int64_t walked = 0; walked < tiles; ++walked) {
    const int64_t begin = (reversed ? tiles - 1 - walked : walked) * steps, n = smaller_of(steps, L - begin), end = begin + n;
    if (sizes.chunk != 0 && (reversed ? end == L || end % sizes.chunk == 0 : begin % sizes.chunk == 0))
      lanes_to_rows(Dtype::float32, boundary + begin / sizes.chunk * N, sizes.chunks * N, at.channels, N,
                    [&](int64_t state) { return load(states + state * W); });
    rows_to_lanes(sizes.io, element(sizes.io, rows_of(sizes.io, f.delta, at), begin), f.delta.channel, at.channels, n,
                  [&](int64_t l, V x) { store(t.dtu + l * W, x + bias); }, ahead);
    if (sizes.delta_softplus)
      step_sizes_of_lanes(t.dtu, t.dt, n);
    else
      for (int64_t i = 0; i < n * W; i += W) store(t.dt + i, load(t.dtu + i));
    rows_to_lanes(sizes.io, element(sizes.io, rows_of(sizes.io, f.u, at), begin), f.u.channel, at.channels, n,
                  [&](int64_t l, V x) {
                    store(t.dtu + l * W, load(t.dt + l * W) * x);
                    store(t.y + l * W, x * skip);
                  },
                  ahead);
    const float *B = packed.at(at.b, at.k, at.unit) + begin * numbers, *C = B + N;
    int64_t state = 0;
    const auto run = [&](auto walk, int together) {
      for (; state + together <= N; state += together)
        walk(t, n, exponents + state * W, B + state, C + state, numbers, states + state * W);
    };
    run(forward_states<reversed, 4>, 4);
    run(forward_states<reversed, 1>, 1);
    const int64_t out = (sizes.shared ? at.b * D + at.first : sequence) * L + begin;
    const auto fetch = [&](int64_t l) { return load(t.y + l * W); };
    const auto finish = [&](int64_t c, int64_t from, float* row, int64_t length) {
      if (kept && !first) {
        const float* earlier = sum + c * L + begin + from;
        for (int64_t i = 0; i < length; i += W)
          store(row + i, load(row + i) + load_part(earlier + i, static_cast<int>(smaller_of(W, length - i))));
      }
      if (f.z.data != nullptr) {
        float z[steps];
        load_row(sizes.io, element(sizes.io, rows_of(sizes.io, f.z, at), c * f.z.channel + begin + from), z, length,
                 round_up(length, W));
        gate_row(row, z, length);
      }
    };
    if (kept && !last)
      lanes_to_rows(Dtype::float32, sum + begin, L, at.channels, n, fetch, finish, ahead);
    else
      lanes_to_rows(sizes.out, element(sizes.out, f.out, out), L, at.channels, n, fetch, finish, ahead);
  }
  store_states(states, N, at.channels, N, static_cast<float*>(f.last_state) + sequence * N);
}

bool scan_forward_lanes(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  const PackedProjections packed(sizes, f.B, f.C, sizes.state);
  const int64_t units = packed.units, per_unit = sizes.channels / units, blocks = divide_up(per_unit, W), outputs = sizes.outputs();
  // Sums over directions are kept in out itself where it is long enough.
  const bool apart = sizes.shared && sizes.out != Dtype::float32;
  const Buffer sums(apart ? 4 * sizes.batch * sizes.channels * sizes.length : 0);
  parallel(sizes.batch * outputs * units * blocks, [&](int64_t task) {
    const int64_t block = task % blocks, unit = task / blocks % units, o = task / (blocks * units) % outputs;
    const int64_t b = task / (blocks * units * outputs), first = unit * per_unit + block * W;
    float* scratch = static_cast<float*>(thread_scratch(4 * W * (3 * lane_tile + 2 * sizes.state)));
    float* sum = (apart ? sums.floats() : static_cast<float*>(f.out)) + (b * sizes.channels + first) * sizes.length;
    const int64_t first_k = sizes.shared ? 0 : o, last_k = sizes.shared ? sizes.directions - 1 : o;
    for (int64_t k = first_k; k <= last_k; ++k) {
      const LaneBlock at{b, k, unit, first, smaller_of(W, per_unit - block * W)};
      (sizes.reversed(k) ? forward_block<true> : forward_block<false>)(f, packed, at, scratch, sum, k == first_k, k == last_k);
    }
  });
  return true;
}

}  // namespace
}  // namespace dass::cpu
