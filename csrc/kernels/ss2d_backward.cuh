// The four-direction scan of a map, backward: equations (16) of SCAN.md.
//
// The block's shape, the order of the directions and the pieces are those of ss2d_forward.cuh. A block goes through its sets of
// channels one after the other. In each piece it runs the states forward again, then mu backward, over the same factors. What
// enters a piece from either side: on a map that is one set of pieces, the warps exchange it; otherwise it comes from the
// adjoint summary and carry.cuh.
//
// d_x is summed over the directions in shared memory and written once. The gradients of x_dbl are summed over the channels of a
// set by shuffles, and over the sets in a slab of the block's own, in the order of the scan; those of the parameters over the
// block's pieces. Slabs and partial results are added up afterwards. No atomics: every order is fixed by the shapes.
#pragma once

#include "kernels/ss2d_forward.cuh"

namespace dass {

struct Ss2dBackwardWork {
  Ss2dBackward call;
  Ss2dParameters parameters{};
  Geometry geometry;
  int64_t slabs = 0;     // blocks that share the channels of a tile
  int64_t sets = 0;      // of Layout::kChannels channels, for a block
  int capacity = 0, pitch = 0;
  bool vectors = false;
  const void *states[2] = {nullptr, nullptr}, *adjoints[2] = {nullptr, nullptr};  // what enters each piece, as in the summary
  void* slab[2] = {nullptr, nullptr};  // by pair: (slabs, batch, 2, rows, pieces, kPiece)
  // (batch, tiles, 4, channels[, rank or state]); of Ds without the 4
  void *part_weight = nullptr, *part_bias = nullptr, *part_A = nullptr, *part_Ds = nullptr;
};

// Shared memory of a block.
template <typename T, bool kWhole>
struct Ss2dBackwardShared {
  using S = State<T>;
  using L = Layout<4>;
  S *staged;     // (warps, capacity, kPiece)
  S *d_y;        // (kChannels, pitch)
  S *d_x;        // (kChannels, pitch)
  T *x;          // (kChannels, pitch)
  S *A2;         // (state, kChannels): of the direction at hand
  S *exchanged;  // (2 buffers, warps, kChannels, 3): factor, sum and adjoint sum of a piece; whole map only
  S *parameters; // (warps, kChannels, rank + 1 + state + 1): what the warp's pieces add to d_dt_weight, d_dt_bias, d_A, d_Ds

