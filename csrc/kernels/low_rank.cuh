// The rows of x_dbl at the steps of a piece, as one warp stages them in shared memory, and the product of equation (13):
// v = dt_weight x_dbl[:rank] + dt_bias for kChannels channels and kPiece steps.
//
// On tensor cores (kLanes == 4, not float64) a warp multiplies 16 channels x rank by rank x 32 steps. Column n of the j-th of four
// products stands for step 8 (n / 2) + 2 j + n % 2 of the piece: so the lane 4 g + t finds in its accumulators the steps 8 t to
// 8 t + 7, its own run, of the channels g and g + 8. Weights are split in two terms of the operands' precision, and float32 data
// too, so that the product has 16 (bfloat16), 21 (float16) or 21 bits (float32).
#pragma once

#include "kernels/ss2d_geometry.cuh"

namespace dass {

struct Ss2dParameters {
  const void *dt_weight = nullptr, *dt_bias = nullptr, *A_logs = nullptr, *Ds = nullptr;
};

template <typename T, int kLanes>
constexpr bool kTensorCores = kLanes == 4 && !std::is_same_v<T, double>;

// Places in the staged rows: `ranks` of the low-rank rows (a multiple of 8 on tensor cores) and `states` of B and of C each may
// be fewer than there are; they then come in slices.
struct Staging {
  int ranks = 0, states = 0;
};

template <typename T, int kLanes>
struct LowRankRows {
  using S = State<T>;
  using L = Layout<kLanes>;
  static constexpr bool kCores = kTensorCores<T, kLanes>;
  static constexpr bool kPairs = kCores && kHalf<T>;             // two rows to a word
  static constexpr int kPitch = kCores ? L::kPiece + 2 : L::kPiece;  // lanes t then meet different banks
  static constexpr int kBlock = kCores ? 8 : 1;                  // rows that go together

  S* low_rank;  // this warp's
  S* states;    // (2 * staging.states, kPiece): B, then C

  __host__ __device__ static int words(const Staging& staging) {  // of state dtype, for a warp
    return staging.ranks / (kPairs ? 2 : 1) * kPitch + 2 * staging.states * L::kPiece;
  }
  DASS_DEVICE LowRankRows(S* memory, const Staging& staging)
      : low_rank(memory), states(memory + staging.ranks / (kPairs ? 2 : 1) * kPitch) {}

  // Where the steps of a lane stand in the map: the places (lane, lane + 32, ...) of the piece.
  struct Source {
    const T* at[L::kPiece / kWarp];
    bool exists[L::kPiece / kWarp];
    int64_t row;

    DASS_DEVICE Source(const T* x_dbl, int64_t row_stride, const Order& order, int piece) : row(row_stride) {
#pragma unroll
      for (int i = 0; i < L::kPiece / kWarp; ++i) {
        const Steps steps(order, L::kPiece, piece, i * kWarp + static_cast<int>(threadIdx.x % kWarp), 1);
        exists[i] = steps.count;
        at[i] = x_dbl + steps.map_position(order);
      }
    }
    DASS_DEVICE T load(int i, int r, int end) const { return r < end && exists[i] ? at[i][r * row] : T(0.0f); }
  };

  // The rows first ... of `rank`, as many as there is room for.
  DASS_DEVICE void stage_low_rank(const Source& source, int first, int rank, const Staging& staging) const {
    const int lane = threadIdx.x % kWarp;
    int end = first + staging.ranks;  // beyond rank: zeros, up to a whole block
    if (end > rank) end = (rank + kBlock - 1) / kBlock * kBlock;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < L::kPiece / kWarp; ++i) {
      const int step = i * kWarp + lane;
      if constexpr (kPairs) {
#pragma unroll 4
        for (int r = first; r < end; r += 2)
          reinterpret_cast<uint32_t*>(low_rank)[(r - first) / 2 * kPitch + step] =
              static_cast<uint32_t>(source.load(i, r, rank).x) | static_cast<uint32_t>(source.load(i, r + 1, rank).x) << 16;
      } else {
#pragma unroll 4
        for (int r = first; r < end; ++r) low_rank[(r - first) * kPitch + step] = static_cast<S>(source.load(i, r, rank));
      }
    }
    __syncwarp();
  }

