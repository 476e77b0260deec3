// What the forward and the backward of ss2d share: the orders of the map, packed x_dbl, and step sizes from it.
//
// A task holds the maps of W channels as lane tiles, so that x is loaded once for the four directions, and a step along a column is
// as good as one along a row. x_dbl is packed first, once for all channels of an image: the R + 2N numbers of a step together,
// steps in the order of direction 0 or 1 (2 and 3 walk these from the end).
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t lane_chunk = 128;  // steps a task works on at a time
constexpr int64_t steps_ahead = 16;  // to prefetch: the hardware does not follow columns

// Where the steps of directions 0 and 1 stand in a lane tile of the map, in vectors, with some harmless places before the first
// and after the last. Rows of the map lie a vector further apart than they are wide where that keeps the positions of a column
// from meeting in one set of the cache.
class MapOrder {
 public:
  explicit MapOrder(const Ss2dSizes& sizes)
      : length_(sizes.length()),
        pitch_(sizes.width % 8 == 0 ? sizes.width + 1 : sizes.width),
        places_(sizes.height * pitch_),
        buffer_(2 * 4 * (length_ + 2 * margin)) {
    for (int k = 0; k < 2; ++k) {
      uint32_t* order = const_cast<uint32_t*>(of(k));
      for (int64_t i = 1; i <= margin; ++i) order[-i] = order[length_ + i - 1] = 0;
    }
    uint32_t *rows = const_cast<uint32_t*>(of(0)), *columns = const_cast<uint32_t*>(of(1));
    for (int64_t h = 0; h < sizes.height; ++h)
      for (int64_t w = 0; w < sizes.width; ++w)
        rows[h * sizes.width + w] = columns[w * sizes.height + h] = static_cast<uint32_t>(h * pitch_ + w);
  }
  const uint32_t* of(int64_t k) const {
    return reinterpret_cast<const uint32_t*>(buffer_.floats()) + k % 2 * (length_ + 2 * margin) + margin;
  }
  int64_t places() const { return places_; }  // vectors in a lane tile of the map

  static constexpr int64_t margin = 64;

 private:
  int64_t length_, pitch_, places_;
  Buffer buffer_;
};

struct PackedMaps {
  const Ss2dSizes& sizes;
  int64_t length, rows;
  Buffer buffer;

  explicit PackedMaps(const Ss2dSizes& sizes)
      : sizes(sizes), length(sizes.length()), rows(sizes.rows()), buffer(4 * sizes.batch * 4 * length * rows) {}

  float* at(int64_t b, int64_t k) const { return buffer.floats() + (b * 4 + k) * length * rows; }

  // Fills from x_dbl, rows of the map at a time.
  void pack(const LowRank& x_dbl) const {
    const int64_t width = sizes.width, per_task = larger_of(1, 4096 / larger_of(1, width));
    const int64_t parts = divide_up(sizes.height, per_task);
    parallel(sizes.batch * 4 * parts, [&](int64_t task) {
      const int64_t b = task / (4 * parts), k = task / parts % 4, first = task % parts * per_task;
      const int64_t last = smaller_of(first + per_task, sizes.height);
      float* to = at(b, k);
      for (int64_t row = 0; row < rows; row += W)
        for (int64_t h = first; h < last; ++h) {
          const int64_t count = smaller_of(W, rows - row);
          const void* from = element(sizes.io, x_dbl.data, b * x_dbl.batch + k * x_dbl.direction + row * x_dbl.row + h * width);
          rows_to_lanes(sizes.io, from, x_dbl.row, count, width, [&](int64_t w, V x) {
            const int64_t step = k % 2 == 0 ? h * width + w : w * sizes.height + h;
            store_part(to + step * rows + row, x, static_cast<int>(count));
          });
        }
    });
  }
};

// dt_weight (D, R) of one direction as (R, W) for W channels.
inline void turn_weight(const float* weight, int64_t rank, int64_t channels, float* to) {
  rows_to_lanes(Dtype::float32, weight, rank, channels, rank, [&](int64_t r, V x) { store(to + r * W, x); });
}

// v = weight x_dbl + bias for n steps, packed ones at `x_dbl`; `together` steps at once reuse a weight that is loaded.
template <int together>
inline void low_rank_steps(const float* x_dbl, int64_t rows, int64_t rank, const float* weight, V bias, float* v) {
  V sum[together];
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) sum[i] = bias;
  for (int64_t r = 0; r < rank; ++r) {
    const V w = load(weight + r * W);
#pragma GCC unroll 8
    for (int i = 0; i < together; ++i) sum[i] = fma(w, all(x_dbl[i * rows + r]), sum[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < together; ++i) store(v + i * W, sum[i]);
}

inline void low_rank(const float* x_dbl, int64_t rows, int64_t rank, const float* weight, V bias, float* v, int64_t n) {
  int64_t t = 0;
  for (; t + 8 <= n; t += 8) low_rank_steps<8>(x_dbl + t * rows, rows, rank, weight, bias, v + t * W);
  for (; t < n; ++t) low_rank_steps<1>(x_dbl + t * rows, rows, rank, weight, bias, v + t * W);
}

}  // namespace
}  // namespace dass::cpu