  __host__ __device__ static size_t layout(Ss2dBackwardShared* shared, unsigned char* memory, int warps, int capacity, int pitch,
                                           int rank, int state) {
    size_t used = 0;
    const auto take = [&](size_t count, size_t size) {
      unsigned char* at = memory + used;
      used += (count * size + 15) / 16 * 16;
      return at;
    };
    Ss2dBackwardShared all;
    const size_t map = static_cast<size_t>(L::kChannels) * pitch;
    all.staged = reinterpret_cast<S*>(take(static_cast<size_t>(warps) * capacity * L::kPiece, sizeof(S)));
    all.d_y = reinterpret_cast<S*>(take(map, sizeof(S)));
    all.d_x = reinterpret_cast<S*>(take(map, sizeof(S)));
    all.x = reinterpret_cast<T*>(take(map, sizeof(T)));
    all.A2 = reinterpret_cast<S*>(take(static_cast<size_t>(state) * L::kChannels, sizeof(S)));
    all.exchanged = reinterpret_cast<S*>(take(kWhole ? static_cast<size_t>(6) * warps * L::kChannels : 0, sizeof(S)));
    all.parameters = reinterpret_cast<S*>(take(static_cast<size_t>(warps) * L::kChannels * (rank + state + 2), sizeof(S)));
    if (shared) *shared = all;
    return used;
  }
};

// Sums over the eight groups of a warp; afterwards lane (group, place) holds the sum for step `group` of the run at `place`.
template <typename S>
DASS_DEVICE S sum_over_groups(const Run<S>& run, int group) {
  static_assert(Layout<4>::kGroups == kRun);
  S half[4], quarter[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool upper = group & 4;
    half[i] = (upper ? run[i + 4] : run[i]) + __shfl_xor_sync(kAllLanes, upper ? run[i] : run[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool upper = group & 2;
    quarter[i] = (upper ? half[i + 2] : half[i]) + __shfl_xor_sync(kAllLanes, upper ? half[i] : half[i + 2], 8);
  }
  const bool upper = group & 1;
  return (upper ? quarter[1] : quarter[0]) + __shfl_xor_sync(kAllLanes, upper ? quarter[0] : quarter[1], 4);
}

template <typename T, bool kWhole, bool kDown>
DASS_DEVICE void ss2d_backward_direction(const Ss2dBackwardWork& work, const Ss2dBackwardShared<T, kWhole>& shared,
                                         const Order& order, int pair, Ss2dPass pass, int64_t b, int64_t slab, bool first_set,
                                         int64_t first_channel) {
  using S = State<T>;
  using L = Layout<4>;
  const Ss2dSizes& sizes = work.call.sizes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Lanes<L::kLanes, kDown> up{lane % L::kLanes};     // of the states
  const Lanes<L::kLanes, !kDown> down{lane % L::kLanes};  // of mu
  const int group = lane / L::kLanes;
  const int64_t D = sizes.channels, N = sizes.state, k = pair + (kDown ? 2 : 0);
  const int rank = static_cast<int>(sizes.rank), state = static_cast<int>(sizes.state);
  const LowRank& low_rank = work.call.x_dbl;
  const T* x_dbl = static_cast<const T*>(low_rank.data) + b * low_rank.batch + k * low_rank.direction;
  S* staged = shared.staged + warp * work.capacity * L::kPiece;
  const bool all_staged = work.capacity >= rank + 2 * state;
  const int in_block[2] = {group, L::kGroups + group};
  const int64_t d[2] = {first_channel + in_block[0], first_channel + in_block[1]};
  const int per_channel = rank + state + 2;
  S* parameters[2] = {shared.parameters + (warp * L::kChannels + in_block[0]) * per_channel,
                      shared.parameters + (warp * L::kChannels + in_block[1]) * per_channel};
  const int64_t row_steps = work.geometry.total[pair] * L::kPiece;  // of a row of the slab
  S* slab_rows = static_cast<S*>(work.slab[pair]) +
                 ((slab * sizes.batch + b) * 2 + (kDown ? 1 : 0)) * sizes.rows() * row_steps + lane % L::kLanes * kRun + group;
  const int pieces = work.geometry.pieces[pair];
  int buffer = 0;

  for (int piece = warp; kWhole ? piece == warp : piece < pieces; piece += warps) {
    const bool exists = piece < pieces && order.exists(piece);
    if (!kWhole && !exists) break;
    const Steps steps(order, L::kPiece, piece, up.place * kRun, exists ? kRun : 0);
    const int64_t number = order.number(piece);
    const auto add_to_row = [&](int row, S value) {
      S* at = slab_rows + row * row_steps + number * L::kPiece;
      if (exists) *at = first_set ? value : *at + value;
    };
    if (all_staged) stage_rows<T, L::kPiece>(staged, x_dbl, low_rank.row, 0, rank + 2 * state, order, piece);
    Run<S> dt[2], slope[2], x[2], g[2], sum_B[2], sum_A[2];
    step_sizes<T, L::kPiece>(dt, slope, staged, work.capacity, all_staged, x_dbl, low_rank.row, order, piece, steps, up.place,
                             work.parameters, k, D, d, rank);
    S sum[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      tile_run<T>(x[c], shared.x + in_block[c] * work.pitch, order, steps);
      tile_run<S>(g[c], shared.d_y + in_block[c] * work.pitch, order, steps);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        sum[c] += dt[c][i];
        sum_A[c][i] = sum_B[c][i] = S(0);
      }
    }
    for (int n = 0; n < state; ++n) {
      const StateRows<T, L::kPiece> rows(staged, work.capacity, all_staged, x_dbl, low_rank.row, order, piece, rank, state, n);
      Run<S> B, C, a[2], d_B, d_C;
      staged_run<S>(B, rows.B + up.place * kRun);
      staged_run<S>(C, rows.C + up.place * kRun);
      S factor[2], sum_q[2], factor_back[2], sum_r[2], entering[2], leaving[2], A2[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        A2[c] = shared.A2[n * L::kChannels + in_block[c]];
        S q = 0, r = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) a[c][i] = exp2_of<T>(dt[c][i] * A2[c]);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int j = up.step(i), m = down.step(i);
          q = a[c][j] * q + dt[c][j] * x[c][j] * B[j];
          r = a[c][m] * (r + C[m] * g[c][m]);
        }
        factor[c] = factor_back[c] = exp2_of<T>(sum[c] * A2[c]);
        sum_q[c] = q;
        sum_r[c] = r;
        up.scan(factor[c], sum_q[c]);
        down.scan(factor_back[c], sum_r[c]);
      }
      if constexpr (kWhole) {
        S* mine = shared.exchanged + (buffer * warps + warp) * L::kChannels * 3;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          S* at = mine + (c * L::kGroups + group) * 3;
          if (up.last()) at[0] = factor[c], at[1] = sum_q[c];
          if (down.last()) at[2] = sum_r[c];
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const S* all = shared.exchanged + (buffer * warps * L::kChannels + c * L::kGroups + group) * 3;
          S h = 0, mu = 0;
          for (int other = 0; other < (kDown ? warps - 1 - warp : warp); ++other) {
            const S* of = all + (kDown ? warps - 1 - other : other) * L::kChannels * 3;
            h = of[0] * h + of[1];
          }
          for (int other = 0; other < (kDown ? warp : warps - 1 - warp); ++other) {
            const S* of = all + (kDown ? other : warps - 1 - other) * L::kChannels * 3;
            mu = of[0] * mu + of[2];
          }
          entering[c] = h;
          leaving[c] = mu;
        }
        buffer ^= 1;
      } else {
        const int64_t at = (((b * 2 + (kDown ? 1 : 0)) * work.geometry.total[pair] + number) * N + n) * D;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          entering[c] = d[c] < D ? static_cast<const S*>(work.states[pair])[at + d[c]] : S(0);
          leaving[c] = d[c] < D ? static_cast<const S*>(work.adjoints[pair])[at + d[c]] : S(0);
        }
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) d_B[i] = d_C[i] = S(0);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const S factor_up = up.before(factor[c], 1), sum_up = up.before(sum_q[c], 1);
        const S factor_down = down.before(factor_back[c], 1), sum_down = down.before(sum_r[c], 1);
        S h = up.first() ? entering[c] : factor_up * entering[c] + sum_up;
        S mu = down.first() ? leaving[c] : factor_down * leaving[c] + sum_down;
        Run<S> ah;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int j = up.step(i);
          ah[j] = a[c][j] * h;
          h = ah[j] + dt[c][j] * x[c][j] * B[j];
          d_C[j] += g[c][j] * h;
        }
        S d_A = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int j = down.step(i);
          const S lambda = mu + C[j] * g[c][j];
          mu = a[c][j] * lambda;
          const S product = lambda * ah[j];
          sum_B[c][j] += lambda * B[j];
          sum_A[c][j] += A2[c] * product;
          d_A += dt[c][j] * product;
          d_B[j] += lambda * dt[c][j] * x[c][j];
        }
        d_A = sum_over<L::kLanes>(d_A);
        if (up.place == 0) parameters[c][rank + 1 + n] += d_A;
      }
      add_to_row(rank + n, sum_over_groups(d_B, group));
      add_to_row(rank + state + n, sum_over_groups(d_C, group));
    }
    // d_x, and d_v in the place of the slope.
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      S skip = 0, d_bias = 0, d_Ds = 0;
      if (pass == Ss2dPass::last && d[c] < D)
        for (int other = 0; other < 4; ++other) skip += static_cast<const S*>(work.parameters.Ds)[other * D + d[c]];
      Run<S> d_x;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        d_x[i] = skip * g[c][i] + dt[c][i] * sum_B[c][i];
        slope[c][i] = i < steps.count ? slope[c][i] * (S(1 / kLog2E) * sum_A[c][i] + x[c][i] * sum_B[c][i]) : S(0);
        d_bias += slope[c][i];
        d_Ds += g[c][i] * x[c][i];
      }
      S* d_x_tile = shared.d_x + in_block[c] * work.pitch;
      if (pass != Ss2dPass::first) steps.each(order, [&](int i, int at) { d_x[i] += d_x_tile[at]; });
      if (pass != Ss2dPass::last) {
        steps.each(order, [&](int i, int at) { d_x_tile[at] = d_x[i]; });
      } else if (d[c] < D) {  // along rows: consecutive places of the map
        store_run<T>(static_cast<T*>(work.call.d_x) + (b * D + d[c]) * sizes.length() + steps.map_position(order), d_x, steps.count,
                     work.vectors);
      }
      d_bias = sum_over<L::kLanes>(d_bias);
      d_Ds = sum_over<L::kLanes>(d_Ds);
      if (up.place == 0) {
        parameters[c][rank] += d_bias;
        if (pass == Ss2dPass::last) parameters[c][rank + 1 + state] += d_Ds;
      }
    }
    const S* weight = static_cast<const S*>(work.parameters.dt_weight) + k * D * rank;
    for (int first = 0; first < rank; first += work.capacity) {
      const int count = rank - first < work.capacity ? rank - first : work.capacity;
      if (!all_staged) stage_rows<T, L::kPiece>(staged, x_dbl, low_rank.row, first, count, order, piece);
      for (int r = 0; r < count; ++r) {
        Run<S> at_steps, d_low_rank;
        staged_run<S>(at_steps, staged + r * L::kPiece + up.place * kRun);
#pragma unroll
        for (int i = 0; i < kRun; ++i) d_low_rank[i] = S(0);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const S w = d[c] < D ? weight[d[c] * rank + first + r] : S(0);
          S d_weight = 0;
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            d_low_rank[i] += w * slope[c][i];
            d_weight += slope[c][i] * at_steps[i];
          }
          d_weight = sum_over<L::kLanes>(d_weight);
          if (up.place == 0) parameters[c][first + r] += d_weight;
        }
        add_to_row(first + r, sum_over_groups(d_low_rank, group));
      }
    }
  }
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kBlockWarps * kWarp) ss2d_backward_kernel(const Ss2dBackwardWork work) {
  using S = State<T>;
  using L = Layout<4>;
  const Ss2dSizes& sizes = work.call.sizes;
  const int rank = static_cast<int>(sizes.rank), state = static_cast<int>(sizes.state), per_channel = rank + state + 2;
  const int warps = blockDim.x / kWarp;
  int64_t index = blockIdx.x;
  const int64_t slab = index % work.slabs;
  index /= work.slabs;
  const int64_t tile = index % work.geometry.tiles(), b = index / work.geometry.tiles(), D = sizes.channels;
  const int64_t part = b * work.geometry.tiles() + tile;
  Ss2dBackwardShared<T, kWhole> shared;
  shared.layout(&shared, shared_memory<unsigned char>(), warps, work.capacity, work.pitch, rank, state);

  for (int64_t set = 0; set < work.sets; ++set) {
    const int64_t first_channel = (slab * work.sets + set) * L::kChannels;
    const int present = static_cast<int>(first_channel >= D                    ? 0
                                         : D - first_channel < L::kChannels ? D - first_channel
                                                                            : L::kChannels);
    const Order rows(work.geometry, kRows, tile);
    __syncthreads();
    load_map_tile<T>(shared.x, work.pitch, L::kChannels, present, work.call.x, b, first_channel, work.geometry, rows, false);
    load_map_tile<T>(shared.d_y, work.pitch, L::kChannels, present, work.call.d_y, b, first_channel, work.geometry, rows,
                     sizes.out != sizes.io);
    for (int turn = 0; turn < 4; ++turn) {
      const int pair = turn < 2 ? kColumns : kRows;
      const bool reversed = turn % 2;
      const int64_t k = pair + 2 * reversed;
      __syncthreads();
      for (int i = threadIdx.x; i < warps * L::kChannels * per_channel; i += blockDim.x) shared.parameters[i] = S(0);
      for (int i = threadIdx.x; i < state * L::kChannels; i += blockDim.x) {
        const int64_t d = first_channel + i % L::kChannels, n = i / L::kChannels;
        shared.A2[i] = i % L::kChannels < present
                           ? base2_factor<T>(static_cast<const S*>(work.parameters.A_logs)[(k * D + d) * sizes.state + n], true)
                           : S(0);
      }
      __syncthreads();
      const Order order(work.geometry, pair, tile);
      const Ss2dPass pass = turn == 0 ? Ss2dPass::first : turn < 3 ? Ss2dPass::add : Ss2dPass::last;
      if (reversed) ss2d_backward_direction<T, kWhole, true>(work, shared, order, pair, pass, b, slab, set == 0, first_channel);
      else ss2d_backward_direction<T, kWhole, false>(work, shared, order, pair, pass, b, slab, set == 0, first_channel);
      __syncthreads();
      for (int i = threadIdx.x; i < present * per_channel; i += blockDim.x) {
        const int c = i / per_channel, what = i % per_channel;
        const int64_t d = first_channel + c;
        S sum = 0;
        for (int warp = 0; warp < warps; ++warp) sum += shared.parameters[(warp * L::kChannels + c) * per_channel + what];
        if (what < rank) static_cast<S*>(work.part_weight)[((part * 4 + k) * D + d) * rank + what] = sum;
        else if (what == rank) static_cast<S*>(work.part_bias)[(part * 4 + k) * D + d] = sum;
        else if (what <= rank + state)  // d_A_logs = A d_A; A2 is A log2(e)
          static_cast<S*>(work.part_A)[((part * 4 + k) * D + d) * state + what - rank - 1] =
              sum * shared.A2[(what - rank - 1) * L::kChannels + c] * S(1 / kLog2E);
        else if (turn == 3) static_cast<S*>(work.part_Ds)[part * D + d] = sum;
      }
    }
  }
}

