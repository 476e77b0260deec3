// What the gradient of v in equation (13) gives to the low-rank rows of x_dbl and to dt_weight, for one piece: the products
// dt_weight^T d_v and d_v x_dbl[:rank]^T of equation (16).
//
// On tensor cores both use tf32 operands: 16-bit data is exact in them. d_v is split in two terms for the weights' gradient (a
// float32 result) and, for float32 data, for the rows as well; rows of 16-bit data take d_v and the weights rounded once, to
// a quarter of what the rounding of the result adds.
#pragma once

#include "kernels/low_rank.cuh"

namespace dass {

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

DASS_DEVICE uint32_t round_tf32(float x) { return (bits_of(x) + 0x1000u) & kTf32Mask; }  // to nearest, ties away from 0

// dt_weight^T as the product takes it: a block of 16 ranks by 8 channels, in both terms.
template <typename T>
struct LowRankBackWeights {
  using S = State<T>;
  static constexpr int kChannels = Layout<4>::kChannels;
  S* memory;

  __host__ __device__ static size_t words(int rank) {
    return kTensorCores<T, 4> ? static_cast<size_t>((rank + 15) / 16) * 2 * kWarp * 8 : static_cast<size_t>(rank) * kChannels;
  }
  DASS_DEVICE void load(const void* dt_weight, int64_t first_row, int present, int rank) const {
    const S* weight = static_cast<const S*>(dt_weight) + first_row * rank;
    const auto at = [&](int channel, int r) { return channel < present && r < rank ? weight[channel * rank + r] : S(0); };
    if constexpr (kTensorCores<T, 4>) {
      for (int i = threadIdx.x; i < (rank + 15) / 16 * 2 * kWarp; i += blockDim.x) {
        const int g = i % kWarp / 4, t = i % 4, half = i / kWarp % 2, block = i / kWarp / 2;
        uint32_t* to = reinterpret_cast<uint32_t*>(memory) + i * 8;
#pragma unroll
        for (int which = 0; which < 4; ++which) {
          const float value = at(8 * half + t + which / 2 * 4, 16 * block + g + which % 2 * 8);
          const uint32_t high = round_tf32(value);
          to[which] = high;
          to[4 + which] = round_tf32(value - of_bits(high));
        }
      }
    } else {
      for (int i = threadIdx.x; i < rank * kChannels; i += blockDim.x) memory[i] = at(i % kChannels, i / kChannels);
    }
  }
};

template <typename T>
struct LowRankGradients {
  using S = State<T>;
  using L = Layout<4>;
  using Rows = LowRankRows<T, 4>;
  static constexpr bool kCores = kTensorCores<T, 4>;
  static constexpr int kPitch = L::kPiece + 8;  // of a channel of d_v; lanes 4 g + t then meet different banks

  S* d_v;           // (kChannels, kPitch): of this warp
  S* d_weight;      // (kChannels, per_channel): of this warp; the ranks come first
  int per_channel;

  // This lane's place for the run of its channel c.
  DASS_DEVICE S* place(int c) const {
    const int lane = threadIdx.x % kWarp;
    return d_v + (c * L::kGroups + lane / L::kLanes) * kPitch + lane % L::kLanes * kRun;
  }