  // B and C of the states first ... of `state`.
  DASS_DEVICE void stage_states(const Source& source, int first, int rank, int state, const Staging& staging) const {
    const int lane = threadIdx.x % kWarp;
    const int count = state - first < staging.states ? state - first : staging.states;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < L::kPiece / kWarp; ++i) {
      const int step = i * kWarp + lane;
      for (int n = 0; n < count; ++n) {
        states[n * L::kPiece + step] = static_cast<S>(source.load(i, rank + first + n, rank + state));
        states[(staging.states + n) * L::kPiece + step] =
            static_cast<S>(source.load(i, rank + state + first + n, rank + 2 * state));
      }
    }
    __syncwarp();
  }

  // A staged low-rank row at two neighbouring steps, of which the first is even; on tensor cores.
  DASS_DEVICE void low_rank_pair(float& first, float& second, int row, int step) const {
    if constexpr (kPairs) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(low_rank) + row / 2 * kPitch + step;
      float one[2], two[2];
      unpack<T>(words[0], one);
      unpack<T>(words[1], two);
      first = row % 2 ? one[1] : one[0];
      second = row % 2 ? two[1] : two[0];
    } else {
      first = low_rank[row * kPitch + step];
      second = low_rank[row * kPitch + step + 1];
    }
  }

  DASS_DEVICE void read_state(Run<S>& run, int row, int place) const {
    load_run<S>(run, states + row * L::kPiece + place * kRun, kRun, true);
  }
};

// dt_weight of the block's channels in one direction, in shared memory, as the product reads it.
template <typename T, int kLanes>
struct LowRankWeights {
  using S = State<T>;
  using L = Layout<kLanes>;
  static constexpr bool kCores = kTensorCores<T, kLanes>;
  static constexpr int kLaneWords = kHalf<T> ? 4 : 8;  // of a block of 8 ranks: both terms of what multiply_* takes

  S* memory;

  __host__ __device__ static size_t words(int rounds, int rank) {  // of state dtype
    return kCores ? static_cast<size_t>(rounds) * ((rank + 7) / 8) * kWarp * kLaneWords
                  : static_cast<size_t>(rounds) * L::kChannels * rank;
  }

