// Kernels for test_emulation.py: right ones, and ones with the mistakes that the emulation is there to find.
#include <cstring>
#include <stdexcept>
#include <string>

#include "emulation/cuda_emulation.h"

namespace {

float* shared_floats() { return reinterpret_cast<float*>(emulation::shared); }

// out[i] = in[0] + ... + in[i] over a block, by shuffles and one exchange between the warps.
__global__ void block_scan(const float* in, float* out) {
  const unsigned i = threadIdx.x, lane = i % 32, warp = i / 32;
  float sum = in[i];
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const float earlier = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += earlier;
  }
  if (lane == 31) shared_floats()[warp] = sum;
  __syncthreads();
  for (unsigned w = 0; w < warp; ++w) sum += shared_floats()[w];
  out[i] = sum;
}

// Lanes turned by one place, down and up and by xor and by index: out[i] = (i + 1) % 32, 31 and 0 staying at the ends.
__global__ void shuffles(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  out[i] = __shfl_down_sync(~0u, in[i], 1);
  out[32 + i] = __shfl_up_sync(~0u, in[i], 1);
  out[64 + i] = __shfl_xor_sync(~0u, in[i], 5);
  out[96 + i] = __shfl_sync(~0u, in[i], 3, 8);
}

template <bool kBarrier>
__global__ void neighbour_of_next_warp(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  shared_floats()[i] = in[i];
  if (kBarrier) __syncthreads();
  out[i] = shared_floats()[(i + 32) % blockDim.x];
}

template <bool kBarrier>
__global__ void neighbour_in_warp(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  shared_floats()[i] = in[i];
  if (kBarrier) __syncwarp();
  out[i] = shared_floats()[i ^ 1];
}

// A buffer that is written again before everybody has read it.
template <bool kBarrier>
__global__ void buffer_reused(const float* in, float* out) {
  const unsigned i = threadIdx.x;
  float sum = 0;
  for (int turn = 0; turn < 3; ++turn) {
    shared_floats()[i] = in[i] + turn;
    __syncthreads();
    sum += shared_floats()[(i + 32) % blockDim.x];
    if (kBarrier) __syncthreads();
  }
  out[i] = sum;
}

__global__ void reads_what_nobody_wrote(const float*, float* out) { out[threadIdx.x] = shared_floats()[threadIdx.x + 1]; }

__global__ void shuffle_of_half_a_warp(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
}

__global__ void barrier_of_one_warp(const float* in, float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void throws(const float*, float*) {
  if (threadIdx.x == 5) throw std::runtime_error("thread 5 gave up");
  __syncthreads();
}

__global__ void writes_out_of_bounds(const float* in, float* out) { shared_floats()[blockDim.x + threadIdx.x] = out[0] = in[0]; }

struct Named {
  const char* name;
  void (*kernel)(const float*, float*);
};

const Named kernels[] = {
    {"block_scan", block_scan},
    {"shuffles", shuffles},
    {"neighbour_of_next_warp", neighbour_of_next_warp<true>},
    {"neighbour_of_next_warp without a barrier", neighbour_of_next_warp<false>},
    {"neighbour_in_warp", neighbour_in_warp<true>},
    {"neighbour_in_warp without a barrier", neighbour_in_warp<false>},
    {"buffer_reused", buffer_reused<true>},
    {"buffer_reused without a barrier", buffer_reused<false>},
    {"reads_what_nobody_wrote", reads_what_nobody_wrote},
    {"shuffle_of_half_a_warp", shuffle_of_half_a_warp},
    {"barrier_of_one_warp", barrier_of_one_warp},
    {"throws", throws},
    {"writes_out_of_bounds", writes_out_of_bounds},
};

}  // namespace

// Runs the kernel `name` as one block; an empty string, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, const float* in, float* out, unsigned threads,
                                                                  size_t shared_bytes) {
  static thread_local std::string problem;
  problem = std::string("no kernel ") + name;
  for (const Named& named : kernels) {
    if (std::strcmp(named.name, name)) continue;
    try {
      emulation::launch(named.kernel, dim3(1), dim3(threads), shared_bytes, in, out);
      problem.clear();
    } catch (const std::exception& error) {
      problem = error.what();
    }
  }
  return problem.c_str();
}
