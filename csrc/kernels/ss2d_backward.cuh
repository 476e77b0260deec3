// The four-direction scan of a map, backward: equations (16) of SCAN.md.
//
// The block's shape, the directions and the pieces are those of ss2d_forward.cuh. A block goes through its sets of channels one
// after the other. In each piece it runs the states forward again, then mu backward, over the same factors; the two channels of
// a lane one after the other. What enters a piece from either side: on a map that is one set of pieces, the warps exchange it;
// otherwise it comes from the adjoint summary and carry.cuh.
//
// d_x is summed over the directions in shared memory and written once. The gradients of x_dbl are summed over the channels of a
// set within the warp, over the sets in a slab of the block's own, in the order of the scan; those of the parameters over the
// block's pieces. Slabs and partial results are added up afterwards. No atomics: every order is fixed by the shapes.
#pragma once

#include "kernels/low_rank_gradients.cuh"
#include "kernels/ss2d_forward.cuh"

namespace dass {

// Warps of a block: with many states a thread needs more than the 128 registers that 16 warps leave it.
constexpr int backward_warps(bool one_state) { return one_state ? kBlockWarps : 12; }

struct Ss2dBackwardWork {
  Ss2dBackward call;
  Ss2dParameters parameters;
  Geometry geometry;
  Staging staging;
  int64_t slabs = 0;  // blocks that share the channels of a tile
  int sets = 0;       // of Layout::kChannels channels, for a block
  void* out = nullptr;      // d_x; or `partial`
  bool out_as_state = false;
  void* partial = nullptr;  // (4, batch, channels, map) of state dtype: blocks walk one direction each and leave its d_x here
  unsigned position_blocks = 0;  // of ss2d_sum_slabs_kernel, for the positions of the map
  bool vectors = false;  // of out
  const void *states[2] = {nullptr, nullptr}, *adjoints[2] = {nullptr, nullptr};  // what enters each piece, as in the summary
  void* slab[2] = {nullptr, nullptr};  // by pair: (slabs, batch, 2, rows, pieces, kPiece)
  // (batch, tiles, 4, channels[, rank or state]); of Ds without the 4
  void *part_weight = nullptr, *part_bias = nullptr, *part_A = nullptr, *part_Ds = nullptr;
};

// What a block knows of the direction at hand. In shared memory, for want of registers.
struct Ss2dBackwardTurn {
  Order order;
  const void* x_dbl;  // of the clip and direction
  int64_t clip;       // elements of d_x before the clip
  void* slab;         // of the block, clip and direction: (rows, pieces, kPiece)
  const void *states, *adjoints;  // of the clip and direction: what enters each piece
};

template <typename T, bool kWhole>
struct Ss2dBackwardShared {
  using S = State<T>;
  using L = Layout<4>;
  Ss2dBackwardTurn* turn;
  S *staged, *weights, *A2;  // as in Ss2dForwardShared
  S* back_weights;           // LowRankBackWeights
  S* d_v;                    // (warps, kChannels, LowRankGradients::kPitch); meanwhile for other runs
  S* d_x;                    // (kChannels, channel_pitch)
  S* exchanged;              // (2 buffers, warps, kGroups, 4): factor, sum and adjoint sum of a piece; whole map only
  S* parameters;             // (warps, kChannels, rank + 1 + state + 1): gradients of dt_weight, dt_bias, A and Ds
  void *x, *d_y;             // MapTile
  size_t bytes;

