// What each piece of a map does to the states that enter it and, for the backward pass, to the gradients that enter it from the
// other end: equation (11) of SCAN.md. For maps that do not fit a thread block; carry.cuh turns the result into what enters.
#pragma once

#include "kernels/ss2d_forward.cuh"

namespace dass {

struct Ss2dSummaryWork {
  Ss2dSizes sizes;
  Map x, d_y;  // d_y: for the adjoint only
  LowRank x_dbl;
  Ss2dParameters parameters;
  Geometry geometry;
  Staging staging;
  int64_t channel_blocks = 0;
  bool split = false;  // blocks walk one direction each
  // By pair: (batch, 2, pieces, state, channels) and (batch, 2, pieces, channels).
  void *states[2] = {nullptr, nullptr}, *adjoints[2] = {nullptr, nullptr}, *sums[2] = {nullptr, nullptr};
};

template <typename T, bool kAdjoint>
struct Ss2dSummaryShared {
  using S = State<T>;
  using L = Layout<4>;
  Order* order;
  S *staged, *weights, *A2;  // as in Ss2dForwardShared
  void *x, *d_y;             // MapTile
  size_t bytes;

  __host__ __device__ Ss2dSummaryShared(unsigned char* memory, int warps, const Staging& staging, const Geometry& g, int rank,
                                        int state, bool wide_gradient) {
    SharedLayout all(memory);
    order = all.template take<Order>(1);
    staged = all.template take<S>(static_cast<size_t>(warps) * LowRankRows<T, 4>::words(staging));
    weights = all.template take<S>(LowRankWeights<T, 4>::words(1, rank));
    A2 = all.template take<S>(static_cast<size_t>(state) * L::kChannels);
    x = all.template take<unsigned char>(MapTile<T, 4>::bytes(1, g.channel_pitch, false));
    d_y = all.template take<unsigned char>(kAdjoint ? MapTile<T, 4>::bytes(1, g.channel_pitch, wide_gradient) : 0);
    bytes = all.used();
  }
};

template <typename T, bool kAdjoint, bool kOneState>
DASS_DEVICE void ss2d_summary_direction(const Ss2dSummaryWork& work, const Ss2dSummaryShared<T, kAdjoint>& shared, int k, int b,
                                        int first_channel) {
  using S = State<T>;
  using L = Layout<4>;
  using Rows = LowRankRows<T, 4>;
  const Ss2dSizes& sizes = work.sizes;
  const Order& order = *shared.order;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Lanes<L::kLanes, false> lanes{lane % L::kLanes};
  const Lanes<L::kLanes, true> back{lane % L::kLanes};
  const int group = lane / L::kLanes, pair = k % 2, rank = static_cast<int>(sizes.rank);
  const int state = kOneState ? 1 : static_cast<int>(sizes.state);
  const int64_t D = sizes.channels;
  const bool present[2] = {first_channel + group < D, first_channel + L::kGroups + group < D};
  const Rows rows(shared.staged + warp * Rows::words(work.staging), work.staging);
  const LowRankWeights<T, 4> weights{shared.weights};
  const bool low_rank_staged = work.staging.ranks >= rank, states_staged = kOneState || work.staging.states >= state;
  const T* x_dbl = static_cast<const T*>(work.x_dbl.data) + b * work.x_dbl.batch + k * work.x_dbl.direction;

  for (int piece = warp; piece < work.geometry.pieces[pair] && order.exists(piece); piece += warps) {
    const Steps steps(order, L::kPiece, piece, lanes.place * kRun, kRun);
    const typename Rows::Source source(x_dbl, work.x_dbl.row, order, piece);
    if (low_rank_staged) rows.stage_low_rank(source, 0, rank, work.staging);
    if (states_staged) rows.stage_states(source, 0, rank, state, work.staging);
    Run<S> dt[2], dtx[2], g[2];
    step_sizes<T, 4>(dt, rows, weights, source, work.staging, low_rank_staged, 0, 1, work.parameters, k * D + first_channel + group,
                     present, rank);
    MapTile<T, 4>{shared.x, false}.read(dtx, 0, group, work.geometry.channel_pitch, order, steps);
    if constexpr (kAdjoint)
      MapTile<T, 4>{shared.d_y, sizes.out != sizes.io}.read(g, 0, group, work.geometry.channel_pitch, order, steps);
    S sum[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        dt[c][i] = i < steps.count ? softplus<T>(dt[c][i]).value : S(0);
        dtx[c][i] *= dt[c][i];
        sum[c] += dt[c][i];
      }
    const int64_t number = (int64_t{2} * b + k / 2) * work.geometry.total[pair] + order.number(piece);
#pragma unroll 1
    for (int n = 0; n < state; ++n) {
      const int staged_row = states_staged ? n : n % work.staging.states;
      if (!states_staged && staged_row == 0) rows.stage_states(source, n, rank, state, work.staging);
      Run<S> B, C;
      rows.read_state(B, staged_row, lanes.place);
      if constexpr (kAdjoint) rows.read_state(C, work.staging.states + staged_row, lanes.place);
      const int64_t at = (number * state + n) * D + first_channel + group;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const S A2 = shared.A2[n * L::kChannels + c * L::kGroups + group];
        Run<S> a;
        S q = 0, r = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          a[i] = exp2_of<T>(dt[c][i] * A2);
          q = a[i] * q + dtx[c][i] * B[i];
        }
        S factor = exp2_of<T>(sum[c] * A2), factor_back = factor;
        lanes.scan(factor, q);
        if (lanes.last() && present[c]) static_cast<S*>(work.states[pair])[at + c * L::kGroups] = q;
        if constexpr (kAdjoint) {
#pragma unroll
          for (int i = kRun - 1; i >= 0; --i) r = a[i] * (r + C[i] * g[c][i]);
          back.scan(factor_back, r);
          if (back.last() && present[c]) static_cast<S*>(work.adjoints[pair])[at + c * L::kGroups] = r;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const S total = sum_over<L::kLanes>(sum[c]);
      if (lanes.first() && present[c]) static_cast<S*>(work.sums[pair])[number * D + first_channel + c * L::kGroups + group] = total;
    }
  }
}

template <typename T, bool kAdjoint, bool kOneState>
__global__ void __launch_bounds__(kBlockWarps * kWarp) ss2d_summary_kernel(const Ss2dSummaryWork work) {
  using L = Layout<4>;
  const Ss2dSizes& sizes = work.sizes;
  const int state = static_cast<int>(sizes.state), rank = static_cast<int>(sizes.rank);
  const int channel_blocks = static_cast<int>(work.channel_blocks), tiles = static_cast<int>(work.geometry.tiles());
  const Turns turns(work.split);
  const int first_channel = turns.rest % channel_blocks * L::kChannels, part = turns.rest / channel_blocks;
  const int tile = part % tiles, b = part / tiles;
  const int present = static_cast<int>(sizes.channels - first_channel < L::kChannels ? sizes.channels - first_channel : L::kChannels);
  const bool wide = sizes.out != sizes.io;
  const Ss2dSummaryShared<T, kAdjoint> shared(shared_memory<unsigned char>(), blockDim.x / kWarp, work.staging, work.geometry, rank,
                                              state, wide);
  const Order rows(work.geometry, 0, tile);
  MapTile<T, 4>{shared.x, false}.load(work.x, b, first_channel, present, 1, work.geometry, rows);
  if constexpr (kAdjoint) MapTile<T, 4>{shared.d_y, wide}.load(work.d_y, b, first_channel, present, 1, work.geometry, rows);
#pragma unroll 1
  for (int turn = turns.begin; turn < turns.end; ++turn) {
    const int k = Turns::direction(turn);
    __syncthreads();
    if (threadIdx.x == 0) *shared.order = Order(work.geometry, k, tile);
    load_factors<T>(shared.A2, work.parameters.A_logs, k * sizes.channels + first_channel, present, L::kChannels, state);
    LowRankWeights<T, 4>{shared.weights}.load(work.parameters.dt_weight, k * sizes.channels + first_channel, present, 1, rank);
    __syncthreads();
    ss2d_summary_direction<T, kAdjoint, kOneState>(work, shared, k, b, first_channel);
  }
}

}  // namespace dass
