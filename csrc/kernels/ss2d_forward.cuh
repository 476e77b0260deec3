// The four-direction scan of a map, forward: equations (13) to (15) of SCAN.md, delta in registers only, y written once.
//
// A thread block owns some channels of one clip and either the whole map or a tile of it. x lies in shared memory for all four
// directions, the sum of their outputs beside it. The last direction is 0, along rows: it writes y out as it goes.
//
// Whole map: warps take consecutive pieces; they exchange what the pieces do to a state, one barrier for each state, and the
// last warp hands on what enters the next set of pieces. Tile: what enters each piece comes from a summary pass and carry.cuh.
#pragma once

#include "kernels/low_rank.cuh"

namespace dass {

struct Ss2dForwardWork {
  Ss2dForward call;
  Ss2dParameters parameters;
  Geometry geometry;
  Staging staging;
  int64_t channel_blocks = 0;
  int rounds = 1;  // sets of Layout::kChannels channels that a block holds
  void* out = nullptr;      // y; or `partial`
  bool out_as_state = false;
  void* partial = nullptr;  // (4, batch, channels, map) of state dtype: blocks walk one direction each and leave its y here
  bool vectors = false;     // of out
  void* states[2] = {nullptr, nullptr};  // by pair: (batch, 2, pieces, state, channels): of the summary, then what enters
  void* sums[2] = {nullptr, nullptr};    // (batch, 2, pieces, channels)
};

// Pieces of shared memory, handed out in turn.
class SharedLayout {
 public:
  __host__ __device__ explicit SharedLayout(unsigned char* memory) : memory_(memory) {}
  template <typename S>
  __host__ __device__ S* take(size_t count) {
    S* at = reinterpret_cast<S*>(memory_ + used_);
    used_ += (count * sizeof(S) + 15) / 16 * 16;
    return at;
  }
  __host__ __device__ size_t used() const { return used_; }

 private:
  unsigned char* memory_;
  size_t used_ = 0;
};

template <typename T, int kLanes, bool kWhole>
struct Ss2dForwardShared {
  using S = State<T>;
  using L = Layout<kLanes>;
  Order* order;  // of the direction at hand
  S* staged;     // of each warp: LowRankRows
  S* weights;    // LowRankWeights of the direction at hand
  S* A2;         // (state, channels): A log2(e) of the direction at hand
  S* y;          // (channels, channel_pitch)
  S* exchanged;  // (2 buffers, warps, kGroups, 2 channels, factor and sum) of a piece; whole map only
  S* carry;      // (2 buffers, rounds, state, kChannels); whole map only
  void* x;       // MapTile
  size_t bytes;

  __host__ __device__ Ss2dForwardShared(unsigned char* memory, int warps, int rounds, const Staging& staging, const Geometry& g,
                                        int rank, int state) {
    const size_t channels = static_cast<size_t>(rounds) * L::kChannels;
    SharedLayout all(memory);
    exchanged = all.template take<S>(kWhole ? 4 * warps * L::kChannels : 0);
    order = all.template take<Order>(1);
    staged = all.template take<S>(static_cast<size_t>(warps) * LowRankRows<T, kLanes>::words(staging));
    weights = all.template take<S>(LowRankWeights<T, kLanes>::words(rounds, rank));
    A2 = all.template take<S>(state * channels);
    carry = all.template take<S>(kWhole ? 2 * state * channels : 0);
    y = all.template take<S>(channels * g.channel_pitch);
    x = all.template take<unsigned char>(MapTile<T, kLanes>::bytes(rounds, g.channel_pitch, false));
    bytes = all.used();
  }
};

enum class Ss2dPass { first, add, last };  // of the four directions: sets the sum, adds to it, writes it out

// A log2(e) of the block's channels in direction k: (state, channels).
template <typename T>
DASS_DEVICE void load_factors(State<T>* A2, const void* A_logs, int64_t first_row, int present, int channels, int state) {
  for (int i = threadIdx.x; i < state * channels; i += blockDim.x) {
    const int c = i % channels, n = i / channels;
    A2[i] = c < present ? base2_factor<T>(static_cast<const State<T>*>(A_logs)[(first_row + c) * state + n], true) : State<T>(0);
  }
}

// Equation (13): dt (0 at steps that do not exist) and the slope of the softplus, in the place of v.
template <typename T, int kLanes>
DASS_DEVICE void step_sizes(Run<State<T>> (&v)[2], const LowRankRows<T, kLanes>& rows, const LowRankWeights<T, kLanes>& weights,
                            const typename LowRankRows<T, kLanes>::Source& source, const Staging& staging, bool staged,
                            int round, int rounds, const Ss2dParameters& parameters, int64_t row, const bool (&present)[2],
                            int rank) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const State<T> bias = present[c] ? static_cast<const State<T>*>(parameters.dt_bias)[row + c * Layout<kLanes>::kGroups] : State<T>(0);
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[c][i] = bias;
  }
  for (int first = 0; first < rank; first += staging.ranks) {
    if (!staged) rows.stage_low_rank(source, first, rank, staging);
    weights.add_product(v, rows, round, rounds, first, first + staging.ranks < rank ? first + staging.ranks : rank, rank);
  }
}