  __host__ __device__ Ss2dBackwardShared(unsigned char* memory, int warps, const Staging& staging, const Geometry& g, int rank,
                                         int state, bool wide_gradient) {
    SharedLayout all(memory);
    exchanged = all.template take<S>(kWhole ? 8 * warps * L::kGroups : 0);
    turn = all.template take<Ss2dBackwardTurn>(1);
    staged = all.template take<S>(static_cast<size_t>(warps) * LowRankRows<T, 4>::words(staging));
    weights = all.template take<S>(LowRankWeights<T, 4>::words(1, rank));
    back_weights = all.template take<S>(LowRankBackWeights<T>::words(rank));
    A2 = all.template take<S>(static_cast<size_t>(state) * L::kChannels);
    d_v = all.template take<S>(static_cast<size_t>(warps) * L::kChannels * LowRankGradients<T>::kPitch);
    parameters = all.template take<S>(static_cast<size_t>(warps) * L::kChannels * (rank + state + 2));
    d_x = all.template take<S>(static_cast<size_t>(L::kChannels) * g.channel_pitch);
    x = all.template take<unsigned char>(MapTile<T, 4>::bytes(1, g.channel_pitch, false));
    d_y = all.template take<unsigned char>(MapTile<T, 4>::bytes(1, g.channel_pitch, wide_gradient));
    bytes = all.used();
  }
};

// The two channels of a lane are added up in shared memory.
template <typename S>
DASS_DEVICE void add_up(S* place, Run<S>& run, int channel) {
  if (channel == 1) {
    Run<S> first;
    load_run<S>(first, place, kRun, true);
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] += first[i];
  }
  store_run<S>(place, run, kRun, true);
}

template <typename T, bool kWhole, bool kOneState>
DASS_DEVICE void ss2d_backward_direction(const Ss2dBackwardWork& work, const Ss2dBackwardShared<T, kWhole>& shared, int k,
                                         Ss2dPass pass, bool first_set, int first_channel) {
  using S = State<T>;
  using L = Layout<4>;
  using Rows = LowRankRows<T, 4>;
  const Ss2dSizes& sizes = work.call.sizes;
  const Order& order = shared.turn->order;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Lanes<L::kLanes, false> up{lane % L::kLanes};   // of the states
  const Lanes<L::kLanes, true> down{lane % L::kLanes};  // of mu
  const int group = lane / L::kLanes, pair = k % 2, rank = static_cast<int>(sizes.rank);
  const int state = kOneState ? 1 : static_cast<int>(sizes.state), per_channel = rank + state + 2;
  const int64_t D = sizes.channels;
  const bool present[2] = {first_channel + group < D, first_channel + L::kGroups + group < D};
  const Rows rows(shared.staged + warp * Rows::words(work.staging), work.staging);
  const LowRankWeights<T, 4> weights{shared.weights};
  const MapTile<T, 4> x_tile{shared.x, false}, d_y_tile{shared.d_y, sizes.out != sizes.io};
  const LowRankGradients<T> gradients{shared.d_v + warp * L::kChannels * LowRankGradients<T>::kPitch,
                                      shared.parameters + warp * L::kChannels * per_channel, per_channel};
  const bool low_rank_staged = work.staging.ranks >= rank, states_staged = kOneState || work.staging.states >= state;
  const int pieces = work.geometry.pieces[pair];
  int buffer = 0;

  for (int piece = warp; kWhole ? piece == warp : piece < pieces; piece += warps) {
    const bool exists = piece < pieces && order.exists(piece);
    if (!kWhole && !exists) break;
    const Steps steps(order, L::kPiece, piece, up.place * kRun, exists ? kRun : 0);
    const typename Rows::Source source(static_cast<const T*>(shared.turn->x_dbl), work.call.x_dbl.row, order, exists ? piece : 0);
    // To the slab's row at some steps of the piece. The address is found anew each time: kept, it would cost registers.
    const auto add_to_slab = [&](int row, int step, const auto& sums, bool first) {
      if (!exists) return;
      S* at = static_cast<S*>(shared.turn->slab) + (row * work.geometry.total[pair] + order.number(piece)) * L::kPiece + step;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(sums) / sizeof(S)); ++i) at[i] = first ? sums[i] : at[i] + sums[i];
    };
    if (low_rank_staged) rows.stage_low_rank(source, 0, rank, work.staging);
    if (states_staged) rows.stage_states(source, 0, rank, state, work.staging);
    Run<S> v[2];  // becomes its own gradient
    step_sizes<T, 4>(v, rows, weights, source, work.staging, low_rank_staged, 0, 1, work.parameters, k * D + first_channel + group,
                     present, rank);
    // With many states, what waits for the end of their loop waits in shared memory: v of the second channel, then the slopes.
    if constexpr (!kOneState) store_run<S>(gradients.place(1), v[1], kRun, true);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int in_block = c * L::kGroups + group;
      const int d = first_channel + in_block;
      S* const channel_parameters = gradients.d_weight + in_block * per_channel;
      Run<S> dt, slope, x, g, sum_B, sum_A;
      if constexpr (!kOneState)
        if (c == 1) load_run<S>(v[1], gradients.place(1), kRun, true);
      x_tile.read_one(x, c, 0, group, work.geometry.channel_pitch, order, steps);
      d_y_tile.read_one(g, c, 0, group, work.geometry.channel_pitch, order, steps);
      S sum = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const Softplus<S> soft = softplus<T>(v[c][i]);
        dt[i] = i < steps.count ? soft.value : S(0);
        slope[i] = i < steps.count ? soft.slope : S(0);
        sum += dt[i];
        sum_B[i] = sum_A[i] = S(0);
      }
      if constexpr (!kOneState) store_run<S>(gradients.place(c), slope, kRun, true);