  DASS_DEVICE void load(const void* dt_weight, int64_t first_row, int present, int rounds, int rank) const {
    const S* weight = static_cast<const S*>(dt_weight) + first_row * rank;
    const auto at = [&](int channel, int r) { return channel < present && r < rank ? weight[channel * rank + r] : S(0); };
    if constexpr (kCores) {
      const int blocks = (rank + 7) / 8;
      for (int i = threadIdx.x; i < rounds * blocks * kWarp; i += blockDim.x) {
        const int g = i % kWarp / 4, t = i % 4, block = i / kWarp % blocks, round = i / kWarp / blocks;
        const int channel = round * L::kChannels + g, r = 8 * block;
        uint32_t* to = reinterpret_cast<uint32_t*>(memory) + i * kLaneWords;
        if constexpr (kHalf<T>) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float first = at(channel + 8 * half, r + 2 * t), second = at(channel + 8 * half, r + 2 * t + 1);
            const float high_first = static_cast<float>(T(first)), high_second = static_cast<float>(T(second));
            to[half] = pack<T>(high_first, high_second);
            to[2 + half] = pack<T>(first - high_first, second - high_second);
          }
        } else {
#pragma unroll
          for (int which = 0; which < 4; ++which) {
            const float value = at(channel + which % 2 * 8, r + t + which / 2 * 4);
            const float high = of_bits(bits_of(value) & kTf32Mask);
            to[which] = bits_of(high);
            to[4 + which] = bits_of(value - high) & kTf32Mask;
          }
        }
      }
    } else {
      for (int i = threadIdx.x; i < rounds * L::kChannels * rank; i += blockDim.x)
        memory[i] = at(i % (rounds * L::kChannels), i / (rounds * L::kChannels));  // (rank, channels)
    }
  }

  // Adds the ranks first ... end - 1, staged, to v.
  DASS_DEVICE void add_product(Run<S> (&v)[2], const LowRankRows<T, kLanes>& rows, int round, int rounds, int first, int end,
                               int rank) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kCores) {
      const int g = lane / 4, t = lane % 4, blocks = (rank + 7) / 8;
      const int column = g / 2 * 8 + g % 2;  // the step of the first of the four products
      const uint32_t* weights = reinterpret_cast<const uint32_t*>(memory) + (round * blocks * kWarp + lane) * kLaneWords;
      const uint32_t* staged = reinterpret_cast<const uint32_t*>(rows.low_rank) + t * LowRankRows<T, kLanes>::kPitch + column;
      float c[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) c[j][0] = v[0][2 * j], c[j][1] = v[0][2 * j + 1], c[j][2] = v[1][2 * j], c[j][3] = v[1][2 * j + 1];
      int block = first / 8;
      const int last = (end + 7) / 8;
      if constexpr (kHalf<T>) {
        constexpr int step = 4 * LowRankRows<T, kLanes>::kPitch;  // four pairs of rows
        for (; block + 1 < last; block += 2, staged += 2 * step) {
          const uint4 one = *reinterpret_cast<const uint4*>(weights + block * kWarp * kLaneWords);
          const uint4 two = *reinterpret_cast<const uint4*>(weights + (block + 1) * kWarp * kLaneWords);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t b0 = staged[2 * j], b1 = staged[step + 2 * j];
            multiply_16<T>(c[j], one.x, one.y, two.x, two.y, b0, b1);
            multiply_16<T>(c[j], one.z, one.w, two.z, two.w, b0, b1);
          }
        }
        if (block < last) {
          const uint4 one = *reinterpret_cast<const uint4*>(weights + block * kWarp * kLaneWords);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply_8<T>(c[j], one.x, one.y, staged[2 * j]);
            multiply_8<T>(c[j], one.z, one.w, staged[2 * j]);
          }
        }
      } else {
        constexpr int step = 4 * LowRankRows<T, kLanes>::kPitch;  // four rows
        for (; block < last; ++block, staged += 2 * step) {
          const uint4 high = *reinterpret_cast<const uint4*>(weights + block * kWarp * kLaneWords);
          const uint4 low = *reinterpret_cast<const uint4*>(weights + block * kWarp * kLaneWords + 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t word0 = staged[2 * j], word1 = staged[step + 2 * j];
            const uint32_t b0 = word0 & kTf32Mask, b1 = word1 & kTf32Mask;
            const uint32_t b2 = bits_of(of_bits(word0) - of_bits(b0)) & kTf32Mask;
            const uint32_t b3 = bits_of(of_bits(word1) - of_bits(b1)) & kTf32Mask;
            multiply_tf32(c[j], high.x, high.y, high.z, high.w, b2, b3);  // small terms first
            multiply_tf32(c[j], low.x, low.y, low.z, low.w, b0, b1);
            multiply_tf32(c[j], high.x, high.y, high.z, high.w, b0, b1);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) v[0][2 * j] = c[j][0], v[0][2 * j + 1] = c[j][1], v[1][2 * j] = c[j][2], v[1][2 * j + 1] = c[j][3];
    } else {
      const int group = lane / kLanes, place = lane % kLanes;
      for (int r = first; r < end; ++r) {
        Run<S> low_rank;
        load_run<S>(low_rank, rows.low_rank + (r - first) * L::kPiece + place * kRun, kRun, true);
        const S* weight = memory + r * rounds * L::kChannels + round * L::kChannels + group;
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int i = 0; i < kRun; ++i) v[c][i] += weight[c * L::kGroups] * low_rank[i];
      }
    }
  }
};

}  // namespace dass
