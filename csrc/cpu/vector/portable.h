// The vector layer in the compiler's own vectors of 4 floats: any processor, and the description of what the others do.
#pragma once

#include <cstring>

#include "cpu/half.h"

namespace dass::cpu {
namespace {

using V = float __attribute__((vector_size(16), may_alias));
using Integers = int32_t __attribute__((vector_size(16), may_alias));
constexpr int W = 4;
constexpr bool fused = false;  // whether fma and fms round once

inline Integers bits_of(V x) { return reinterpret_cast<Integers>(x); }
inline V from_bits(Integers x) { return reinterpret_cast<V>(x); }

template <int i0, int i1, int i2, int i3>
inline V shuffle(V a, V b) {  // lanes 0 to 3 of a, 4 to 7 of b
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i0, i1, i2, i3);
#else
  return __builtin_shuffle(a, b, Integers{i0, i1, i2, i3});
#endif
}

inline V all(float x) { return V{x, x, x, x}; }
inline V in_register(V x) { return x; }  // x, which the compiler is to keep instead of loading it again
inline V load(const float* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
inline void stream(float* p, V x) { store(p, x); }  // past the caches where the processor can; p aligned to a vector
inline V load_part(const float* p, int n) {         // the first n lanes, the others 0
  V x = all(0.0f);
  std::memcpy(&x, p, 4 * n);
  return x;
}
inline void store_part(float* p, V x, int n) { std::memcpy(p, &x, 4 * n); }

inline V fma(V a, V b, V c) { return a * b + c; }
inline V fms(V a, V b, V c) { return a * b - c; }
inline V larger(V a, V b) { return a > b ? a : b; }  // b where either is NaN
inline V smaller(V a, V b) { return a < b ? a : b; }
inline V negative_magnitude(V x) { return from_bits(bits_of(x) | INT32_MIN); }
inline V nearest(V x) {  // to even, for |x| < 2^22
  const V magic = all(12582912.0f);
  return (x + magic) - magic;
}
inline V times_power_of_two(V p, V n) {  // p 2^n, n whole, -151 <= n <= 129
  const Integers whole = __builtin_convertvector(n, Integers), half = whole >> 1;
  return p * from_bits((half + 127) << 23) * from_bits((whole - half + 127) << 23);
}
inline V reciprocal(V x) { return 1.0f / x; }
inline V where_not_negative(V x, V a, V b) { return bits_of(x) < 0 ? b : a; }

inline V load_bfloat16(const uint16_t* p) { return V{from_bfloat16(p[0]), from_bfloat16(p[1]), from_bfloat16(p[2]), from_bfloat16(p[3])}; }
inline V load_float16(const uint16_t* p) { return V{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])}; }
inline void store_bfloat16(uint16_t* p, V x) {
  for (int i = 0; i < W; ++i) p[i] = to_bfloat16(x[i]);
}
inline void store_float16(uint16_t* p, V x) {
  for (int i = 0; i < W; ++i) p[i] = to_float16(x[i]);
}

// Within each piece of 128 bits: a0 b0 a1 b1; a2 b2 a3 b3; and the same with pairs of lanes as units.
inline V unpack_low(V a, V b) { return shuffle<0, 4, 1, 5>(a, b); }
inline V unpack_high(V a, V b) { return shuffle<2, 6, 3, 7>(a, b); }
inline V unpack_low_pairs(V a, V b) { return shuffle<0, 1, 4, 5>(a, b); }
inline V unpack_high_pairs(V a, V b) { return shuffle<2, 3, 6, 7>(a, b); }

// x moved s lanes up (down if reversed) within each `span` lanes, filled from `fill` (the same in all lanes of a span). AVX-512 alone
// has spans of less than a vector.
template <int s, bool reversed, int span = W>
inline V shift(V x, V fill) {
  static_assert(span == W);
  if constexpr (reversed)
    return shuffle<s, s + 1, s + 2, s + 3>(x, fill);
  else
    return shuffle<8 - s - 4, 9 - s - 4, 10 - s - 4, 11 - s - 4>(fill, x);
}
template <bool reversed>
inline V last_everywhere(V x) {  // the last lane (the first if reversed) in all lanes
  return all(x[reversed ? 0 : 3]);
}

inline void transpose_pieces(V*) {}  // W / 4 vectors: piece g of vector p <-> piece p of vector g
inline V sum_pieces(const V* z) { return z[0]; }     // piece g of the result: the sum of the pieces of z[g]

}  // namespace
}  // namespace dass::cpu
