// The states that enter pieces of a sequence, from the pieces' summaries: h_out = exp(A S) h_in + q, equation (11) of SCAN.md.
//
// A lane owns a channel; the warps of a block share the pieces of one sequence: each folds its own, the block folds the warps'
// results, each warp walks its pieces again and replaces every q by the state that enters the piece.
#pragma once

#include "arguments.h"
#include "kernels/numeric.cuh"

namespace dass {

struct CarryWork {
  int64_t batch, directions, channels, state, pieces;
  uint64_t down;            // bit k: direction k walks from the last piece to the first
  void* states;             // (batch, directions, pieces, state, channels): q, then what enters
  const void* sums;         // (batch, directions, pieces, channels): S
  const void* A;            // (..., channels, state), or its logarithms
  bool logarithms;          // A = -exp(logarithms)
  int64_t A_first, A_step;  // direction k of the states is direction A_first + k * A_step of A
  const void* initial;      // (batch, directions, channels, state), or null: zeros
};

constexpr int kCarryWarps = 8;

template <typename T>
__global__ void __launch_bounds__(kCarryWarps * kWarp) carry_kernel(const CarryWork work) {
  using S = State<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t blocks = (work.channels + kWarp - 1) / kWarp;
  int64_t index = blockIdx.x;
  const int64_t d = index % blocks * kWarp + lane;
  index /= blocks;
  const int64_t n = index % work.state, row = index / work.state;  // row: batch and direction
  const int64_t k = row % work.directions;
  const bool down = (work.down >> k) & 1, active = d < work.channels;
  const int64_t share = (work.pieces + warps - 1) / warps;
  const int64_t begin = share * warp < work.pieces ? share * warp : work.pieces;
  const int64_t end = begin + share < work.pieces ? begin + share : work.pieces;

  S* states = static_cast<S*>(work.states) + (row * work.pieces * work.state + n) * work.channels + d;
  const S* sums = static_cast<const S*>(work.sums) + row * work.pieces * work.channels + d;
  const int64_t state_stride = work.state * work.channels;
  S A2 = 0, factor = 1, sum = 0;
  if (active) {
    A2 = base2_factor<T>(static_cast<const S*>(work.A)[((work.A_first + k * work.A_step) * work.channels + d) * work.state + n],
                        work.logarithms);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t piece = down ? work.pieces - 1 - s : s;
      const S P = exp2_of<T>(A2 * sums[piece * work.channels]);
      sum = P * sum + states[piece * state_stride];
      factor *= P;
    }
  }
  S* exchanged = shared_memory<S>();  // (warps, 2, lanes)
  exchanged[(2 * warp) * kWarp + lane] = factor;
  exchanged[(2 * warp + 1) * kWarp + lane] = sum;
  __syncthreads();
  if (!active) return;
  S h = work.initial ? static_cast<const S*>(work.initial)[(row * work.channels + d) * work.state + n] : S(0);
  for (int earlier = 0; earlier < warp; ++earlier)
    h = exchanged[(2 * earlier) * kWarp + lane] * h + exchanged[(2 * earlier + 1) * kWarp + lane];
  for (int64_t s = begin; s < end; ++s) {
    const int64_t piece = down ? work.pieces - 1 - s : s;
    const S q = states[piece * state_stride];
    states[piece * state_stride] = h;
    h = exp2_of<T>(A2 * sums[piece * work.channels]) * h + q;
  }
}

template <typename T>
void launch_carry(const CarryWork& work, const Device& device) {
  const int64_t warps = work.pieces / 8 < 1 ? 1 : work.pieces / 8 < kCarryWarps ? work.pieces / 8 : kCarryWarps;
  launch(carry_kernel<T>, work.batch * work.directions * work.state * ((work.channels + kWarp - 1) / kWarp),
         static_cast<int>(warps) * kWarp, 2 * warps * kWarp * sizeof(State<T>), device, work);
}

}  // namespace dass
