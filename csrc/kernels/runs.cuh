// A run: kRun consecutive steps of one sequence, held by one thread in registers, and how it comes from and goes to memory.
#pragma once

#include "kernels/numeric.cuh"

namespace dass {

constexpr int kRun = 8;

template <typename S>
using Run = S[kRun];

// Whether rows that start at `data` and lie `strides` elements apart can be moved in vectors of 16 bytes.
template <typename T, typename... Strides>
bool in_vectors(const void* data, Strides... strides) {
  constexpr int64_t step = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (true && ... && (strides % step == 0));
}

template <typename T>
DASS_DEVICE void unpack(const uint32_t word, float (&pair)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    pair[0] = of_bits(word << 16);
    pair[1] = of_bits(word & 0xffff0000u);
  } else {
    pair[0] = static_cast<float>(float16(static_cast<unsigned short>(word & 0xffffu), float16::from_bits()));
    pair[1] = static_cast<float>(float16(static_cast<unsigned short>(word >> 16), float16::from_bits()));
  }
}

template <typename T>
DASS_DEVICE uint32_t pack(float first, float second) {
  return static_cast<uint32_t>(T(first).x) | static_cast<uint32_t>(T(second).x) << 16;
}

template <typename T>
struct alignas(16) Vector {  // 16 bytes, as they lie in memory
  T values[16 / sizeof(T)];
};

// The first `count` steps; the others are 0.
template <typename T>
DASS_DEVICE void load_run(Run<State<T>>& run, const T* data, int count, bool vectors) {
  if (vectors && count == kRun) {
    if constexpr (kHalf<T>) {
      const uint4 words = *reinterpret_cast<const uint4*>(data);
      const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float pair[2];
        unpack<T>(all[i], pair);
        run[2 * i] = pair[0];
        run[2 * i + 1] = pair[1];
      }
    } else {
      constexpr int width = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kRun; i += width) {
        const Vector<T> v = *reinterpret_cast<const Vector<T>*>(data + i);
#pragma unroll
        for (int j = 0; j < width; ++j) run[i + j] = v.values[j];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = i < count ? static_cast<State<T>>(data[i]) : State<T>(0);
  }
}

template <typename T>
DASS_DEVICE void store_run(T* data, const Run<State<T>>& run, int count, bool vectors) {
  if (vectors && count == kRun) {
    if constexpr (kHalf<T>) {
      *reinterpret_cast<uint4*>(data) = uint4{pack<T>(run[0], run[1]), pack<T>(run[2], run[3]), pack<T>(run[4], run[5]),
                                              pack<T>(run[6], run[7])};
    } else {
      constexpr int width = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kRun; i += width) {
        Vector<T> v;
#pragma unroll
        for (int j = 0; j < width; ++j) v.values[j] = run[i + j];
        *reinterpret_cast<Vector<T>*>(data + i) = v;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (i < count) data[i] = static_cast<T>(run[i]);
  }
}

template <typename S>
DASS_DEVICE void read_four(S (&values)[4], const S* data) {  // of memory aligned to four values
#pragma unroll
  for (int i = 0; i < 4; i += 16 / static_cast<int>(sizeof(S))) {
    const Vector<S> v = *reinterpret_cast<const Vector<S>*>(data + i);
#pragma unroll
    for (int j = 0; j < static_cast<int>(16 / sizeof(S)); ++j) values[i + j] = v.values[j];
  }
}

// Memory of dtype T or of T's state dtype, which of them is known only at run time.
template <typename T>
DASS_DEVICE void load_run(Run<State<T>>& run, const void* data, int64_t offset, int count, bool vectors, bool as_state) {
  if (as_state)
    load_run<State<T>>(run, static_cast<const State<T>*>(data) + offset, count, vectors);
  else
    load_run<T>(run, static_cast<const T*>(data) + offset, count, vectors);
}
template <typename T>
DASS_DEVICE void store_run(void* data, int64_t offset, const Run<State<T>>& run, int count, bool vectors, bool as_state) {
  if (as_state)
    store_run<State<T>>(static_cast<State<T>*>(data) + offset, run, count, vectors);
  else
    store_run<T>(static_cast<T*>(data) + offset, run, count, vectors);
}

}  // namespace dass
