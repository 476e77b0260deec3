// What each piece of a map does to the states that enter it, and, for the backward pass, to the gradients that enter it from
// the other end: equation (11) of SCAN.md. For maps that do not fit a thread block; carry.cuh turns the result into what enters.
#pragma once

#include "kernels/ss2d_block.cuh"

namespace dass {

struct Ss2dSummaryWork {
  Ss2dSizes sizes;
  Map x, d_y;  // d_y: for the adjoint only
  LowRank x_dbl;
  Ss2dParameters parameters{};
  Geometry geometry;
  int64_t channel_blocks = 0;
  int capacity = 0, pitch = 0;
  // By pair: (batch, 2, pieces, state, channels) and (batch, 2, pieces, channels).
  void *states[2] = {nullptr, nullptr}, *adjoints[2] = {nullptr, nullptr}, *sums[2] = {nullptr, nullptr};
};

// Shared memory of a block: staged (of state dtype), x and, for the adjoint, d_y (of state dtype: it may be narrower).
template <typename T, int kLanes, bool kAdjoint>
struct Ss2dSummaryShared {
  using S = State<T>;
  using L = Layout<kLanes>;
  S *staged, *d_y;
  T* x;

  __host__ __device__ static size_t layout(Ss2dSummaryShared* shared, unsigned char* memory, int warps, int capacity, int pitch) {
    Ss2dSummaryShared all;
    size_t used = 0;
    const auto take = [&](size_t count, size_t size) {
      unsigned char* at = memory + used;
      used += (count * size + 15) / 16 * 16;
      return at;
    };
    all.staged = reinterpret_cast<S*>(take(static_cast<size_t>(warps) * capacity * L::kPiece, sizeof(S)));
    all.d_y = reinterpret_cast<S*>(take(kAdjoint ? static_cast<size_t>(L::kChannels) * pitch : 0, sizeof(S)));
    all.x = reinterpret_cast<T*>(take(static_cast<size_t>(L::kChannels) * pitch, sizeof(T)));
    if (shared) *shared = all;
    return used;
  }
};

template <typename T, int kLanes, bool kAdjoint, bool kDown>
DASS_DEVICE void ss2d_summary_direction(const Ss2dSummaryWork& work, const Ss2dSummaryShared<T, kLanes, kAdjoint>& shared,
                                        const Order& order, int pair, int64_t b, int64_t first_channel) {
  using S = State<T>;
  using L = Layout<kLanes>;
  const Ss2dSizes& sizes = work.sizes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Lanes<kLanes, kDown> lanes{lane % kLanes};
  const Lanes<kLanes, !kDown> back{lane % kLanes};
  const int group = lane / kLanes;
  const int64_t D = sizes.channels, N = sizes.state, k = pair + (kDown ? 2 : 0);
  const int rank = static_cast<int>(sizes.rank), state = static_cast<int>(sizes.state);
  const T* x_dbl = static_cast<const T*>(work.x_dbl.data) + b * work.x_dbl.batch + k * work.x_dbl.direction;
  S* staged = shared.staged + warp * work.capacity * L::kPiece;
  const bool all_staged = work.capacity >= rank + 2 * state;
  const int in_block[2] = {group, L::kGroups + group};
  const int64_t d[2] = {first_channel + in_block[0], first_channel + in_block[1]};

  for (int piece = warp; piece < work.geometry.pieces[pair]; piece += warps) {
    if (!order.exists(piece)) break;
    const Steps steps(order, L::kPiece, piece, lanes.place * kRun, kRun);
    if (all_staged) stage_rows<T, L::kPiece>(staged, x_dbl, work.x_dbl.row, 0, rank + 2 * state, order, piece);
    Run<S> dt[2], slope[2], dtx[2], g[2];
    step_sizes<T, L::kPiece>(dt, slope, staged, work.capacity, all_staged, x_dbl, work.x_dbl.row, order, piece, steps, lanes.place,
                             work.parameters, k, D, d, rank);
    S sum[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      tile_run<T>(dtx[c], shared.x + in_block[c] * work.pitch, order, steps);
      if constexpr (kAdjoint) tile_run<S>(g[c], shared.d_y + in_block[c] * work.pitch, order, steps);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        dtx[c][i] *= dt[c][i];
        sum[c] += dt[c][i];
      }
    }
    const int64_t slot = (b * 2 + (kDown ? 1 : 0)) * work.geometry.total[pair] + order.number(piece);
    for (int n = 0; n < state; ++n) {
      const StateRows<T, L::kPiece> rows(staged, work.capacity, all_staged, x_dbl, work.x_dbl.row, order, piece, rank, state, n);
      Run<S> B, C;
      staged_run<S>(B, rows.B + lanes.place * kRun);
      if constexpr (kAdjoint) staged_run<S>(C, rows.C + lanes.place * kRun);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const S A2 = d[c] < D ? base2_factor<T>(static_cast<const S*>(work.parameters.A_logs)[(k * D + d[c]) * N + n], true) : S(0);
        Run<S> a;
        S q = 0, r = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) a[i] = exp2_of<T>(dt[c][i] * A2);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int j = lanes.step(i), m = back.step(i);
          q = a[j] * q + dtx[c][j] * B[j];
          if constexpr (kAdjoint) r = a[m] * (r + C[m] * g[c][m]);
        }
        S factor = exp2_of<T>(sum[c] * A2), factor_back = factor;
        lanes.scan(factor, q);
        if (lanes.last() && d[c] < D) static_cast<S*>(work.states[pair])[(slot * N + n) * D + d[c]] = q;
        if constexpr (kAdjoint) {
          back.scan(factor_back, r);
          if (back.last() && d[c] < D) static_cast<S*>(work.adjoints[pair])[(slot * N + n) * D + d[c]] = r;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const S total = sum_over<kLanes>(sum[c]);
      if (lanes.first() && d[c] < D) static_cast<S*>(work.sums[pair])[slot * D + d[c]] = total;
    }
  }
}

