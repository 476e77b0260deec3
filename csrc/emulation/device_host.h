// The names of kernels/device_cuda.h on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "emulation/cuda_emulation.h"
#include "kernels/types.h"

#define DASS_DEVICE inline

namespace dass {

constexpr unsigned kAllLanes = ~0u;

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared);
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float maximum(float a, float b) { return a < b ? b : b != b ? b : a; }
inline float minimum(float a, float b) { return b < a ? b : b != b ? b : a; }
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

// What a lane brings to a product on tensor cores: words of a, then words of b.
struct Fragments {
  uint32_t a[4], b[2];
};

template <typename T>
float element(uint32_t word, int which) {
  return static_cast<float>(T(static_cast<unsigned short>(word >> (16 * which)), T::from_bits()));
}
inline float as_tf32(uint32_t word) { return of_bits(word & kTf32Mask); }  // the other bits are ignored

// a_at(fragments, row half, inner), b_at(fragments, inner) read an element of the lane (g, inner's t).
template <int kInner, typename Lane, typename A, typename B>
void multiply(float (&c)[4], const Fragments& mine, const Lane& lane_of, const A& a_at, const B& b_at) {
  const auto all = emulation::share(emulation::Wait::multiply, mine);
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    float sum = 0;
    for (int inner = 0; inner < kInner; ++inner)
      sum += a_at(all.of(4 * g + lane_of(inner)), i / 2, inner) * b_at(all.of(4 * column + lane_of(inner)), inner);
    c[i] += sum;
  }
}

template <typename T, int kInner>
void multiply_half(float (&c)[4], const Fragments& mine) {
  multiply<kInner>(
      c, mine, [](int inner) { return inner % 8 / 2; },
      [](const Fragments& f, int half, int inner) { return element<T>(f.a[half + inner / 8 * 2], inner % 2); },
      [](const Fragments& f, int inner) { return element<T>(f.b[inner / 8], inner % 2); });
}

template <typename T>
void multiply_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  multiply_half<T, 8>(c, {{a0, a1, 0, 0}, {b0, 0}});
}
template <typename T>
void multiply_16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply_half<T, 16>(c, {{a0, a1, a2, a3}, {b0, b1}});
}
inline void multiply_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  multiply<8>(
      c, {{a0, a1, a2, a3}, {b0, b1}}, [](int inner) { return inner % 4; },
      [](const Fragments& f, int half, int inner) { return as_tf32(f.a[half + inner / 4 * 2]); },
      [](const Fragments& f, int inner) { return as_tf32(f.b[inner / 4]); });
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, const Device& device,
            std::common_type_t<Parameters>... arguments) {
  if (blocks == 0) return;
  if (shared_bytes > device.shared_bytes) throw std::runtime_error("dass_ops: the plan exceeds the shared memory it was given.");
  emulation::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, arguments...);
}

}  // namespace dass
