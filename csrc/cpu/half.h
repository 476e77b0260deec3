// bfloat16 and IEEE half precision as bits, one number at a time; rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace dass::cpu {
namespace {

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too low; a product puts that right, for denormal numbers too.
  return float_of(sign | bits_of_float(float_of(rest << 13) * 5.192296858534828e33f));
}
inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000)  // denormal: adding 1/2 aligns the last place kept with that of a float near 1/2
    return static_cast<uint16_t>(sign | (bits_of_float(float_of(magnitude) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

}  // namespace
}  // namespace dass::cpu