// What enters a piece in one channel and state, on a map that is held whole: `factor` and `sum` of this warp's piece are known to
// its last lanes. One barrier. `carry` has what entered the first warp's piece (0 at the first set), `next` gets what leaves the
// last one's.
template <typename S>
DASS_DEVICE S exchange_pieces(S* exchanged, S factor, S sum, bool last_lane, int slot, int slots, const S* carry, S* next) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (last_lane) {
    exchanged[(warp * slots + slot) * 2] = factor;
    exchanged[(warp * slots + slot) * 2 + 1] = sum;
  }
  __syncthreads();
  S h = carry ? *carry : S(0);
  const S* of = exchanged + slot * 2;
  for (int earlier = 0; earlier < warp; ++earlier, of += slots * 2) h = of[0] * h + of[1];
  if (warp == warps - 1 && last_lane) *next = factor * h + sum;
  return h;
}

// The same for two channels, `slots` apart in carry and next.
template <typename S>
DASS_DEVICE void exchange_pairs(S* exchanged, const S (&factor)[2], const S (&sum)[2], bool last_lane, int slot, int slots,
                                const S* carry, S* next, S (&h)[2]) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (last_lane) {
    S* mine = exchanged + (warp * slots + slot) * 4;
    mine[0] = factor[0], mine[1] = sum[0], mine[2] = factor[1], mine[3] = sum[1];
  }
  __syncthreads();
  h[0] = carry ? carry[0] : S(0);
  h[1] = carry ? carry[slots] : S(0);
  const S* of = exchanged + slot * 4;
  for (int earlier = 0; earlier < warp; ++earlier, of += slots * 4) {
    S from[4];
    read_four(from, of);
    h[0] = from[0] * h[0] + from[1];
    h[1] = from[2] * h[1] + from[3];
  }
  if (warp == warps - 1 && last_lane) {
    next[0] = factor[0] * h[0] + sum[0];
    next[slots] = factor[1] * h[1] + sum[1];
  }
}