#pragma unroll 1
      for (int n = 0; n < state; ++n) {
        const int staged_row = states_staged ? n : n % work.staging.states;
        if (!states_staged && staged_row == 0) rows.stage_states(source, n, rank, state, work.staging);
        Run<S> B, C, a, ah, d_B, d_C;
        rows.read_state(B, staged_row, up.place);
        rows.read_state(C, work.staging.states + staged_row, up.place);
        const S A2 = shared.A2[n * L::kChannels + in_block];
        S q = 0, r = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          a[i] = exp2_of<T>(dt[i] * A2);
          q = a[i] * q + dt[i] * x[i] * B[i];
        }
#pragma unroll
        for (int i = kRun - 1; i >= 0; --i) r = a[i] * (r + C[i] * g[i]);
        S factor = exp2_of<T>(sum * A2), factor_back = factor, entering, leaving;
        up.scan(factor, q);
        down.scan(factor_back, r);
        if constexpr (kWhole) {
          S* mine = shared.exchanged + ((buffer * warps + warp) * L::kGroups + group) * 4;
          if (up.last()) mine[0] = factor, mine[1] = q;
          if (down.last()) mine[2] = r;
          __syncthreads();
          const S* all = shared.exchanged + (buffer * warps * L::kGroups + group) * 4;
          entering = leaving = S(0);
          for (int other = 0; other < warp; ++other) entering = all[other * L::kGroups * 4] * entering + all[other * L::kGroups * 4 + 1];
          for (int other = warps - 1; other > warp; --other) leaving = all[other * L::kGroups * 4] * leaving + all[other * L::kGroups * 4 + 2];
          buffer ^= 1;
        } else {
          const int64_t at = (order.number(piece) * state + n) * D + d;
          entering = present[c] ? static_cast<const S*>(shared.turn->states)[at] : S(0);
          leaving = present[c] ? static_cast<const S*>(shared.turn->adjoints)[at] : S(0);
        }
        const S factor_up = up.before(factor, 1), sum_up = up.before(q, 1);
        const S factor_down = down.before(factor_back, 1), sum_down = down.before(r, 1);
        S h = up.first() ? entering : factor_up * entering + sum_up;
        S mu = down.first() ? leaving : factor_down * leaving + sum_down;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          ah[i] = a[i] * h;
          h = ah[i] + dt[i] * x[i] * B[i];
          d_C[i] = g[i] * h;
        }
        if constexpr (kOneState) add_up(gradients.place(1), d_C, c);
        S d_A = 0;
