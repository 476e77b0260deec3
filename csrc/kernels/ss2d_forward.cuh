// The four-direction scan of a map, forward: equations (13) to (15) of SCAN.md, delta in registers only, y written once.
//
// A thread block owns some channels of one clip and either the whole map or a tile of it. x lies in shared memory for all four
// directions, the sum of their outputs beside it. Directions run in the order 1, 3, 0, 2: columns first, so that the last one
// walks along rows and writes y out as it goes. A piece (ss2d_block.cuh) belongs to the same warp and its steps to the same
// lanes in both directions of a pair, so only the change from columns to rows needs a barrier for y.
//
// Whole map: warps take consecutive pieces; they exchange what the pieces do to a state, one barrier for each state, and the
// last warp hands on what enters the next group of pieces. Tile: what enters each piece comes from a summary pass and carry.cuh.
#pragma once

#include "kernels/ss2d_block.cuh"

namespace dass {

struct Ss2dForwardWork {
  Ss2dForward call;
  Ss2dParameters parameters{};
  Geometry geometry;
  int64_t channel_blocks = 0;
  int rounds = 1;        // sets of Layout::kChannels channels that a block holds
  int capacity = 0;      // rows of x_dbl that a warp can stage
  int pitch = 0;         // of a channel in shared memory
  bool vectors = false;
  void* states[2] = {nullptr, nullptr};  // by pair: (batch, 2, pieces, state, channels): of the summary, then what enters
  void* sums[2] = {nullptr, nullptr};    // (batch, 2, pieces, channels)
};

// Shared memory of a block: A2, exchanged, carry, y, staged (of state dtype), then x.
template <typename T, int kLanes, bool kWhole>
struct Ss2dForwardShared {
  using S = State<T>;
  using L = Layout<kLanes>;
  S *A2;         // (state, channels): of the direction at hand
  S *exchanged;  // (2 buffers, warps, kChannels, 2): factor and sum of a piece; whole map only
  S *carry;      // (2 buffers, rounds, state, kChannels); whole map only
  S *y;          // (channels, pitch)
  S *staged;     // (warps, capacity, kPiece)
  T *x;          // (channels, pitch)

