// The selective scan along rows, forward: a vector holds consecutive steps of one channel. For N = 1, and wherever too few
// channels share B and C to fill a vector with them.
//
// A channel is walked in tiles that stay in the first-level cache, and a tile in loops of one purpose each, which measured faster
// than one loop that does everything: step sizes; decay and input; the block scan with the output.
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
    const int64_t group = channel / (channels / p.groups);
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
};

inline void decays_and_inputs(const float* dt, const float* u, const float* B, float A, float* a, float* w, int64_t n,
                              Ahead ahead) {
  const V exponent = all(A * log2_e);
  for (int64_t i = 0; i < n; i += W) {
    ahead.fetch(i);
    const V step = load(dt + i);
    store(a + i, exp2(step * exponent));
    store(w + i, step * load(u + i) * load(B + i));
  }
}

// Scans [0, n) in blocks, in scan order; emit(i, h) receives the states of each block.
template <bool reversed, typename Emit>
inline void scan_blocks(const float* a, const float* w, int64_t n, V& carry, Emit emit) {
  for (int64_t walked = 0; walked < n; walked += block) {
    const int64_t i = reversed ? n - block - walked : walked;
    const Block decay = Block::at(a + i).turned();
    Block h = Block::at(w + i).turned();
    scan_block<reversed>(decay, h, carry);
    emit(i, h.turned());
  }
}

// One channel in one direction.
struct RowChannel {
  const ScanForward& f;
  int64_t b, k, d;
  bool first = true, last = true;  // of the directions that are summed into out
  float* sum = nullptr;            // where that sum is kept

  // Where the walk will be a few tiles on, as channels L + position: in this row, or in that of the next channel.
  static int64_t ahead(bool reversed, int64_t walked, int64_t tiles, int64_t L) {
    const int64_t later = walked + tiles_ahead, tile = later % tiles;
    return later / tiles * L + (reversed ? tiles - 1 - tile : tile) * row_tile;
  }
};

