// What the host side of the kernels needs to know of them: dtypes, and where they run. No CUDA here.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace dass {

constexpr int kWarp = 32;
constexpr uint32_t kTf32Mask = 0xffffe000u;  // 10 bits of mantissa
constexpr int64_t kSaveEvery = 256;  // steps between two boundary states

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;

template <typename T>
using State = std::conditional_t<std::is_same_v<T, double>, double, float>;  // the dtype of arithmetic, states and parameters

template <typename T>
constexpr bool kHalf = sizeof(T) == 2;

// Where kernels run and what they may take. Plans depend on shapes and on this, never on what else runs.
struct Device {
  size_t shared_bytes = 0;   // that one block may have
  int64_t few_blocks = 264;  // that leave some of it idle: two for each multiprocessor of the largest GPUs; the same for all GPUs
  void* stream = nullptr;   // cudaStream_t
};

}  // namespace dass