  __host__ __device__ static size_t layout(Ss2dForwardShared* shared, unsigned char* memory, int warps, int rounds, int capacity,
                                           int pitch, int state) {
    const int channels = rounds * L::kChannels;
    size_t used = 0;
    const auto take = [&](size_t count, size_t size) {
      unsigned char* at = memory + used;
      used += (count * size + 15) / 16 * 16;
      return at;
    };
    Ss2dForwardShared all;
    all.staged = reinterpret_cast<S*>(take(static_cast<size_t>(warps) * capacity * L::kPiece, sizeof(S)));
    all.y = reinterpret_cast<S*>(take(static_cast<size_t>(channels) * pitch, sizeof(S)));
    all.x = reinterpret_cast<T*>(take(static_cast<size_t>(channels) * pitch, sizeof(T)));
    all.A2 = reinterpret_cast<S*>(take(static_cast<size_t>(state) * channels, sizeof(S)));
    all.exchanged = reinterpret_cast<S*>(take(kWhole ? static_cast<size_t>(4) * warps * L::kChannels : 0, sizeof(S)));
    all.carry = reinterpret_cast<S*>(take(kWhole ? static_cast<size_t>(2) * rounds * state * L::kChannels : 0, sizeof(S)));
    if (shared) *shared = all;
    return used;
  }
};

enum class Ss2dPass { first, add, last };  // of the four directions: sets y, adds to it, writes it out

template <typename T, int kLanes, bool kWhole, bool kDown>
DASS_DEVICE void ss2d_forward_direction(const Ss2dForwardWork& work, const Ss2dForwardShared<T, kLanes, kWhole>& shared,
                                        const Order& order, int pair, Ss2dPass pass, int64_t b, int64_t first_channel) {
  using S = State<T>;
  using L = Layout<kLanes>;
  const Ss2dSizes& sizes = work.call.sizes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Lanes<kLanes, kDown> lanes{lane % kLanes};
  const int group = lane / kLanes;
  const int64_t D = sizes.channels, N = sizes.state, k = pair + (kDown ? 2 : 0), row = b * 4 + k;
  const int rank = static_cast<int>(sizes.rank), state = static_cast<int>(sizes.state), channels = work.rounds * L::kChannels;
  const LowRank& low_rank = work.call.x_dbl;
  const T* x_dbl = static_cast<const T*>(low_rank.data) + b * low_rank.batch + k * low_rank.direction;
  S* staged = shared.staged + warp * work.capacity * L::kPiece;
  const bool all_staged = work.capacity >= rank + 2 * state;
  const int pieces = work.geometry.pieces[pair], sets = (pieces + warps - 1) / warps;
  int buffer = 0;

  for (int s = 0; s < sets; ++s) {
    const int piece = (kDown ? sets - 1 - s : s) * warps + warp;
    const bool exists = piece < pieces && order.exists(piece);
    if (!kWhole && !exists) continue;
    const Steps steps(order, L::kPiece, piece, lanes.place * kRun, exists ? kRun : 0);
    const int64_t place = steps.place(order);
    if (all_staged) stage_rows<T, L::kPiece>(staged, x_dbl, low_rank.row, 0, rank + 2 * state, order, piece);
    for (int round = 0; round < work.rounds; ++round) {
      const int in_block[2] = {round * L::kChannels + group, round * L::kChannels + L::kGroups + group};
      const int64_t d[2] = {first_channel + in_block[0], first_channel + in_block[1]};
      Run<S> dt[2], slope[2], dtx[2], y[2];
      step_sizes<T, L::kPiece>(dt, slope, staged, work.capacity, all_staged, x_dbl, low_rank.row, order, piece, steps,
                               lanes.place, work.parameters, k, D, d, rank);
      S sum[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        tile_run<T>(dtx[c], shared.x + in_block[c] * work.pitch, order, steps);
        S skip = 0;
        if (pass == Ss2dPass::last && d[c] < D)  // one coefficient serves the four directions
          for (int other = 0; other < 4; ++other) skip += static_cast<const S*>(work.parameters.Ds)[other * D + d[c]];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          y[c][i] = skip * dtx[c][i];
          dtx[c][i] *= dt[c][i];
          sum[c] += dt[c][i];
        }
      }
      // Which of the steps a saved state enters.
      const bool saves = sizes.chunks && steps.count &&
                         (kDown ? place / kSaveEvery != (place + steps.count) / kSaveEvery || place + steps.count == sizes.length()
                                : (place + kSaveEvery - 1) / kSaveEvery * kSaveEvery < place + steps.count);
      for (int n = 0; n < state; ++n) {
        const StateRows<T, L::kPiece> rows(staged, work.capacity, all_staged, x_dbl, low_rank.row, order, piece, rank, state, n);
        Run<S> B, a[2], w[2];
        staged_run<S>(B, rows.B + lanes.place * kRun);
        S factor[2], sum_q[2], entering[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const S A2 = shared.A2[n * channels + in_block[c]];
          S q = 0;
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            a[c][i] = exp2_of<T>(dt[c][i] * A2);
            w[c][i] = dtx[c][i] * B[i];
          }
#pragma unroll
          for (int i = 0; i < kRun; ++i) q = a[c][lanes.step(i)] * q + w[c][lanes.step(i)];
          factor[c] = exp2_of<T>(sum[c] * A2);
          sum_q[c] = q;
          lanes.scan(factor[c], sum_q[c]);
        }
        if constexpr (kWhole) {
          S* mine = shared.exchanged + (buffer * warps + warp) * L::kChannels * 2;
          if (lanes.last()) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              mine[(c * L::kGroups + group) * 2] = factor[c];
              mine[(c * L::kGroups + group) * 2 + 1] = sum_q[c];
            }
          }
          __syncthreads();
          const S* carry = shared.carry + ((s & 1) * work.rounds + round) * state * L::kChannels + n * L::kChannels;
          S* next = shared.carry + (((s + 1) & 1) * work.rounds + round) * state * L::kChannels + n * L::kChannels;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const S* all = shared.exchanged + (buffer * warps * L::kChannels + c * L::kGroups + group) * 2;
            S h = s == 0 ? S(0) : carry[c * L::kGroups + group];
            for (int earlier = 0; earlier < (kDown ? warps - 1 - warp : warp); ++earlier) {
              const S* pair_of = all + (kDown ? warps - 1 - earlier : earlier) * L::kChannels * 2;
              h = pair_of[0] * h + pair_of[1];
            }
            entering[c] = h;
            if (warp == (kDown ? 0 : warps - 1) && lanes.first())
              next[c * L::kGroups + group] = all[warp * L::kChannels * 2] * h + all[warp * L::kChannels * 2 + 1];
          }
          buffer ^= 1;
        } else {
          const S* from = static_cast<const S*>(work.states[pair]) +
                          (((b * 2 + (kDown ? 1 : 0)) * work.geometry.total[pair] + order.number(piece)) * N + n) * D;
#pragma unroll
          for (int c = 0; c < 2; ++c) entering[c] = d[c] < D ? from[d[c]] : S(0);
        }
        Run<S> C;
        staged_run<S>(C, rows.C + lanes.place * kRun);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const S earlier_factor = lanes.before(factor[c], 1), earlier_sum = lanes.before(sum_q[c], 1);
          S h = lanes.first() ? entering[c] : earlier_factor * entering[c] + earlier_sum;
          if (saves && d[c] < D) {
            S* boundary = static_cast<S*>(work.call.boundary_states) + (row * D + d[c]) * sizes.chunks * N + n;
            S at = h;
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
              const int j = lanes.step(i);
              const int64_t here = place + j;
              if (j < steps.count && (kDown ? (here + 1) % kSaveEvery == 0 || here + 1 == sizes.length() : here % kSaveEvery == 0))
                boundary[here / kSaveEvery * N] = at;
              at = a[c][j] * at + w[c][j];
            }
          }
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const int j = lanes.step(i);
            h = a[c][j] * h + w[c][j];
            y[c][j] += C[j] * h;
          }
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        S* y_tile = shared.y + in_block[c] * work.pitch;
        if (pass != Ss2dPass::first) steps.each(order, [&](int i, int at) { y[c][i] += y_tile[at]; });
        if (pass != Ss2dPass::last) {
          steps.each(order, [&](int i, int at) { y_tile[at] = y[c][i]; });
        } else if (d[c] < D) {  // along rows: consecutive places of the map
          store_run<T>(work.call.y, (b * D + d[c]) * sizes.length() + steps.map_position(order), y[c], steps.count, work.vectors,
                       sizes.out != sizes.io);
        }
      }
    }
  }
}

