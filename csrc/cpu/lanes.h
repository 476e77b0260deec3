// Steps of W channels at once, one channel a lane: the recurrence needs no exchange between lanes, and what the channels share
// (B, C, the low-rank step size) is broadcast from memory. Used where a channel's rows have to be turned anyway: ss2d, whose four
// directions share one turn, and N > 1, where a turn serves N states.
//
// A "lane tile" is an array of vectors, one for each position: channel c of position p at tile[p W + c].
#pragma once

namespace dass::cpu {
namespace {

// r[i] lane j <-> r[j] lane i. Inlined whatever the compiler thinks of its size: a call would pass W vectors through memory.
__attribute__((always_inline)) inline void transpose_square(V* r) {
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) transpose4(r[i], r[i + 1], r[i + 2], r[i + 3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    V four[W / 4];
#pragma GCC unroll 4
    for (int g = 0; g < W / 4; ++g) four[g] = r[4 * g + i];
    transpose_pieces(four);
#pragma GCC unroll 4
    for (int g = 0; g < W / 4; ++g) r[4 * g + i] = four[g];
  }
}

// Lane i: the sum over the lanes of the i-th of W vectors.
inline V sum_each(const float* rows) {
  V z[W / 4];
#pragma GCC unroll 4
  for (int i = 0; i < W / 4; ++i) {
    const float* four = rows + 4 * i * W;
    const V a = load(four), b = load(four + W), c = load(four + 2 * W), d = load(four + 3 * W);
    const V x = unpack_low(a, b) + unpack_high(a, b), y = unpack_low(c, d) + unpack_high(c, d);
    z[i] = unpack_low_pairs(x, y) + unpack_high_pairs(x, y);
  }
  return sum_pieces(z);
}

// Rows of `channels` <= W channels, `stride` elements apart, as lane tiles; absent channels are 0. `emit(p, x)` gets each position.
// `ahead`: how many elements from here that lies which will be wanted next, to be fetched meanwhile.
template <typename Emit>
inline void floats_to_lanes(const float* rows, int64_t stride, int64_t channels, int64_t n, Emit emit, int64_t ahead) {
  for (int64_t p = 0; p < n; p += W) {
    const int64_t count = smaller_of(W, n - p);
    const float* from = rows + p;
    V r[W];
    if (channels == W && count == W) {
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) {
        r[c] = load(from + c * stride);
        if (p % 16 == 0) __builtin_prefetch(from + c * stride + ahead, 0, 2);
      }
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) r[c] = c < channels ? load_part(from + c * stride, static_cast<int>(count)) : all(0.0f);
    }
    transpose_square(r);
    if (count == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) emit(p + i, r[i]);
    } else {
      float square[W * W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(square + i * W, r[i]);
      for (int64_t i = 0; i < count; ++i) emit(p + i, load(square + i * W));
    }
  }
}

// Of the narrower types, rows are read and written in stretches of whole cache lines, by way of a buffer: rows often lie a power of
// two apart, and half a line of each in turn would make them compete for the same few places of the cache.
constexpr int64_t stretch = 64;
struct alignas(64) Stretches {
  float row[W][stretch + 16];
};

template <typename Emit>
inline void rows_to_lanes(Dtype type, const void* rows, int64_t stride, int64_t channels, int64_t n, Emit emit,
                          int64_t ahead = stretch) {
  if (type == Dtype::float32) return floats_to_lanes(static_cast<const float*>(rows), stride, channels, n, emit, ahead);
  Stretches s;
  for (int64_t begin = 0; begin < n; begin += stretch) {
    const int64_t length = smaller_of(stretch, n - begin), padded = round_up(length, W);
    for (int64_t c = 0; c < channels; ++c) {
      const void* from = element(type, rows, c * stride + begin);
      for (int64_t i = 0; i < stretch; i += 32) __builtin_prefetch(element(type, from, ahead + i), 0, 2);
      load_row(type, from, s.row[c], length, padded);
    }
    floats_to_lanes(s.row[0], stretch + 16, channels, length, [&](int64_t p, V x) { emit(begin + p, x); }, 0);
  }
}

// The other way; `fetch(p)` gives each position and finish(c, begin, row, length) sees a stretch of each row before it is stored.
template <typename Fetch, typename Finish>
inline void lanes_to_rows(Dtype type, void* rows, int64_t stride, int64_t channels, int64_t n, Fetch fetch, Finish finish,
                          int64_t ahead = stretch) {
  Stretches s;
  for (int64_t begin = 0; begin < n; begin += stretch) {
    const int64_t length = smaller_of(stretch, n - begin), padded = round_up(length, W);
    for (int64_t p = 0; p < padded; p += W) {
      V r[W];
      const int64_t last = begin + length - 1;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = fetch(smaller_of(begin + p + i, last));
      transpose_square(r);
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) store(s.row[c] + p, r[c]);
    }
    for (int64_t c = 0; c < channels; ++c) {
      finish(c, begin, s.row[c], length);
      void* to = element(type, rows, c * stride + begin);
      for (int64_t i = 0; i < stretch; i += 16) __builtin_prefetch(element(type, to, ahead + i), 1, 2);
      store_row(type, to, s.row[c], length);
    }
  }
}

