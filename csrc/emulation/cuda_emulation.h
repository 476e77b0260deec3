// CUDA kernels as host C++: one OS thread runs a grid, block after block, with a fiber for each CUDA thread.
//
// Found out here: barriers and shuffles that not every thread of the warp or block reaches (an error that says who waits
// where), missing barriers (one of the two orders in which fibers run then reads shared memory before it is written, which
// holds NaN), reads of shared memory that nothing wrote, and, under ASan and UBSan, every access out of bounds.
// Not found out: bank conflicts, coalescing, order between blocks, speed.
//
// DASS_OPS_EMULATION_ORDER=reverse runs fibers from the last to the first.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

constexpr unsigned kWarp = 32;

enum class Wait : uint8_t { nothing, shuffle_up, shuffle_down, shuffle_xor, shuffle_index, multiply, warp, block, finished };

// What a fiber can see of itself and of the others in its warp.
struct Thread {
  dim3 index;
  Wait wait;
  unsigned turn;        // of the two slots, so that a shuffle needs one barrier and not two
  uint64_t slot[2][4];  // what this thread shares with its warp
};

struct Grid {
  dim3 size, block, index;  // in blocks, in threads, of the block that runs
};

// __thread and not thread_local: no check for a constructor at every access.
extern __thread Thread* thread;  // the one that runs
extern __thread char* shared;    // the block's dynamic shared memory
extern __thread Grid* grid;

void park(Wait wait);  // until every thread that has to has come to the same place

struct Body {  // a reference to a callable: std::function without the allocation
  const void* object;
  void (*call)(const void*);
};
void run_grid(dim3 size, dim3 block, size_t shared_bytes, Body body);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 size, dim3 block, size_t shared_bytes, const Arguments&... arguments) {
  const auto call = [&] { kernel(arguments...); };
  run_grid(size, block, shared_bytes, {&call, [](const void* object) { (*static_cast<const decltype(call)*>(object))(); }});
}

template <typename T>
struct Shared {  // what each lane of the warp brought
  const Thread* first;
  unsigned turn;

  T of(unsigned lane) const {
    T value;
    std::memcpy(&value, first[lane].slot[turn], sizeof(T));
    return value;
  }
};

template <typename T>
Shared<T> share(Wait kind, const T& value) {
  static_assert(sizeof(T) <= sizeof(Thread::slot[0]));
  const unsigned turn = thread->turn ^= 1;
  std::memcpy(thread->slot[turn], &value, sizeof(T));
  park(kind);
  return {thread - thread->index.x % kWarp, turn};
}

template <typename T>
T exchange(Wait kind, T value, unsigned source, bool inside) {
  const Shared<T> all = share(kind, value);
  return inside ? all.of(source) : value;
}

inline unsigned lane() { return thread->index.x % kWarp; }

}  // namespace emulation

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx (::emulation::thread->index)
#define blockIdx (::emulation::grid->index)
#define blockDim (::emulation::grid->block)
#define gridDim (::emulation::grid->size)

inline void __syncthreads() { emulation::park(emulation::Wait::block); }
inline void __syncwarp(unsigned = ~0u) { emulation::park(emulation::Wait::warp); }

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance, unsigned width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(emulation::Wait::shuffle_up, value, lane - distance, lane % width >= distance);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance, unsigned width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(emulation::Wait::shuffle_down, value, lane + distance, lane % width + distance < width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask, unsigned = 32) {
  return emulation::exchange(emulation::Wait::shuffle_xor, value, emulation::lane() ^ mask, true);
}
template <typename T>
T __shfl_sync(unsigned, T value, unsigned source, unsigned width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::exchange(emulation::Wait::shuffle_index, value, lane - lane % width + source % width, true);
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