template <typename T, int kLanes, bool kWhole>
__global__ void __launch_bounds__(kBlockWarps * kWarp) ss2d_forward_kernel(const Ss2dForwardWork work) {
  using S = State<T>;
  using L = Layout<kLanes>;
  const Ss2dSizes& sizes = work.call.sizes;
  const int channels = work.rounds * L::kChannels, state = static_cast<int>(sizes.state);
  int64_t index = blockIdx.x;
  const int64_t first_channel = index % work.channel_blocks * channels;
  index /= work.channel_blocks;
  const int64_t tile = index % work.geometry.tiles(), b = index / work.geometry.tiles();
  Ss2dForwardShared<T, kLanes, kWhole> shared;
  shared.layout(&shared, shared_memory<unsigned char>(), blockDim.x / kWarp, work.rounds, work.capacity, work.pitch, state);

  const int present = static_cast<int>(sizes.channels - first_channel < channels ? sizes.channels - first_channel : channels);
  load_map_tile<T>(shared.x, work.pitch, channels, present, work.call.x, b, first_channel, work.geometry,
                   Order(work.geometry, kRows, tile), false);
  for (int turn = 0; turn < 4; ++turn) {
    const int pair = turn < 2 ? kColumns : kRows;
    const bool down = turn % 2;
    __syncthreads();
    for (int i = threadIdx.x; i < state * channels; i += blockDim.x) {
      const int64_t d = first_channel + i % channels, n = i / channels;
      shared.A2[i] = i % channels < present
                         ? base2_factor<T>(static_cast<const S*>(work.parameters.A_logs)[((pair + 2 * down) * sizes.channels + d) * sizes.state + n], true)
                         : S(0);
    }
    __syncthreads();
    const Order order(work.geometry, pair, tile);
    const Ss2dPass pass = turn == 0 ? Ss2dPass::first : turn < 3 ? Ss2dPass::add : Ss2dPass::last;
    if (down) ss2d_forward_direction<T, kLanes, kWhole, true>(work, shared, order, pair, pass, b, first_channel);
    else ss2d_forward_direction<T, kLanes, kWhole, false>(work, shared, order, pair, pass, b, first_channel);
  }
}

}  // namespace dass