#pragma unroll
        for (int i = kRun - 1; i >= 0; --i) {
          const S lambda = mu + C[i] * g[i];
          mu = a[i] * lambda;
          const S product = lambda * ah[i];
          sum_B[i] += lambda * B[i];
          sum_A[i] += A2 * product;
          d_A += dt[i] * product;
          d_B[i] = lambda * dt[i] * x[i];
        }
        d_A = sum_over<L::kLanes>(d_A);
        if (up.place == 0) channel_parameters[rank + 1 + n] += d_A;
        if constexpr (kOneState) {
          add_up(gradients.place(0), d_B, c);
        } else {
          const S sum_d_B[1] = {sum_over_groups(d_B, group)}, sum_d_C[1] = {sum_over_groups(d_C, group)};
          add_to_slab(rank + n, up.place * kRun + group, sum_d_B, first_set && c == 0);
          add_to_slab(rank + state + n, up.place * kRun + group, sum_d_C, first_set && c == 0);
        }
      }
      if constexpr (!kOneState) load_run<S>(slope, gradients.place(c), kRun, true);
      S d_bias = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        v[c][i] = slope[i] * (S(1 / kLog2E) * sum_A[i] + x[i] * sum_B[i]);
        d_bias += v[c][i];
        sum_B[i] *= dt[i];  // now d_x
      }
      if constexpr (!kOneState) store_run<S>(gradients.place(c), v[c], kRun, true);
      S* d_x_tile = shared.d_x + in_block * work.geometry.channel_pitch;
      if (pass == Ss2dPass::first) {
        steps.each(order, [&](int i, int at) { d_x_tile[at] = sum_B[i]; });
      } else if (pass == Ss2dPass::add) {
        steps.each(order, [&](int i, int at) { d_x_tile[at] += sum_B[i]; });
      } else {  // one skip coefficient serves the four directions; along a row the steps are neighbours in the map
        steps.each(order, [&](int i, int at) { sum_B[i] += d_x_tile[at]; });
        S d_Ds = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) d_Ds += g[i] * x[i];
        d_Ds = sum_over<L::kLanes>(d_Ds);
        if (up.place == 0) channel_parameters[rank + 1 + state] += d_Ds;
        if (present[c]) {
          const S* Ds = static_cast<const S*>(work.parameters.Ds) + d;
          const S skip = Ds[0] + Ds[D] + Ds[2 * D] + Ds[3 * D];
#pragma unroll
          for (int i = 0; i < kRun; ++i) sum_B[i] += skip * g[i];
          store_run<T>(work.out, shared.turn->clip + d * sizes.length() + steps.map_position(order), sum_B, steps.count, work.vectors,
                       work.out_as_state);
        }
      }
      d_bias = sum_over<L::kLanes>(d_bias);
      if (up.place == 0) channel_parameters[rank] += d_bias;
    }
    __syncwarp();
    if constexpr (kOneState) {  // lane: a step; sums over the groups
      const S* column = gradients.d_v + lane;
      S sum_d_B[1] = {column[0]}, sum_d_C[1] = {column[L::kGroups * LowRankGradients<T>::kPitch]};
#pragma unroll
      for (int i = 1; i < L::kGroups; ++i) {
        sum_d_B[0] += column[i * LowRankGradients<T>::kPitch];
        sum_d_C[0] += column[(L::kGroups + i) * LowRankGradients<T>::kPitch];
      }
      add_to_slab(rank, lane, sum_d_B, first_set);
      add_to_slab(rank + 1, lane, sum_d_C, first_set);
      __syncwarp();
      store_run<S>(gradients.place(0), v[0], kRun, true);
      store_run<S>(gradients.place(1), v[1], kRun, true);
      __syncwarp();
    } else {
      load_run<S>(v[0], gradients.place(0), kRun, true);
      load_run<S>(v[1], gradients.place(1), kRun, true);
    }
    for (int first = 0; first < rank; first += work.staging.ranks) {
      if (!low_rank_staged) rows.stage_low_rank(source, first, rank, work.staging);
      gradients.add_to_weights(v, rows, first, first + work.staging.ranks < rank ? first + work.staging.ranks : rank);
    }
    gradients.each_row(v, LowRankBackWeights<T>{shared.back_weights}, rank,
                       [&](int r, int step, const auto& sums) { add_to_slab(r, step, sums, first_set); });
    __syncwarp();
  }
}