template <typename T, int kLanes, bool kWhole, bool kOneState>
DASS_DEVICE void ss2d_forward_direction(const Ss2dForwardWork& work, const Ss2dForwardShared<T, kLanes, kWhole>& shared, int k,
                                        Ss2dPass pass, int b, int first_channel) {
  using S = State<T>;
  using L = Layout<kLanes>;
  using Rows = LowRankRows<T, kLanes>;
  // With one state, the two channels of a lane go together; otherwise one after the other, for want of registers.
  constexpr int kTogether = kOneState ? 2 : 1;
  const Ss2dSizes& sizes = work.call.sizes;
  const Order& order = *shared.order;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Lanes<kLanes, false> lanes{lane % kLanes};
  const int group = lane / kLanes, pair = k % 2, rank = static_cast<int>(sizes.rank);
  const int state = kOneState ? 1 : static_cast<int>(sizes.state), channels = work.rounds * L::kChannels;
  const int64_t D = sizes.channels;
  const Rows rows(shared.staged + warp * Rows::words(work.staging), work.staging);
  const LowRankWeights<T, kLanes> weights{shared.weights};
  const MapTile<T, kLanes> x_tile{shared.x, false};
  const bool low_rank_staged = work.staging.ranks >= rank, states_staged = kOneState || work.staging.states >= state;
  const T* x_dbl = static_cast<const T*>(work.call.x_dbl.data) + b * work.call.x_dbl.batch + k * work.call.x_dbl.direction;
  const int pieces = work.geometry.pieces[pair], sets = (pieces + warps - 1) / warps;
  int buffer = 0;

  for (int s = 0; s < sets; ++s) {
    const int piece = s * warps + warp;
    const bool exists = piece < pieces && order.exists(piece);
    if (!kWhole && !exists) continue;
    const Steps steps(order, L::kPiece, piece, lanes.place * kRun, exists ? kRun : 0);
    const typename Rows::Source source(x_dbl, work.call.x_dbl.row, order, exists ? piece : 0);
    if (low_rank_staged) rows.stage_low_rank(source, 0, rank, work.staging);
    if (states_staged) rows.stage_states(source, 0, rank, state, work.staging);
    for (int round = 0; round < work.rounds; ++round) {
      const int in_block = round * L::kChannels + group;  // the lane's first channel
      const bool present[2] = {first_channel + in_block < D, first_channel + in_block + L::kGroups < D};
      Run<S> v[2];
      step_sizes<T, kLanes>(v, rows, weights, source, work.staging, low_rank_staged, round, work.rounds, work.parameters,
                            k * D + first_channel + in_block, present, rank);
#pragma unroll
      for (int first = 0; first < 2; first += kTogether) {
        Run<S> dt[kTogether], dtx[kTogether], y[kTogether];
        if constexpr (kTogether == 2) x_tile.read(dtx, round, group, work.geometry.channel_pitch, order, steps);
        else x_tile.read_one(dtx[0], first, round, group, work.geometry.channel_pitch, order, steps);
        S sum[kTogether];
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          sum[c] = S(0);
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            dt[c][i] = i < steps.count ? softplus<T>(v[first + c][i]).value : S(0);
            dtx[c][i] *= dt[c][i];
            sum[c] += dt[c][i];
            y[c][i] = S(0);
          }
        }
#pragma unroll 1
        for (int n = 0; n < state; ++n) {
          const int staged_row = states_staged ? n : n % work.staging.states;
          if (!states_staged && staged_row == 0) rows.stage_states(source, n, rank, state, work.staging);
          Run<S> B, a[kTogether], w[kTogether];
          rows.read_state(B, staged_row, lanes.place);
          S factor[kTogether], sum_q[kTogether], h[kTogether];
#pragma unroll
          for (int c = 0; c < kTogether; ++c) {
            const S A2 = shared.A2[n * channels + in_block + (first + c) * L::kGroups];
            S q = 0;
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
              a[c][i] = exp2_of<T>(dt[c][i] * A2);
              w[c][i] = dtx[c][i] * B[i];
              q = a[c][i] * q + w[c][i];
            }
            factor[c] = exp2_of<T>(sum[c] * A2);
            sum_q[c] = q;
            lanes.scan(factor[c], sum_q[c]);
          }
          if constexpr (kWhole) {
            const int at = (round * state + n) * L::kChannels + first * L::kGroups + group;
            const int one_buffer = work.rounds * state * L::kChannels;
            const S* carry = shared.carry + (s & 1) * one_buffer + at;
            S* next = shared.carry + ((s + 1) & 1) * one_buffer + at;
            S* exchanged = shared.exchanged + buffer * warps * L::kChannels * 2;
            if constexpr (kTogether == 2) exchange_pairs(exchanged, factor, sum_q, lanes.last(), group, L::kGroups, s == 0 ? nullptr : carry, next, h);
            else h[0] = exchange_pieces(exchanged, factor[0], sum_q[0], lanes.last(), group, L::kGroups, s == 0 ? nullptr : carry, next);
            buffer ^= 1;
          } else {
            const S* from = static_cast<const S*>(work.states[pair]) +
                            (((int64_t{2} * b + k / 2) * work.geometry.total[pair] + order.number(piece)) * state + n) * D + first_channel + in_block;
#pragma unroll
            for (int c = 0; c < kTogether; ++c) h[c] = present[first + c] ? from[(first + c) * L::kGroups] : S(0);
          }
          Run<S> C;
          rows.read_state(C, work.staging.states + staged_row, lanes.place);
#pragma unroll
          for (int c = 0; c < kTogether; ++c) {
            const S earlier_factor = lanes.before(factor[c], 1), earlier_sum = lanes.before(sum_q[c], 1);
            S state_here = lanes.first() ? h[c] : earlier_factor * h[c] + earlier_sum;
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
              state_here = a[c][i] * state_here + w[c][i];
              y[c][i] += C[i] * state_here;
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          S* y_tile = shared.y + (in_block + (first + c) * L::kGroups) * work.geometry.channel_pitch;
          if (pass == Ss2dPass::first) {
            steps.each(order, [&](int i, int at) { y_tile[at] = y[c][i]; });
          } else if (pass == Ss2dPass::add) {
            steps.each(order, [&](int i, int at) { y_tile[at] += y[c][i]; });
          } else {  // one skip coefficient serves the four directions; along a row the steps are neighbours in the map
            Run<S> x;
            x_tile.read_one(x, first + c, round, group, work.geometry.channel_pitch, order, steps);
            steps.each(order, [&](int i, int at) { y[c][i] += y_tile[at]; });
            if (present[first + c]) {
              const int d = first_channel + in_block + (first + c) * L::kGroups;
              const S* Ds = static_cast<const S*>(work.parameters.Ds) + d;
              const S skip = Ds[0] + Ds[D] + Ds[2 * D] + Ds[3 * D];
#pragma unroll
              for (int i = 0; i < kRun; ++i) y[c][i] += skip * x[i];
              store_run<T>(work.out, (b * D + d) * sizes.length() + steps.map_position(order), y[c], steps.count, work.vectors,
                           work.out_as_state);
            }
          }
        }
      }
    }
  }
}

