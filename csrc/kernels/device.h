// What a kernel may use: CUDA where nvcc compiles, its emulation on the host otherwise. The only #ifdef __CUDACC__ of kernels/.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation/cuda_emulation.h"
#endif

#define DASS_DEVICE __device__ __forceinline__

namespace dass {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr int64_t kSaveEvery = 256;  // steps between two boundary states

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;

// Where kernels run and what they may take. The plans depend on shapes and on this, never on what else runs.
struct Device {
  size_t shared_bytes = 0;  // that one block may have
  void* stream = nullptr;   // cudaStream_t
};

#ifdef __CUDACC__

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
DASS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DASS_DEVICE float of_bits(uint32_t x) { return __uint_as_float(x); }
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

#else

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared);
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float maximum(float a, float b) { return a < b ? b : b != b ? b : a; }
inline float minimum(float a, float b) { return b < a ? b : b != b ? b : a; }

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const Device& device,
            std::common_type_t<Parameters>... arguments) {
  if (blocks == 0) return;
  if (shared_bytes > device.shared_bytes) throw std::runtime_error("dass_ops: the plan exceeds the shared memory it was given.");
  emulation::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, arguments...);
}

#endif

}  // namespace dass