// Where a position of the map stands in a row of the slab of direction k: `along` and `across` the lines of its order.
DASS_DEVICE int64_t slab_step(const Geometry& g, int k, unsigned row, unsigned column) {
  const bool rows = k % 2 == kRows, reversed = k >= 2;
  constexpr int piece = Layout<4>::kPiece;
  const unsigned along = rows ? column : row, across = rows ? row : column;
  const unsigned all_along = static_cast<unsigned>(rows ? g.width : g.height), all_across = static_cast<unsigned>(rows ? g.height : g.width);
  const unsigned tile_along = rows ? g.tile_width : g.tile_height, tile_across = rows ? g.tile_height : g.tile_width;
  const unsigned tiles_along = static_cast<unsigned>(rows ? g.tiles_across : g.tiles_down);
  const unsigned tiles_over = static_cast<unsigned>(rows ? g.tiles_down : g.tiles_across);
  const auto within = [&](unsigned at, unsigned start, unsigned tile, unsigned all) {  // its tile, counted in the order of the scan
    const unsigned size = all - start < tile ? all - start : tile;
    return reversed ? size - 1 - (at - start) : at - start;
  };
  const unsigned t = along / tile_along, o = across / tile_across;
  const unsigned step = within(along, t * tile_along, tile_along, all_along);
  if (g.per_line[k % 2]) {
    const unsigned line = reversed ? all_across - 1 - across : across, tile = reversed ? tiles_along - 1 - t : t;
    return (static_cast<int64_t>(line) * tiles_along + tile) * g.per_line[k % 2] * piece + step;
  }
  return static_cast<int64_t>(reversed ? tiles_over - 1 - o : o) * g.pieces[k % 2] * piece +
         static_cast<int64_t>(within(across, o * tile_across, tile_across, all_across)) * all_along + step;
}

constexpr int kSlabThreads = 256;

// d_x_dbl, (batch, 4, rows, map): the slabs added up in their order and put back into the order of the map.
template <typename T>
__global__ void __launch_bounds__(kSlabThreads) ss2d_sum_slabs_kernel(const Ss2dBackwardWork work) {
  using S = State<T>;
  const Ss2dSizes& sizes = work.call.sizes;
  const Geometry& g = work.geometry;
  const unsigned share = work.position_blocks, line = blockIdx.x / share;  // line: batch, direction and row of x_dbl
  const unsigned row = line % static_cast<unsigned>(sizes.rows()), k = line / static_cast<unsigned>(sizes.rows()) % 4;
  const int64_t b = line / static_cast<unsigned>(sizes.rows()) / 4;
  const int64_t position = int64_t{blockIdx.x % share} * kSlabThreads + threadIdx.x;
  if (position >= sizes.length()) return;
  const int pair = k % 2;
  const int64_t steps = g.total[pair] * Layout<4>::kPiece, y = position / g.width;
  const S* from = static_cast<const S*>(work.slab[pair]) + ((b * 2 + k / 2) * sizes.rows() + row) * steps +
                  slab_step(g, static_cast<int>(k), static_cast<unsigned>(y), static_cast<unsigned>(position - y * g.width));
  S sum = 0;
  for (int64_t slab = 0; slab < work.slabs; ++slab) sum += from[slab * sizes.batch * 2 * sizes.rows() * steps];
  static_cast<T*>(work.call.d_x_dbl)[line * sizes.length() + position] = static_cast<T>(sum);
}

template <typename T>
void sum_slabs(const Ss2dBackwardWork& work, const Device& device) {
  launch(ss2d_sum_slabs_kernel<T>, work.call.sizes.batch * 4 * work.call.sizes.rows() * work.position_blocks, kSlabThreads, 0,
         device, work);
}

