// What the forward and the backward of ss2d share: the orders of the map, packed x_dbl, and step sizes from it.
//
// A task holds the maps of W channels as lane tiles, so that x is loaded once for the four directions, and a step along a column is
// as good as one along a row. x_dbl is packed first, once for all channels of an image, in the order of direction 0 or 1 (2 and 3 walk
// these from the end) and in groups of 16 steps: the R + 2N numbers of a group are so many cache lines one behind the other.
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t lane_chunk = 128;  // steps a task works on at a time
constexpr int64_t steps_ahead = 16;  // to prefetch: the hardware does not follow columns
constexpr int64_t group = 16;        // steps whose numbers are packed together
constexpr int octet = 8;             // steps whose step sizes share the load of a weight
constexpr bool interleaved = W == 16;  // registers enough to multiply for one octet while another is walked

// Where the steps of directions 0 and 1 stand in a lane tile of the map, in vectors, with some harmless places before the first
// and after the last. Rows of the map lie a vector further apart than they are wide where that keeps the positions of a column
// from meeting in one set of the cache.
class MapOrder {
 public:
  explicit MapOrder(const Ss2dSizes& sizes)
      : length_(sizes.length()),
        pitch_(sizes.width % 8 == 0 ? sizes.width + 1 : sizes.width),
        places_(sizes.height * pitch_),
        height_(sizes.height),
        width_(sizes.width),
        buffer_(2 * 4 * (length_ + 2 * margin)) {}
  void fill() const {
    for (int k = 0; k < 2; ++k) {
      uint32_t* order = const_cast<uint32_t*>(of(k));
      for (int64_t i = 1; i <= margin; ++i) order[-i] = order[length_ + i - 1] = 0;
    }
    uint32_t *rows = const_cast<uint32_t*>(of(0)), *columns = const_cast<uint32_t*>(of(1));
    for (int64_t h = 0; h < height_; ++h)
      for (int64_t w = 0; w < width_; ++w) rows[h * width_ + w] = columns[w * height_ + h] = static_cast<uint32_t>(h * pitch_ + w);
  }
  const uint32_t* of(int64_t k) const {
    return reinterpret_cast<const uint32_t*>(buffer_.floats()) + k % 2 * (length_ + 2 * margin) + margin;
  }
  int64_t places() const { return places_; }  // vectors in a lane tile of the map

  static constexpr int64_t margin = 64;

 private:
  int64_t length_, pitch_, places_, height_, width_;
  Buffer buffer_;
};

class PackedMaps {
 public:
  explicit PackedMaps(const Ss2dSizes& sizes)
      : sizes_(sizes),
        length_(sizes.length()),
        rows_(sizes.rows()),
        per_direction_(divide_up(length_, group) * rows_ * group),
        per_task_(larger_of(1, 4096 / length_)),
        parts_(divide_up(rows_, per_task_)),
        buffer_(4 * sizes.batch * 4 * per_direction_) {}

  // The numbers of the group that begins at step p of the order.
  const float* at(int64_t b, int64_t k, int64_t p) const { return place(b, k) + p * rows_; }

  int64_t tasks() const { return sizes_.batch * 4 * parts_; }

  // Packs some rows of x_dbl in one direction.
  void pack(const LowRank& x_dbl, int64_t task) const {
    const int64_t b = task / (4 * parts_), k = task / parts_ % 4, first = task % parts_ * per_task_;
    const int64_t padded = round_up(length_, group), height = sizes_.height, width = sizes_.width;
    float* spare = static_cast<float*>(thread_scratch(4 * (2 * padded + W)));
    float* turned = spare + padded;
    for (int64_t row = first; row < smaller_of(first + per_task_, rows_); ++row) {
      const void* given = element(sizes_.io, x_dbl.data, b * x_dbl.batch + k * x_dbl.direction + row * x_dbl.row);
      const float* from = row_of(sizes_.io, given, spare, length_, padded);
      if (k % 2 == 1) {
        // Whole vectors where what they write beyond their own place is written afterwards.
        for (int64_t h = 0; h < height; h += W) {
          const int64_t count = smaller_of(W, height - h);
          floats_to_lanes(from + h * width, width, count, width, [&](int64_t w, V x) {
            float* to = turned + w * height + h;
            height <= W || count == W ? store(to, x) : store_part(to, x, static_cast<int>(count));
          }, stretch);
        }
        fill_row_part(turned + length_, padded - length_);
        from = turned;
      }
      float* to = place(b, k) + row * group;
      for (int64_t p = 0; p < padded; p += group)
#pragma GCC unroll 4
        for (int64_t i = 0; i < group; i += W) store(to + p * rows_ + i, load(from + p + i));
    }
  }