  // d_weight[channel][r] += sum over the steps of d_v x_dbl[r], for the staged ranks first ... end - 1.
  DASS_DEVICE void add_to_weights(const Run<S> (&v)[2], const Rows& rows, int first, int end) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    if constexpr (kCores) {
      for (int r0 = first; r0 < end; r0 += 8) {
        float c[4];
        S* at[2] = {d_weight + g * per_channel + r0 + 2 * t, d_weight + (8 + g) * per_channel + r0 + 2 * t};
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = r0 + 2 * t + i % 2 < end ? at[i / 2][i % 2] : 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // the inner axis: t stands for step 8 t + 2 j, t + 4 for the one after it
          const uint32_t high[4] = {round_tf32(v[0][2 * j]), round_tf32(v[1][2 * j]), round_tf32(v[0][2 * j + 1]),
                                    round_tf32(v[1][2 * j + 1])};
          uint32_t low[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) low[i] = round_tf32(v[i % 2][2 * j + i / 2] - of_bits(high[i]));
          float x0, x1;
          rows.low_rank_pair(x0, x1, r0 - first + g, t * kRun + 2 * j);
          if constexpr (kHalf<T>) {
            multiply_tf32(c, low[0], low[1], low[2], low[3], bits_of(x0), bits_of(x1));
            multiply_tf32(c, high[0], high[1], high[2], high[3], bits_of(x0), bits_of(x1));
          } else {
            const uint32_t b0 = round_tf32(x0), b1 = round_tf32(x1);
            multiply_tf32(c, high[0], high[1], high[2], high[3], round_tf32(x0 - of_bits(b0)), round_tf32(x1 - of_bits(b1)));
            multiply_tf32(c, low[0], low[1], low[2], low[3], b0, b1);
            multiply_tf32(c, high[0], high[1], high[2], high[3], b0, b1);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (r0 + 2 * t + i % 2 < end) at[i / 2][i % 2] = c[i];
      }
    } else {
      for (int r = first; r < end; ++r) {
        Run<S> x;
        load_run<S>(x, rows.low_rank + (r - first) * L::kPiece + t * kRun, kRun, true);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          S sum = 0;
#pragma unroll
          for (int i = 0; i < kRun; ++i) sum += v[c][i] * x[i];
          sum = sum_over<L::kLanes>(sum);
          if (t == 0) d_weight[(c * L::kGroups + g) * per_channel + r] += sum;
        }
      }
    }
  }

  // function(r, step, sums) for every rank r: sums over the channels of dt_weight[r] d_v at `step` and the steps that follow,
  // as many as there are sums. The lanes share out the steps.
  template <typename Function>
  DASS_DEVICE void each_row(const Run<S> (&v)[2], const LowRankBackWeights<T>& weights, int rank, Function&& function) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    if constexpr (kCores) {
      for (int block = 0; block < (rank + 15) / 16; ++block) {
        const uint32_t* fragments = reinterpret_cast<const uint32_t*>(weights.memory) + (block * 2 * kWarp + lane) * 8;
        uint4 high[2], low[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          high[half] = *reinterpret_cast<const uint4*>(fragments + half * kWarp * 8);
          low[half] = *reinterpret_cast<const uint4*>(fragments + half * kWarp * 8 + 4);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float c[4] = {0, 0, 0, 0};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float d0 = d_v[(8 * half + t) * kPitch + 8 * j + g], d1 = d_v[(8 * half + t + 4) * kPitch + 8 * j + g];
            const uint32_t b0 = round_tf32(d0), b1 = round_tf32(d1);
            const uint4 h = high[half], l = low[half];
            if constexpr (!kHalf<T>) {
              multiply_tf32(c, h.x, h.y, h.z, h.w, round_tf32(d0 - of_bits(b0)), round_tf32(d1 - of_bits(b1)));
              multiply_tf32(c, l.x, l.y, l.z, l.w, b0, b1);
            }
            multiply_tf32(c, h.x, h.y, h.z, h.w, b0, b1);
          }
          const int r = 16 * block + g, step = 8 * j + 2 * t;
          const S first[2] = {c[0], c[1]}, second[2] = {c[2], c[3]};
          if (r < rank) function(r, step, first);
          if (r + 8 < rank) function(r + 8, step, second);
        }
      }
    } else {
      for (int r = 0; r < rank; ++r) {
        Run<S> row;
#pragma unroll
        for (int i = 0; i < kRun; ++i) row[i] = weights.memory[r * L::kChannels + g] * v[0][i] + weights.memory[r * L::kChannels + 8 + g] * v[1][i];
        const S sum[1] = {sum_over_groups(row, g)};
        function(r, t * kRun + g, sum);
      }
    }
  }
};

}  // namespace dass