// `streamed`: past the caches, where rows are floats and vectors of them aligned.
template <typename Fetch>
inline void lanes_to_rows(Dtype type, void* rows, int64_t stride, int64_t channels, int64_t n, Fetch fetch,
                          int64_t ahead = stretch, bool streamed = false) {
  int64_t squares = 0;  // positions that full squares take straight to rows of floats
  if (type == Dtype::float32 && channels == W)
    for (float* to = static_cast<float*>(rows); squares + W <= n; squares += W) {
      V r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = fetch(squares + i);
      transpose_square(r);
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) streamed ? stream(to + c * stride + squares, r[c]) : store(to + c * stride + squares, r[c]);
    }
  if (squares < n)
    lanes_to_rows(type, element(type, rows, squares), stride, channels, n - squares, [&](int64_t p) { return fetch(squares + p); },
                  [](int64_t, int64_t, float*, int64_t) {}, ahead);
}

// Maps of `channels` <= W channels as lane tiles, and back. They lie in rows, `channel` elements apart (position == 1), or with the
// channels side by side, `position` apart.
template <typename Emit>
inline void map_to_lanes(Dtype type, const void* map, int64_t channel, int64_t position, int64_t channels, int64_t n, Emit emit) {
  if (position == 1) return rows_to_lanes(type, map, channel, channels, n, emit);
  for (int64_t p = 0; p < n; ++p) {
    const void* at = element(type, map, p * position);
    __builtin_prefetch(element(type, at, 16 * position));
    float lane[W];
    if (type == Dtype::float32) {
      const float* from = static_cast<const float*>(at);
      emit(p, channels == W ? load(from) : load_part(from, static_cast<int>(channels)));
    } else if (type == Dtype::bfloat16 && channels == W) {
      emit(p, load_bfloat16(static_cast<const uint16_t*>(at)));
    } else {
      load_row(type, at, lane, channels, W);
      emit(p, load(lane));
    }
  }
}
template <typename Fetch>
inline void lanes_to_map(Dtype type, void* map, int64_t channel, int64_t position, int64_t channels, int64_t n, Fetch fetch,
                         bool streamed) {
  if (position == 1) return lanes_to_rows(type, map, channel, channels, n, fetch, stretch, streamed);
  for (int64_t p = 0; p < n; ++p) {
    if (type == Dtype::float32 && channels == W) {
      float* to = static_cast<float*>(map) + p * position;
      streamed ? stream(to, fetch(p)) : store(to, fetch(p));
    } else if (type == Dtype::bfloat16 && channels == W) {
      store_bfloat16(static_cast<uint16_t*>(map) + p * position, fetch(p));
    } else {
      float lane[W];
      store(lane, fetch(p));
      store_row(type, element(type, map, p * position), lane, channels);
    }
  }
}
// Whether a map can be stored past the caches: its vectors are aligned.
inline bool can_be_streamed(Dtype type, const void* map, int64_t channels, int64_t position, int64_t length) {
  return type == Dtype::float32 && reinterpret_cast<uintptr_t>(map) % 64 == 0 && (position == 1 ? length : channels) % 16 == 0;
}

// Column `row` of W rows of parameters, 0 for absent channels: one number for each lane.
inline V lane_parameter(const float* data, int64_t stride, int64_t channels) {
  if (stride == 1) return load_part(data, static_cast<int>(channels));
  float lane[W] = {};
  for (int64_t c = 0; c < channels; ++c) lane[c] = data[c * stride];
  return load(lane);
}

inline void scatter_lanes(V x, float* to, int64_t stride, int64_t channels) {
  if (stride == 1) return store_part(to, x, static_cast<int>(channels));
  float lane[W];
  store(lane, x);
  for (int64_t c = 0; c < channels; ++c) to[c * stride] = lane[c];
}

// dt = softplus(v) of n steps; the second form leaves its slope in v.
inline void step_sizes_of_lanes(const float* v, float* dt, int64_t n) {
  softplus_row(v, 0.0f, dt, n * W, Ahead{});
}
inline void step_sizes_and_slopes(float* v, float* dt, int64_t n) {
  softplus_row(v, 0.0f, dt, n * W, Ahead{});
  for (int64_t i = 0; i < n * W; i += W) store(v + i, slope_of_softplus(load(dt + i)));
}

}  // namespace
}  // namespace dass::cpu
