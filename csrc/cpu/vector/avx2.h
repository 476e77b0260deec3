// The vector layer over AVX2 and FMA: 8 floats. What each function does is said in portable.h, its plainest form.
#pragma once

#include <immintrin.h>

namespace dass::cpu {
namespace {

using V = __m256;
constexpr int W = 8;
constexpr bool fused = true;

inline V all(float x) { return _mm256_set1_ps(x); }
inline V in_register(V x) {
  asm("" : "+x"(x));
  return x;
}
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline void stream(float* p, V x) { _mm256_stream_ps(p, x); }
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V load_part(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_part(float* p, V x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }

inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline V smaller(V a, V b) { return _mm256_min_ps(a, b); }
inline V negative_magnitude(V x) { return _mm256_or_ps(x, all(-0.0f)); }
inline V nearest(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power_of_two(V p, V n) {
  // In two factors: 2^n alone is no float for n = 128, nor (a normal one) below -126.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const __m256i one = _mm256_set1_epi32(127);
  const V x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, one), 23));
  const V y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, one), 23));
  return _mm256_mul_ps(_mm256_mul_ps(p, x), y);
}
inline V reciprocal(V x) {
  V r = _mm256_rcp_ps(x);
  r = fma(r, _mm256_fnmadd_ps(x, r, all(1.0f)), r);
  return fma(r, _mm256_fnmadd_ps(x, r, all(1.0f)), r);
}
inline V where_not_negative(V x, V a, V b) { return _mm256_blendv_ps(a, b, x); }

inline V load_bfloat16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline V load_float16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_bfloat16(uint16_t* p, V x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_float16(uint16_t* p, V x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline V unpack_low(V a, V b) { return _mm256_unpacklo_ps(a, b); }
inline V unpack_high(V a, V b) { return _mm256_unpackhi_ps(a, b); }
inline V unpack_low_pairs(V a, V b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
inline V unpack_high_pairs(V a, V b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}

template <int s, bool reversed, int span = W>
inline V shift(V x, V fill) {
  static_assert(span == W);
  if constexpr (s == 4) return _mm256_permute2f128_ps(x, fill, reversed ? 0x21 : 0x02);
  constexpr int by = reversed ? s : 8 - s;
  const __m256i from = _mm256_setr_epi32(by & 7, (by + 1) & 7, (by + 2) & 7, (by + 3) & 7, (by + 4) & 7, (by + 5) & 7,
                                         (by + 6) & 7, (by + 7) & 7);
  constexpr int filled = reversed ? 0xff & (0xff << (8 - s)) : (1 << s) - 1;
  return _mm256_blend_ps(_mm256_permutevar8x32_ps(x, from), fill, filled);
}
template <bool reversed>
inline V last_everywhere(V x) {
  return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(reversed ? 0 : 7));
}

inline void transpose_pieces(V* r) {
  const V low = _mm256_permute2f128_ps(r[0], r[1], 0x20), high = _mm256_permute2f128_ps(r[0], r[1], 0x31);
  r[0] = low;
  r[1] = high;
}

inline V sum_pieces(const V* z) {
  return _mm256_permute2f128_ps(z[0], z[1], 0x20) + _mm256_permute2f128_ps(z[0], z[1], 0x31);
}

}  // namespace
}  // namespace dass::cpu