template <typename T, bool kWhole, bool kOneState>
__global__ void __launch_bounds__(backward_warps(kOneState) * kWarp) ss2d_backward_kernel(const Ss2dBackwardWork work) {
  using S = State<T>;
  using L = Layout<4>;
  const Ss2dSizes& sizes = work.call.sizes;
  const int rank = static_cast<int>(sizes.rank), state = static_cast<int>(sizes.state), per_channel = rank + state + 2;
  const int warps = blockDim.x / kWarp;
  const int slabs = static_cast<int>(work.slabs), tiles = static_cast<int>(work.geometry.tiles());
  const bool split = work.partial;
  const Turns turns(split);
  const int slab = turns.rest % slabs, part = turns.rest / slabs, tile = part % tiles, b = part / tiles;
  const int64_t D = sizes.channels;
  const bool wide = sizes.out != sizes.io;
  const Ss2dBackwardShared<T, kWhole> shared(shared_memory<unsigned char>(), warps, work.staging, work.geometry, rank, state, wide);

#pragma unroll 1
  for (int set = 0; set < work.sets; ++set) {
    const int first_channel = (slab * work.sets + set) * L::kChannels;
    if (first_channel >= D && set > 0) break;
    const int present = static_cast<int>(first_channel >= D                    ? 0
                                         : D - first_channel < L::kChannels ? D - first_channel
                                                                            : L::kChannels);
    __syncthreads();
    const Order rows(work.geometry, 0, tile);
    MapTile<T, 4>{shared.x, false}.load(work.call.x, b, first_channel, present, 1, work.geometry, rows);
    MapTile<T, 4>{shared.d_y, wide}.load(work.call.d_y, b, first_channel, present, 1, work.geometry, rows);
#pragma unroll 1
    for (int turn = turns.begin; turn < turns.end; ++turn) {
      const int k = Turns::direction(turn), pair = k % 2;
      __syncthreads();
      if (split && turn == 3) clear_tile(shared.d_x, L::kChannels, work.geometry);
      if (threadIdx.x == 0) {
        const int64_t total = work.geometry.total[pair], clip = 2 * b + k / 2, before = kWhole ? 0 : clip * total * state * D;
        *shared.turn = {Order(work.geometry, k, tile),
                        static_cast<const T*>(work.call.x_dbl.data) + b * work.call.x_dbl.batch + k * work.call.x_dbl.direction,
                        b * D * sizes.length(),
                        static_cast<S*>(work.slab[pair]) + (slab * sizes.batch * 2 + clip) * sizes.rows() * total * L::kPiece,
                        static_cast<const S*>(work.states[pair]) + before, static_cast<const S*>(work.adjoints[pair]) + before};
      }
      load_factors<T>(shared.A2, work.parameters.A_logs, k * D + first_channel, present, L::kChannels, state);
      LowRankWeights<T, 4>{shared.weights}.load(work.parameters.dt_weight, k * D + first_channel, present, 1, rank);
      LowRankBackWeights<T>{shared.back_weights}.load(work.parameters.dt_weight, k * D + first_channel, present, rank);
      for (int i = threadIdx.x; i < warps * L::kChannels * per_channel; i += blockDim.x) shared.parameters[i] = S(0);
      __syncthreads();
      ss2d_backward_direction<T, kWhole, kOneState>(
          work, shared, k, turn == 3 ? Ss2dPass::last : turn == turns.begin ? Ss2dPass::first : Ss2dPass::add, set == 0, first_channel);
      __syncthreads();
      if (split && turn < 3)
        write_tile(shared.d_x, static_cast<S*>(work.partial) + ((k * sizes.batch + b) * D + first_channel) * sizes.length(), present,
                   work.geometry, Order(work.geometry, 0, tile));
      for (int i = threadIdx.x; i < present * per_channel; i += blockDim.x) {
        const int c = i / per_channel, what = i % per_channel;
        const int d = first_channel + c;
        S sum = 0;
        for (int warp = 0; warp < warps; ++warp) sum += shared.parameters[(warp * L::kChannels + c) * per_channel + what];
        if (what < rank) static_cast<S*>(work.part_weight)[((part * int64_t{4} + k) * D + d) * rank + what] = sum;
        else if (what == rank) static_cast<S*>(work.part_bias)[(part * int64_t{4} + k) * D + d] = sum;
        else if (what <= rank + state)  // d_A_logs = A d_A; A2 is A log2(e)
          static_cast<S*>(work.part_A)[((part * int64_t{4} + k) * D + d) * state + what - rank - 1] =
              sum * shared.A2[(what - rank - 1) * L::kChannels + c] * S(1 / kLog2E);
        else if (turn == 3) static_cast<S*>(work.part_Ds)[part * D + d] = sum;
      }
    }
  }
}

}  // namespace dass