template <typename T, int kLanes, bool kWhole, bool kOneState>
__global__ void __launch_bounds__(kBlockWarps * kWarp) ss2d_forward_kernel(const Ss2dForwardWork work) {
  using L = Layout<kLanes>;
  const Ss2dSizes& sizes = work.call.sizes;
  const int channels = work.rounds * L::kChannels, state = static_cast<int>(sizes.state), rank = static_cast<int>(sizes.rank);
  const int channel_blocks = static_cast<int>(work.channel_blocks), tiles = static_cast<int>(work.geometry.tiles());
  const bool split = work.partial;
  const Turns turns(split);
  const int first_channel = turns.rest % channel_blocks * channels, part = turns.rest / channel_blocks;
  const int tile = part % tiles, b = part / tiles;
  const int present = static_cast<int>(sizes.channels - first_channel < channels ? sizes.channels - first_channel : channels);
  const Ss2dForwardShared<T, kLanes, kWhole> shared(shared_memory<unsigned char>(), blockDim.x / kWarp, work.rounds, work.staging,
                                                    work.geometry, rank, state);
  MapTile<T, kLanes>{shared.x, false}.load(work.call.x, b, first_channel, present, work.rounds, work.geometry,
                                           Order(work.geometry, 0, tile));
#pragma unroll 1
  for (int turn = turns.begin; turn < turns.end; ++turn) {
    const int k = Turns::direction(turn);
    __syncthreads();
    if (split && turn == 3) clear_tile(shared.y, channels, work.geometry);
    if (threadIdx.x == 0) *shared.order = Order(work.geometry, k, tile);
    load_factors<T>(shared.A2, work.parameters.A_logs, k * sizes.channels + first_channel, present, channels, state);
    if (sizes.chunks && tile == 0)  // one chunk, entered by zeros
      for (int i = threadIdx.x; i < present * state; i += blockDim.x)
        static_cast<State<T>*>(work.call.boundary_states)[((int64_t{4} * b + k) * sizes.channels + first_channel) * state + i] = 0;
    LowRankWeights<T, kLanes>{shared.weights}.load(work.parameters.dt_weight, k * sizes.channels + first_channel, present,
                                                   work.rounds, rank);
    __syncthreads();
    ss2d_forward_direction<T, kLanes, kWhole, kOneState>(
        work, shared, k, turn == 3 ? Ss2dPass::last : turn == turns.begin ? Ss2dPass::first : Ss2dPass::add, b, first_channel);
    if (split && turn < 3) {
      __syncthreads();
      write_tile(shared.y, static_cast<State<T>*>(work.partial) + ((k * sizes.batch + b) * sizes.channels + first_channel) * sizes.length(),
                 present, work.geometry, Order(work.geometry, 0, tile));
    }
  }
}

}  // namespace dass