template <bool reversed, bool streamed>
void forward_row(const RowChannel& c, RowForwardScratch& s) {
  const ScanForward& f = c.f;
  const ScanSizes& sizes = f.sizes;
  const int64_t L = sizes.length, N = sizes.state, sequence = (c.b * sizes.directions + c.k) * sizes.channels + c.d;
  const auto of_channel = [&](const void* data, float absent) {
    return data == nullptr ? absent : static_cast<const float*>(data)[c.k * sizes.channels + c.d];
  };
  const float bias = of_channel(f.delta_bias, 0.0f), skip = of_channel(f.D, 0.0f);
  const float* A = static_cast<const float*>(f.A) + (c.k * sizes.channels + c.d) * N;
  float* state = static_cast<float*>(f.last_state) + sequence * N;
  float* boundary = static_cast<float*>(f.boundary_states) + sequence * sizes.chunks * N;
  for (int64_t n = 0; n < N; ++n)
    state[n] = f.initial_state == nullptr ? 0.0f : static_cast<const float*>(f.initial_state)[sequence * N + n];
  const RowSource B(f.B, sizes.io, sizes.channels, c.b, c.k, c.d), C(f.C, sizes.io, sizes.channels, c.b, c.k, c.d);
  const Dtype io = sizes.io;
  const void* u_row = element(io, f.u.data, c.b * f.u.batch + c.k * f.u.direction + c.d * f.u.channel);
  const void* delta_row = element(io, f.delta.data, c.b * f.delta.batch + c.k * f.delta.direction + c.d * f.delta.channel);
  const void* z_row =
      f.z.data == nullptr ? nullptr : element(io, f.z.data, c.b * f.z.batch + c.k * f.z.direction + c.d * f.z.channel);
  const bool shared = sizes.shared;
  void* out_row = element(sizes.out, f.out, (shared ? c.b * sizes.channels + c.d : sequence) * L);
  // Straight into out where nothing is left to be done to y.
  const bool direct = sizes.out == Dtype::float32 && z_row == nullptr && !shared;
  const int64_t tiles = divide_up(L, row_tile), piece = sizes.chunk == 0 ? row_tile : smaller_of(sizes.chunk, row_tile);

  for (int64_t walked = 0; walked < tiles; ++walked) {
    const int64_t begin = (reversed ? tiles - 1 - walked : walked) * row_tile, n = smaller_of(row_tile, L - begin);
    const int64_t padded = round_up(n, block);
    const float* delta = row_of(io, element(io, delta_row, begin), s.delta, n, padded);
    const float* u = row_of(io, element(io, u_row, begin), s.u, n, padded);
    float* y = direct && n == padded ? static_cast<float*>(out_row) + begin : s.y;
    const int64_t soon = RowChannel::ahead(reversed, walked, tiles, L);
    const auto ahead = [&](const Sequence& of, const void* row) {
      return Ahead{static_cast<const char*>(row) + (soon / L * of.channel + soon % L) * size_of(io), size_of(io)};
    };
    if (!streamed)
      for (int64_t i = 0; i < n; i += 16)
        __builtin_prefetch(element(sizes.out, out_row, (shared ? soon % L : soon) + i), 1);
    step_sizes(delta, bias, sizes.delta_softplus, s.dt, n, padded, ahead(f.delta, delta_row));
    const V weight = all(skip);
    if (N != 1)
      for (int64_t i = 0; i < padded; i += W) store(s.y + i, weight * load(u + i));
    for (int64_t state_index = 0; state_index < N; ++state_index) {
      const float* B_row = B.row(state_index, begin, n, padded, s.B);
      const float* C_row = C.row(state_index, begin, n, padded, s.C);
      decays_and_inputs(s.dt, u, B_row, A[state_index], s.a, s.w, padded,
                        state_index == 0 ? ahead(f.u, u_row) : Ahead{});
      V carry = all(state[state_index]);
      const int64_t end = round_up(padded, piece);
      for (int64_t piece_walked = 0; piece_walked < end; piece_walked += piece) {
        const int64_t from = reversed ? end - piece - piece_walked : piece_walked;
        const int64_t length = smaller_of(piece, padded - from);
        if (sizes.chunk != 0) store_part(boundary + (begin + from) / sizes.chunk * N + state_index, carry, 1);
        if (N == 1) {
          scan_blocks<reversed>(s.a + from, s.w + from, length, carry, [&](int64_t i, const Block& h) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const int64_t at = from + i + j * W;
              const V value = fma(load(C_row + at), h.v[j], weight * load(u + at));
              streamed && y != s.y ? stream(y + at, value) : store(y + at, value);
            }
          });
        } else {
          const bool finished = state_index == N - 1 && y != s.y;
          scan_blocks<reversed>(s.a + from, s.w + from, length, carry, [&](int64_t i, const Block& h) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const int64_t at = from + i + j * W;
              store((finished ? y : s.y) + at, fma(load(C_row + at), h.v[j], load(s.y + at)));
            }
          });
        }
      }
      store_part(state + state_index, carry, 1);
    }
    if (y != s.y) continue;
    if (shared) {
      float* sum = c.sum + begin;
      if (!c.first)
        for (int64_t i = 0; i < n; i += W)
          store(s.y + i, load(s.y + i) + load_part(sum + i, static_cast<int>(smaller_of(W, n - i))));
      if (!c.last) {
        store_row(Dtype::float32, sum, s.y, n);
        continue;
      }
    }
    if (z_row != nullptr) gate_row(s.y, row_of(io, element(io, z_row, begin), s.z, n, padded), padded);
    store_row(sizes.out, element(sizes.out, out_row, begin), s.y, n);
  }
}

bool scan_forward_rows(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length, outputs = sizes.outputs();
  const int64_t per_task = larger_of(1, smaller_of(D, 32768 / (L * sizes.state))), tasks = divide_up(D, per_task);
  const bool streamed = sizes.out == Dtype::float32 && sizes.batch * outputs * D * L >= streaming_elements &&
                        reinterpret_cast<uintptr_t>(f.out) % 64 == 0 && L % 16 == 0;
  parallel(sizes.batch * outputs * tasks, [&](int64_t task) {
    const int64_t b = task / (outputs * tasks), o = task / tasks % outputs, begin = task % tasks * per_task;
    const size_t row = sizes.shared ? round_up(L, 16) : 0;
    auto* scratch = static_cast<RowForwardScratch*>(thread_scratch(sizeof(RowForwardScratch) + 4 * row));
    for (int64_t d = begin; d < smaller_of(begin + per_task, D); ++d) {
      const int64_t first = sizes.shared ? 0 : o, last = sizes.shared ? sizes.directions - 1 : o;
      for (int64_t k = first; k <= last; ++k) {
        const RowChannel channel{f, b, k, d, k == first, k == last, reinterpret_cast<float*>(scratch + 1)};
        const auto run = sizes.reversed(k) ? (streamed ? forward_row<true, true> : forward_row<true, false>)
                                           : (streamed ? forward_row<false, true> : forward_row<false, false>);
        run(channel, *scratch);
      }
    }
  });
  return true;
}

}  // namespace
}  // namespace dass::cpu
