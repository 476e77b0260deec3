// What the kernels of ss2d share: how a map is cut into tiles and pieces, and how a thread block holds a tile.
//
// A warp handles kPiece consecutive steps of kChannels channels at a time, in one direction. kLanes lanes stand side by side
// along the sequence, kRun steps each; the 32 / kLanes such groups hold two channels each. So the scan over a piece takes
// log2(kLanes) shuffles, and a value of x_dbl that a lane has read serves two channels.
//
// A tile is a rectangle of the map. Along the rows it falls into pieces, and again along the columns; the directions k and k+2
// walk the same pieces from opposite ends. Where a tile spans the map along an order's lines, its steps in that order are one
// run, and pieces go through line ends ("flat"); otherwise each line is cut on its own. csrc/README.md shows a picture.
#pragma once

#include "arguments.h"
#include "kernels/affine_scan.cuh"

namespace dass {

constexpr int kBlockWarps = 16;

template <int kLanes_>
struct Layout {
  static constexpr int kLanes = kLanes_, kGroups = kWarp / kLanes, kChannels = 2 * kGroups, kPiece = kLanes * kRun;
};

enum Pair { kRows = 0, kColumns = 1 };  // directions k and k + 2, by their first

struct Geometry {
  int64_t height = 0, width = 0;           // of the map
  int tile_height = 0, tile_width = 0;     // of a tile; at the edges of the map less of it is used
  int64_t tiles_down = 0, tiles_across = 0;
  int pieces[2] = {0, 0};                  // of a tile, by pair
  int per_line[2] = {0, 0};                // pieces of a line, 0: flat
  int64_t total[2] = {0, 0};               // pieces of the map along each order

  __host__ __device__ int64_t tiles() const { return tiles_down * tiles_across; }
};

// One tile in one order. Local positions count within the tile, row by row.
struct Order {
  int line, lines;                   // steps of a line and lines, as far as the map goes
  int step_stride, line_stride;      // local
  int64_t map_step, map_line;        // in the map
  int per_line;
  int64_t origin;                    // map position of the tile's first element
  int64_t first_piece, piece_stride; // number along the whole order of the tile's first piece; from line to line, if not flat
  int64_t order_first, order_line;   // place in the sequence of the tile's first element; from line to line

  DASS_DEVICE Order(const Geometry& g, int pair, int64_t tile) {
    const int64_t down = tile / g.tiles_across, across = tile % g.tiles_across;
    const int64_t row = down * g.tile_height, column = across * g.tile_width;
    const int rows = static_cast<int>(g.height - row < g.tile_height ? g.height - row : g.tile_height);
    const int columns = static_cast<int>(g.width - column < g.tile_width ? g.width - column : g.tile_width);
    origin = row * g.width + column;
    per_line = g.per_line[pair];
    if (pair == kRows) {
      line = columns, lines = rows, step_stride = 1, line_stride = g.tile_width, map_step = 1, map_line = g.width;
      piece_stride = g.tiles_across * per_line;
      first_piece = per_line ? row * piece_stride + across * per_line : down * g.pieces[pair];
      order_first = origin, order_line = g.width;
    } else {
      line = rows, lines = columns, step_stride = g.tile_width, line_stride = 1, map_step = g.width, map_line = 1;
      piece_stride = g.tiles_down * per_line;
      first_piece = per_line ? column * piece_stride + down * per_line : across * g.pieces[pair];
      order_first = column * g.height + row, order_line = g.height;
    }
  }
  DASS_DEVICE bool exists(int piece) const { return per_line == 0 || piece / per_line < lines; }
  DASS_DEVICE int64_t number(int piece) const {  // along the whole order
    return per_line ? first_piece + piece / per_line * piece_stride + piece % per_line : first_piece + piece;
  }
};

// Some consecutive steps: where they start and how many of them lie in the tile.
struct Steps {
  int position, offset, count;  // local; within its line
  int at_line;

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
    position = at_line * order.line_stride + offset * order.step_stride;
  }
  DASS_DEVICE int64_t map_position(const Order& order) const {
    return order.origin + at_line * order.map_line + offset * order.map_step;
  }
  DASS_DEVICE int64_t place(const Order& order) const {  // in the sequence; the steps that follow stand at the places that follow
    return order.order_first + at_line * order.order_line + offset;
  }
  template <typename Function>
  DASS_DEVICE void each(const Order& order, Function&& function) const {  // function(i, local position) of the steps that exist
    int at = position, in_line = offset;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) function(i, at);
      at += order.step_stride;
      if (++in_line == order.line) {
        in_line = 0;
        at += order.line_stride - order.line * order.step_stride;
      }
    }
  }
};

// Channels of a map, fetched by the whole block: `channels` of them into shared memory, `pitch` apart, of which the first
// `present` exist; the others become 0. The map is of dtype T or, `as_state`, of its state dtype.
template <typename Out, typename In>
DASS_DEVICE void load_map_rows(Out* tile, int pitch, int channels, int present, const In* map, int64_t channel_stride,
                               const Geometry& g, const Order& rows) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const bool whole = g.tile_width == g.width;  // a tile as wide as the map is one row to copy
  const int lines = whole ? 1 : rows.lines, line = whole ? rows.lines * rows.line : rows.line;
  for (int index = warp; index < channels * lines; index += warps) {
    const int channel = index / lines, at = index % lines;
    Out* to = tile + channel * pitch + at * g.tile_width;
    const In* from = map + channel * channel_stride + rows.origin + at * g.width;
    for (int i = lane; i < line; i += kWarp) to[i] = channel < present ? static_cast<Out>(from[i]) : Out(0.0f);
  }
}

