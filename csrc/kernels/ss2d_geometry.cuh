// How a map is cut into tiles and pieces, and how a thread block holds a tile in shared memory.
//
// A warp handles kPiece consecutive steps of kChannels channels at a time, in one direction. kLanes lanes stand side by side
// along the sequence, kRun steps each; the 32 / kLanes such groups hold two channels each. So the scan over a piece takes
// log2(kLanes) shuffles, and what a lane has read of x_dbl serves two channels.
//
// A tile is a rectangle of the map. In each direction it falls into pieces, numbered in the order of the scan: a reversed
// direction starts at the tile's last element and has negative strides, so kernels know no other difference. Where a tile spans
// the map along the lines of an order (rows or columns), its steps are one run and pieces go through line ends ("flat");
// otherwise each line is cut on its own. csrc/README.md has a picture.
#pragma once

#include "arguments.h"
#include "kernels/affine_scan.cuh"

namespace dass {

constexpr int kBlockWarps = 16;

template <int kLanes_>
struct Layout {
  static constexpr int kLanes = kLanes_, kGroups = kWarp / kLanes, kChannels = 2 * kGroups, kPiece = kLanes * kRun;
};

enum Pair { kRows = 0, kColumns = 1 };  // the directions k and k + 2

struct Geometry {
  int64_t height = 0, width = 0;        // of the map
  int tile_height = 0, tile_width = 0;  // of a tile; at the edges of the map less of it is used
  int64_t tiles_down = 0, tiles_across = 0;
  int pieces[2] = {0, 0};               // of a tile, by pair
  int per_line[2] = {0, 0};             // pieces of a line, 0: flat
  int64_t total[2] = {0, 0};            // pieces of the map along each order
  int pitch = 0;                        // between the rows of a tile in shared memory
  int channel_pitch = 0;                // between its channels

  __host__ __device__ int64_t tiles() const { return tiles_down * tiles_across; }
  // Columns are spread so that lanes 8 or 32 columns apart meet different banks; with an odd pitch so do lanes 8 rows apart.
  __host__ __device__ static int spread(int column) { return column + (column >> 5); }
};

// One tile in one direction.
struct Order {
  int line, lines;           // steps of a line and lines, as far as the map goes
  int row0, column0;         // of the first step, in the tile
  int sign;                  // -1: reversed
  bool rows;                 // lines are rows of the map
  bool straight;             // the steps of a run lie `stride` apart in shared memory
  int stride, pitch;
  int per_line;
  int64_t origin, map_step, map_line;  // of the first step in the map; to the next step and the next line
  int64_t first_piece, piece_stride;   // number along the whole order of the first piece; from line to line, if not flat
  int64_t place, place_line;           // in the unreversed sequence: of the first step; from line to line

  DASS_DEVICE Order(const Geometry& g, int k, int64_t tile) {
    const int64_t down = tile / g.tiles_across, across = tile % g.tiles_across;
    const int64_t row = down * g.tile_height, column = across * g.tile_width;
    const int height = static_cast<int>(g.height - row < g.tile_height ? g.height - row : g.tile_height);
    const int width = static_cast<int>(g.width - column < g.tile_width ? g.width - column : g.tile_width);
    const bool reversed = k >= 2;
    const int pair = k % 2;
    rows = pair == kRows;
    sign = reversed ? -1 : 1;
    line = rows ? width : height;
    lines = rows ? height : width;
    row0 = reversed ? height - 1 : 0;
    column0 = reversed ? width - 1 : 0;
    pitch = g.pitch;
    stride = sign * (rows ? 1 : pitch);
    per_line = g.per_line[pair];
    straight = (per_line != 0 || line % kRun == 0) && !(rows && width % kRun && width > 32);
    origin = (row + row0) * g.width + column + column0;
    map_step = sign * (rows ? 1 : g.width);
    map_line = sign * (rows ? g.width : 1);
    const int64_t order_line = rows ? g.width : g.height;
    place = rows ? origin : (column + column0) * g.height + row + row0;
    place_line = sign * order_line;
    const int64_t tiles_along = rows ? g.tiles_across : g.tiles_down, tiles_over = rows ? g.tiles_down : g.tiles_across;
    const int64_t along = rows ? across : down, over = rows ? down : across;
    const int64_t first_line = rows ? row : column, map_lines = rows ? g.height : g.width;
    piece_stride = tiles_along * per_line;
    if (per_line)
      first_piece = (reversed ? map_lines - first_line - lines : first_line) * piece_stride +
                    (reversed ? tiles_along - 1 - along : along) * per_line;
    else
      first_piece = (reversed ? tiles_over - 1 - over : over) * g.pieces[pair];
  }