// Where a position of the map stands in a row of the slab. `along` and `across` are its coordinates along and across the lines
// of the order, and in this order the other sizes too.
DASS_DEVICE int64_t slab_step(const Geometry& g, int pair, int64_t along, int64_t across, int64_t tile_along, int64_t tile_across,
                              int64_t tiles_along) {
  const int64_t piece = Layout<4>::kPiece;
  if (g.per_line[pair])
    return ((across * tiles_along + along / tile_along) * g.per_line[pair]) * piece + along % tile_along;
  return across / tile_across * g.pieces[pair] * piece + across % tile_across * tile_along + along;
}
DASS_DEVICE int64_t slab_step(const Geometry& g, int pair, int64_t row, int64_t column) {
  return pair == kRows ? slab_step(g, pair, column, row, g.tile_width, g.tile_height, g.tiles_across)
                       : slab_step(g, pair, row, column, g.tile_height, g.tile_width, g.tiles_down);
}

constexpr int kSlabThreads = 256;

// d_x_dbl, (batch, 4, rows, map): the slabs added up in their order and put back into the order of the map.
template <typename T>
__global__ void __launch_bounds__(kSlabThreads) ss2d_sum_slabs_kernel(const Ss2dBackwardWork work) {
  using S = State<T>;
  const Ss2dSizes& sizes = work.call.sizes;
  const Geometry& g = work.geometry;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kSlabThreads + threadIdx.x;
  if (index >= sizes.batch * 4 * sizes.rows() * sizes.length()) return;
  T* out = static_cast<T*>(work.call.d_x_dbl) + index;
  const int64_t position = index % sizes.length();
  index /= sizes.length();
  const int64_t row = index % sizes.rows();
  index /= sizes.rows();
  const int64_t k = index % 4, b = index / 4;
  const int pair = k % 2;
  const int64_t steps = g.total[pair] * Layout<4>::kPiece;
  const S* from = static_cast<const S*>(work.slab[pair]) + ((b * 2 + k / 2) * sizes.rows() + row) * steps +
                  slab_step(g, pair, position / g.width, position % g.width);
  S sum = 0;
  for (int64_t slab = 0; slab < work.slabs; ++slab) sum += from[slab * sizes.batch * 2 * sizes.rows() * steps];
  *out = static_cast<T>(sum);
}

template <typename T>
void sum_slabs(const Ss2dBackwardWork& work, const Device& device) {
  const Ss2dSizes& sizes = work.call.sizes;
  const int64_t count = sizes.batch * 4 * sizes.rows() * sizes.length();
  launch(ss2d_sum_slabs_kernel<T>, (count + kSlabThreads - 1) / kSlabThreads, kSlabThreads, 0, device, work);
}

}  // namespace dass