template <typename T, typename Out>
DASS_DEVICE void load_map_tile(Out* tile, int pitch, int channels, int present, const Map& map, int64_t b, int64_t first_channel,
                               const Geometry& g, const Order& rows, bool as_state) {
  const int64_t offset = b * map.batch + first_channel * map.channel;
  if (as_state)
    load_map_rows(tile, pitch, channels, present, static_cast<const State<T>*>(map.data) + offset, map.channel, g, rows);
  else
    load_map_rows(tile, pitch, channels, present, static_cast<const T*>(map.data) + offset, map.channel, g, rows);
}

// Rows first ... first + count - 1 of x_dbl at the steps of a piece, in scan order, for one warp: staged[row][step].
template <typename T, int kPiece>
DASS_DEVICE void stage_rows(State<T>* staged, const T* x_dbl, int64_t row_stride, int first, int count, const Order& order,
                            int piece) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int base = 0; base < kPiece; base += kWarp) {
    const Steps steps(order, kPiece, piece, base + lane, 1);
    const T* from = x_dbl + first * row_stride + steps.map_position(order);
    for (int row = 0; row < count; ++row)
      staged[row * kPiece + base + lane] = steps.count ? static_cast<State<T>>(from[row * row_stride]) : State<T>(0);
  }
  __syncwarp();
}

template <typename S>
DASS_DEVICE void staged_run(Run<S>& run, const S* staged) {
  load_run<S>(run, staged, kRun, true);
}

// A lane's share of a tile held in shared memory.
template <typename T>
DASS_DEVICE void tile_run(Run<State<T>>& run, const T* tile, const Order& order, const Steps& steps) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) run[i] = State<T>(0);
  steps.each(order, [&](int i, int at) { run[i] = static_cast<State<T>>(tile[at]); });
}

struct Ss2dParameters {
  const void *dt_weight, *dt_bias, *A_logs, *Ds;
};

// Equation (13) for two channels and one piece: dt (0 at steps that do not exist), and the slope of the softplus.
template <typename T, int kPiece>
DASS_DEVICE void step_sizes(Run<State<T>> (&dt)[2], Run<State<T>> (&slope)[2], State<T>* staged, int capacity, bool all_staged,
                            const T* x_dbl, int64_t row_stride, const Order& order, int piece, const Steps& steps, int place,
                            const Ss2dParameters& parameters, int64_t k, int64_t channels, const int64_t (&d)[2], int rank) {
  using S = State<T>;
  const S* weight = static_cast<const S*>(parameters.dt_weight);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const S bias = d[c] < channels ? static_cast<const S*>(parameters.dt_bias)[k * channels + d[c]] : S(0);
#pragma unroll
    for (int i = 0; i < kRun; ++i) dt[c][i] = bias;
  }
  const S* weights[2] = {weight + (k * channels + (d[0] < channels ? d[0] : 0)) * rank,
                         weight + (k * channels + (d[1] < channels ? d[1] : 0)) * rank};
  for (int first = 0; first < rank; first += capacity) {
    const int count = rank - first < capacity ? rank - first : capacity;
    if (!all_staged) stage_rows<T, kPiece>(staged, x_dbl, row_stride, first, count, order, piece);
    for (int r = 0; r < count; ++r) {
      Run<S> low_rank;
      staged_run<S>(low_rank, staged + r * kPiece + place * kRun);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const S w = weights[c][first + r];
#pragma unroll
        for (int i = 0; i < kRun; ++i) dt[c][i] += w * low_rank[i];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const Softplus<S> soft = softplus<T>(dt[c][i]);
      dt[c][i] = i < steps.count ? soft.value : S(0);
      slope[c][i] = soft.slope;
    }
}

// Brings the rows of B and C of the states n ... n + count - 1 into `staged` and says where those of B and C start.
template <typename T, int kPiece>
struct StateRows {
  State<T>*B, *C;

  DASS_DEVICE StateRows(State<T>* staged, int capacity, bool all_staged, const T* x_dbl, int64_t row_stride,
                        const Order& order, int piece, int rank, int state, int n) {
    if (all_staged) {
      B = staged + (rank + n) * kPiece;
      C = staged + (rank + state + n) * kPiece;
      return;
    }
    const int half = capacity / 2, within = n % half;
    if (within == 0) {
      const int count = state - n < half ? state - n : half;
      stage_rows<T, kPiece>(staged, x_dbl, row_stride, rank + n, count, order, piece);
      stage_rows<T, kPiece>(staged + half * kPiece, x_dbl, row_stride, rank + state + n, count, order, piece);
    }
    B = staged + within * kPiece;
    C = staged + (half + within) * kPiece;
  }
};

}  // namespace dass