  DASS_DEVICE bool exists(int piece) const { return per_line == 0 || piece / per_line < lines; }
  DASS_DEVICE int64_t number(int piece) const {  // along the whole order
    return per_line ? first_piece + piece / per_line * piece_stride + piece % per_line : first_piece + piece;
  }
  DASS_DEVICE int address(int at_line, int offset) const {  // in a channel in shared memory
    const int r = row0 + sign * (rows ? at_line : offset), c = column0 + sign * (rows ? offset : at_line);
    return r * pitch + Geometry::spread(c);
  }
};

// Some consecutive steps of a piece: where they start and how many of them lie in the tile.
struct Steps {
  int at_line, offset, count;

  DASS_DEVICE Steps(const Order& order, int kPiece, int piece, int step, int wanted) {
    if (order.per_line) {
      at_line = piece / order.per_line;
      offset = piece % order.per_line * kPiece + step;
      count = at_line < order.lines ? order.line - offset : 0;
    } else {
      const int s = piece * kPiece + step;
      at_line = s / order.line;
      offset = s % order.line;
      count = order.line * order.lines - s;
    }
    count = count < 0 ? 0 : count < wanted ? count : wanted;
    if (count == 0) at_line = offset = 0;
  }
  DASS_DEVICE int64_t map_position(const Order& order) const {
    return order.origin + at_line * order.map_line + offset * order.map_step;
  }
  DASS_DEVICE int64_t place(const Order& order) const {  // in the unreversed sequence; the next step stands at place + sign
    return order.place + at_line * order.place_line + offset * order.sign;
  }
  template <typename Function>
  DASS_DEVICE void each(const Order& order, Function&& function) const {  // function(i, address) of the steps that exist
    int at = order.address(at_line, offset);
    if (order.straight && count == kRun) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        function(i, at);
        at += order.stride;
      }
    } else {
      int in_line = offset, now = at_line;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < count) function(i, order.address(now, in_line));
        if (++in_line == order.line) in_line = 0, ++now;
      }
    }
  }
};

// A tile of sums in shared memory, (channels, channel_pitch): set to zero, and written to (channels, map) in memory. Both by the
// whole block, for the first `present` channels.
template <typename S>
DASS_DEVICE void clear_tile(S* tile, int present, const Geometry& g) {
  for (int i = threadIdx.x; i < present * g.channel_pitch; i += blockDim.x) tile[i] = S(0);
}
template <typename S>
DASS_DEVICE void write_tile(const S* tile, S* out, int present, const Geometry& g, const Order& rows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int index = warp; index < present * rows.lines; index += warps) {
    const int channel = index / rows.lines, row = index % rows.lines;
    const S* from = tile + channel * g.channel_pitch + row * g.pitch;
    S* to = out + channel * g.height * g.width + rows.origin + row * g.width;
    for (int i = lane; i < rows.line; i += kWarp) to[i] = from[Geometry::spread(i)];
  }
}

// The directions that a block walks, in this order: 1, 3, 2, 0. Or one of them, where blocks of one tile share them out.
struct Turns {
  int begin, end;
  unsigned rest;  // of the block's number

  DASS_DEVICE explicit Turns(bool split) : begin(split ? blockIdx.x % 4 : 0), end(split ? begin + 1 : 4), rest(split ? blockIdx.x / 4 : blockIdx.x) {}
  DASS_DEVICE static int direction(int turn) { return turn < 2 ? 1 + 2 * turn : 6 - 2 * turn; }
};

// The channels of a tile of x or of the gradient of y in shared memory. Words of 32 bits hold a position of two channels of
// 16-bit data, those that a lane handles together; other data has words of its own dtype, one channel each.
template <typename T, int kLanes>
struct MapTile {
  using S = State<T>;
  using L = Layout<kLanes>;
  void* words;
  bool wide;  // 16-bit data given in the state dtype