template <typename T, int kLanes, bool kAdjoint>
__global__ void __launch_bounds__(kBlockWarps * kWarp) ss2d_summary_kernel(const Ss2dSummaryWork work) {
  using L = Layout<kLanes>;
  const Ss2dSizes& sizes = work.sizes;
  int64_t index = blockIdx.x;
  const int64_t first_channel = index % work.channel_blocks * L::kChannels;
  index /= work.channel_blocks;
  const int64_t tile = index % work.geometry.tiles(), b = index / work.geometry.tiles();
  Ss2dSummaryShared<T, kLanes, kAdjoint> shared;
  shared.layout(&shared, shared_memory<unsigned char>(), blockDim.x / kWarp, work.capacity, work.pitch);
  const int present = static_cast<int>(sizes.channels - first_channel < L::kChannels ? sizes.channels - first_channel : L::kChannels);
  const Order rows(work.geometry, kRows, tile), columns(work.geometry, kColumns, tile);
  load_map_tile<T>(shared.x, work.pitch, L::kChannels, present, work.x, b, first_channel, work.geometry, rows, false);
  if constexpr (kAdjoint)
    load_map_tile<T>(shared.d_y, work.pitch, L::kChannels, present, work.d_y, b, first_channel, work.geometry, rows,
                     sizes.out != sizes.io);
  __syncthreads();
  ss2d_summary_direction<T, kLanes, kAdjoint, false>(work, shared, columns, kColumns, b, first_channel);
  ss2d_summary_direction<T, kLanes, kAdjoint, true>(work, shared, columns, kColumns, b, first_channel);
  ss2d_summary_direction<T, kLanes, kAdjoint, false>(work, shared, rows, kRows, b, first_channel);
  ss2d_summary_direction<T, kLanes, kAdjoint, true>(work, shared, rows, kRows, b, first_channel);
}

}  // namespace dass