 private:
  float* place(int64_t b, int64_t k) const { return buffer_.floats() + (b * 4 + k) * per_direction_; }
  static void fill_row_part(float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
  }

  const Ss2dSizes& sizes_;
  int64_t length_, rows_, per_direction_, per_task_, parts_;
  Buffer buffer_;
};

inline void pack_and_order(const PackedMaps& packed, const LowRank& x_dbl, const MapOrder& order) {
  parallel(packed.tasks() + 1, [&](int64_t task) { task == 0 ? order.fill() : packed.pack(x_dbl, task - 1); });
}

// Cache lines that will be wanted, so many bytes apart, fetched into the second-level cache a few at a time.
struct Lines {
  const char* at = nullptr;
  int64_t apart = 64, left = 0, at_once = 0;

  void fetch() {
    const int64_t count = smaller_of(at_once, left);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at + i * apart, 0, 2);
    at += count * apart;
    left -= count;
  }
};

// What a block of channels fetches with every octet of steps, for itself and for the next block.
struct FetchedAhead {
  Lines x, g, out, weight, d_weight;

  void fetch() {
    x.fetch(), g.fetch(), out.fetch(), weight.fetch(), d_weight.fetch();
  }
};

// Lines of a block of channels of a map, so many with every octet that four directions fetch it.
inline Lines lines_of_map(Dtype type, const void* block, int64_t channel, int64_t position, int64_t channels, int64_t length) {
  const int64_t item = size_of(type), rows = channel == length ? divide_up(channels * length * item, 64) : 0;
  return {static_cast<const char*>(block), position == 1 ? 64 : position * item, position == 1 ? rows : length, octet / 4};
}

// The weights of a block of channels in one direction, or their gradient, so many with every octet that one direction fetches it.
inline Lines lines_of_weight(const void* dt_weight, const Ss2dSizes& sizes, int64_t k, int64_t d) {
  const float* from = static_cast<const float*>(dt_weight) + (k * sizes.channels + d) * sizes.rank;
  const int64_t lines = divide_up(smaller_of(W, sizes.channels - d) * sizes.rank, 16);
  return {reinterpret_cast<const char*>(from), 64, lines, divide_up(octet * lines, sizes.length())};
}

// Where row 0 of step t stands in packed numbers, from the beginning of a group on; row r is r groups further.
inline int64_t packed_step(int64_t t, int64_t rows) { return t / group * rows * group + t % group; }

// dt_weight (D, R) of one direction as (R, W) for W channels.
inline void turn_weight(const float* weight, int64_t rank, int64_t channels, float* to) {
  floats_to_lanes(weight, rank, channels, rank, [&](int64_t r, V x) { store(to + r * W, x); }, 0);
}

// sum += weight x_dbl for an octet of steps and some ranks.
inline void add_low_rank(const float* steps, const float* weight, int64_t begin, int64_t end, V* sum) {
  for (int64_t r = begin; r < end; ++r) {
    const V w = load(weight + r * W);
#pragma GCC unroll 8
    for (int i = 0; i < octet; ++i) sum[i] = fma(w, all(steps[r * group + i]), sum[i]);
  }
}

// Ranks of such a product that are added up before each step of another octet.
struct ProductParts {
  int64_t begin[octet + 1];

  explicit ProductParts(int64_t rank) {
    for (int64_t i = 0; i <= octet; ++i) begin[i] = i * rank / octet;
  }
};

// v = weight x_dbl + bias for n steps, rounded up to octets.
inline void low_rank(const float* x_dbl, int64_t rows, int64_t rank, const float* weight, V bias, float* v, int64_t n) {
  for (int64_t t = 0; t < n; t += octet) {
    V sum[octet];
#pragma GCC unroll 8
    for (int i = 0; i < octet; ++i) sum[i] = bias;
    add_low_rank(x_dbl + packed_step(t, rows), weight, 0, rank, sum);
#pragma GCC unroll 8
    for (int i = 0; i < octet; ++i) store(v + (t + i) * W, sum[i]);
  }
}

}  // namespace
}  // namespace dass::cpu
