// The device's own instructions, and launches. Its twin: emulation/device_host.h.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/types.h"

#define DASS_DEVICE __device__ __forceinline__

namespace dass {

constexpr unsigned kAllLanes = ~0u;

template <typename T>
DASS_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char dass_shared[];
  return reinterpret_cast<T*>(dass_shared);
}

DASS_DEVICE float exp2_approximate(float x) {  // 2 ulp; biased near 0, so not for float32 data
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DASS_DEVICE float reciprocal(float x) {  // 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DASS_DEVICE float maximum(float a, float b) {  // of NaN and a number: NaN
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DASS_DEVICE float minimum(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DASS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DASS_DEVICE float of_bits(uint32_t x) { return __uint_as_float(x); }

// Tensor cores: c += a b for c (16 x 8), lane = 4 g + t. A lane holds of c the rows g and g + 8 at the columns 2t and 2t + 1;
// of a the same rows, of b the column g; along the inner axis: 16-bit, two to a word, 2t and 2t + 1 (then + 8); tf32, t (then
// t + 4).
template <typename T>
DASS_DEVICE void multiply_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {  // inner axis 8, bfloat16 or float16
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
template <typename T>
DASS_DEVICE void multiply_16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DASS_DEVICE void multiply_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const Device& device,
            std::common_type_t<Parameters>... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("dass_ops: the tensors need more than 2^31 - 1 thread blocks; split the batch.");
  cudaError_t status = cudaSuccess;
  if (shared_bytes > (48 << 10))
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess) {
    kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, static_cast<cudaStream_t>(device.stream)>>>(arguments...);
    status = cudaGetLastError();
  }
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("dass_ops: a CUDA kernel could not be launched (") + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status) + "; " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                             " threads, " + std::to_string(shared_bytes) + " bytes of shared memory).");
}

}  // namespace dass
