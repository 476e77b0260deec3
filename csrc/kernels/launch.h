// The entry points of the kernels, by I/O dtype. Torch-free; their definitions are in scan_launch.cuh and ss2d_launch.cuh, and
// each dtype is compiled in a file of its own, in cuda/ and in emulation/.
//
// A call is planned twice with the same result: `workspace` says how many bytes of scratch memory it needs (256-byte aligned),
// `run` gets them. Nothing is allocated, nothing waits for the device.
#pragma once

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "kernels/types.h"

namespace dass {

template <typename T>
struct ScanKernels {
  static size_t workspace(const ScanForward&, const Device&);
  static size_t workspace(const ScanBackward&, const Device&);
  static void run(const ScanForward&, const Device&, void* workspace);
  static void run(const ScanBackward&, const Device&, void* workspace);
};

template <typename T>
struct Ss2dKernels {
  static size_t workspace(const Ss2dForward&, const Device&);
  static size_t workspace(const Ss2dBackward&, const Device&);
  static void run(const Ss2dForward&, const Device&, void* workspace);
  static void run(const Ss2dBackward&, const Device&, void* workspace);
};

// Calls function(Family<T>{}) for the dtype of the data.
template <template <typename> class Family, typename Function>
auto for_dtype(Dtype io, Function&& function) {
  switch (io) {
    case Dtype::float64: return function(Family<double>{});
    case Dtype::bfloat16: return function(Family<bfloat16>{});
    case Dtype::float16: return function(Family<float16>{});
    default: return function(Family<float>{});
  }
}

// Hands out pieces of the workspace; without memory it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take(int64_t count, size_t size) {
    char* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * size + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

inline void check_chunk(int64_t chunk) {
  if (chunk != 0 && chunk != kSaveEvery)
    throw std::runtime_error("chunk is " + std::to_string(chunk) + "; the CUDA kernels save a state every " +
                             std::to_string(kSaveEvery) + " steps, or none (chunk 0).");
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dass