  static constexpr bool kPacked = kHalf<T>;
  __host__ __device__ static size_t bytes(int rounds, int channel_pitch, bool wide) {
    return static_cast<size_t>(rounds) * L::kChannels * channel_pitch * sizeof(S) / (kPacked && !wide ? 2 : 1);
  }

  // Fetched by the whole block; the first `present` channels exist, the others become 0.
  DASS_DEVICE void load(const Map& map, int64_t b, int64_t first_channel, int present, int rounds, const Geometry& g,
                        const Order& rows) const {
    if (kPacked && !wide) load_packed(map, b, first_channel, present, rounds, g, rows);
    else if (kPacked) load_single<float>(map, b, first_channel, present, rounds, g, rows);
    else load_single<T>(map, b, first_channel, present, rounds, g, rows);
  }

  // Both channels of a lane's run.
  DASS_DEVICE void read(Run<S> (&run)[2], int round, int group, int channel_pitch, const Order& order, const Steps& steps) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[0][i] = run[1][i] = S(0);
    if constexpr (kPacked) {
      if (!wide) {
        const uint32_t* tile = static_cast<const uint32_t*>(words) + (round * L::kGroups + group) * channel_pitch;
        steps.each(order, [&](int i, int at) {
          float pair[2];
          unpack<T>(tile[at], pair);
          run[0][i] = pair[0];
          run[1][i] = pair[1];
        });
        return;
      }
    }
    const S* tile = static_cast<const S*>(words) + (round * L::kChannels + group) * channel_pitch;
    steps.each(order, [&](int i, int at) {
      run[0][i] = tile[at];
      run[1][i] = tile[at + L::kGroups * channel_pitch];
    });
  }

  // The run of one of the lane's channels.
  DASS_DEVICE void read_one(Run<S>& run, int c, int round, int group, int channel_pitch, const Order& order, const Steps& steps) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = S(0);
    if constexpr (kPacked) {
      if (!wide) {
        const uint32_t* tile = static_cast<const uint32_t*>(words) + (round * L::kGroups + group) * channel_pitch;
        steps.each(order, [&](int i, int at) {
          float pair[2];
          unpack<T>(tile[at], pair);
          run[i] = pair[c];
        });
        return;
      }
    }
    const S* tile = static_cast<const S*>(words) + (round * L::kChannels + c * L::kGroups + group) * channel_pitch;
    steps.each(order, [&](int i, int at) { run[i] = tile[at]; });
  }

 private:
  template <typename In>
  DASS_DEVICE void load_single(const Map& map, int64_t b, int64_t first_channel, int present, int rounds, const Geometry& g,
                               const Order& rows) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const In* from_map = static_cast<const In*>(map.data) + b * map.batch + first_channel * map.channel + rows.origin;
    for (int index = warp; index < rounds * L::kChannels * rows.lines; index += warps) {
      const int channel = index / rows.lines, row = index % rows.lines;
      S* to = static_cast<S*>(words) + channel * g.channel_pitch + row * g.pitch;
      const In* from = from_map + channel * map.channel + row * g.width;
      for (int i = lane; i < rows.line; i += kWarp) to[Geometry::spread(i)] = channel < present ? static_cast<S>(from[i]) : S(0);
    }
  }
  DASS_DEVICE void load_packed(const Map& map, int64_t b, int64_t first_channel, int present, int rounds, const Geometry& g,
                               const Order& rows) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const uint16_t* from_map = static_cast<const uint16_t*>(map.data) + b * map.batch + first_channel * map.channel + rows.origin;
    for (int index = warp; index < rounds * L::kGroups * rows.lines; index += warps) {
      const int group = index / rows.lines, row = index % rows.lines;  // of all rounds
      const int channel = group / L::kGroups * L::kChannels + group % L::kGroups;
      uint32_t* to = static_cast<uint32_t*>(words) + group * g.channel_pitch + row * g.pitch;
      const uint16_t *low = from_map + channel * map.channel + row * g.width, *high = low + L::kGroups * map.channel;
      for (int i = lane; i < rows.line; i += kWarp)
        to[Geometry::spread(i)] = (channel < present ? low[i] : 0u) |
                                  static_cast<uint32_t>(channel + L::kGroups < present ? high[i] : 0u) << 16;
    }
  }
};

}  // namespace dass
