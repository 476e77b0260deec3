// Sums of partial results, in a fixed order.
#pragma once

#include "kernels/numeric.cuh"

namespace dass {

constexpr int kSumWarps = 8;

// out[i] = parts[0][i] + parts[1][i] + ... A block takes 32 neighbouring results; each of its warps adds up every eighth part.
template <typename S, typename Out>
__global__ void __launch_bounds__(kSumWarps * kWarp) sum_parts_kernel(const S* parts, Out* out, int64_t count, int64_t size) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  S sum = 0;
  if (i < size)
#pragma unroll 4
    for (int64_t p = warp; p < count; p += warps) sum += parts[p * size + i];
  S* sums = shared_memory<S>();
  sums[warp * kWarp + lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= size) return;
  for (int other = 1; other < warps; ++other) sum += sums[other * kWarp + lane];
  out[i] = static_cast<Out>(sum);
}

template <typename S, typename Out>
void sum_parts(const void* parts, void* out, int64_t count, int64_t size, const Device& device) {
  const int warps = count < kSumWarps ? static_cast<int>(count > 0 ? count : 1) : kSumWarps;
  launch(sum_parts_kernel<S, Out>, (size + kWarp - 1) / kWarp, warps * kWarp, warps * kWarp * sizeof(S), device,
         static_cast<const S*>(parts), static_cast<Out*>(out), count, size);
}

}  // namespace dass
