// Steps of W channels at once, one channel a lane: the recurrence needs no exchange between lanes, and what the channels share
// (B, C, the low-rank step size) is broadcast from memory. Used where a channel's rows have to be turned anyway: ss2d, whose four
// directions share one turn, and N > 1, where a turn serves N states.
//
// A "lane tile" is an array of vectors, one for each position: channel c of position p at tile[p W + c].
#pragma once

namespace dass::cpu {
namespace {

inline void transpose_square(V* r) {  // r[i] lane j <-> r[j] lane i
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) transpose4(r[i], r[i + 1], r[i + 2], r[i + 3]);
  exchange_pieces(r);
}

// Rows of `channels` <= W channels, `stride` elements apart, as lane tiles; absent channels are 0. `emit(p, x)` gets each position.
template <typename Emit>
inline void rows_to_lanes(Dtype type, const void* rows, int64_t stride, int64_t channels, int64_t n, Emit emit) {
  V r[W];
  for (int64_t p = 0; p < n; p += W) {
    const int count = static_cast<int>(smaller_of(W, n - p));
    for (int64_t c = 0; c < W; ++c) {
      if (c >= channels) {
        r[c] = all(0.0f);
      } else if (type == Dtype::float32) {
        const float* at = static_cast<const float*>(rows) + c * stride + p;
        r[c] = count == W ? load(at) : load_part(at, count);
      } else {
        float part[W];
        load_row(type, element(type, rows, c * stride + p), part, count, W);
        r[c] = load(part);
      }
    }
    transpose_square(r);
    for (int i = 0; i < count; ++i) emit(p + i, r[i]);
  }
}

// The other way; `fetch(p)` gives each position.
template <typename Fetch>
inline void lanes_to_rows(Dtype type, void* rows, int64_t stride, int64_t channels, int64_t n, Fetch fetch) {
  V r[W];
  for (int64_t p = 0; p < n; p += W) {
    const int count = static_cast<int>(smaller_of(W, n - p));
    for (int i = 0; i < W; ++i) r[i] = i < count ? fetch(p + i) : all(0.0f);
    transpose_square(r);
    for (int64_t c = 0; c < channels; ++c) {
      if (type == Dtype::float32) {
        float* at = static_cast<float*>(rows) + c * stride + p;
        count == W ? store(at, r[c]) : store_part(at, r[c], count);
      } else {
        float part[W];
        store(part, r[c]);
        store_row(type, element(type, rows, c * stride + p), part, count);
      }
    }
  }
}

// Column `row` of W rows of parameters, 0 for absent channels: one number for each lane.
inline V lane_parameter(const float* data, int64_t stride, int64_t channels) {
  float lane[W] = {};
  for (int64_t c = 0; c < channels; ++c) lane[c] = data[c * stride];
  return load(lane);
}

inline void scatter_lanes(V x, float* to, int64_t stride, int64_t channels) {
  float lane[W];
  store(lane, x);
  for (int64_t c = 0; c < channels; ++c) to[c * stride] = lane[c];
}

}  // namespace
}  // namespace dass::cpu
