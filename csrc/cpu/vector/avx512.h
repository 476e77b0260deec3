// The vector layer over AVX-512: 16 floats. What each function does is said in portable.h, its plainest form.
#pragma once

#include <immintrin.h>

#define DASS_VECTOR_TABLE  // 16 entries looked up in a register
#define DASS_VECTOR_REMAINDER  // x - nearest(x), 0 where x is infinite, in an instruction

namespace dass::cpu {
namespace {

using V = __m512;
constexpr int W = 16;
constexpr bool fused = true;

inline V all(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline void stream(float* p, V x) { _mm512_stream_ps(p, x); }
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline V load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_part(float* p, V x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
inline V negative_magnitude(V x) { return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN))); }
inline V nearest(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V remainder(V x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V remainder_of_16ths(V x) { return _mm512_reduce_ps(x, 4 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power_of_two(V p, V n) { return _mm512_scalef_ps(p, n); }
inline V reciprocal(V x) {
  const V r = _mm512_rcp14_ps(x);
  return fma(r, _mm512_fnmadd_ps(x, r, all(1.0f)), r);
}
inline V where_not_negative(V x, V a, V b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), a, b);
}
inline V table(V entries, V index) { return _mm512_permutexvar_ps(_mm512_castps_si512(index), entries); }  // by the lowest 4 bits
inline V in_register(V x) {  // GCC otherwise reads what it loaded from memory again and again
  asm("" : "+v"(x));
  return x;
}
inline __mmask16 not_negative(V x) { return _mm512_cmpge_epi32_mask(_mm512_castps_si512(x), _mm512_setzero_si512()); }
inline V plus_where_not_negative(V x, V a) { return _mm512_mask_add_ps(a, not_negative(x), a, x); }
inline V one_minus_where_not_negative(V x, V a) { return _mm512_mask_sub_ps(a, not_negative(x), all(1.0f), a); }
inline V magnitude(V x) { return _mm512_abs_ps(x); }
// Of numbers that are not negative as their bits are ordered: NaN is the largest. Integer operations have more pipes than others.
inline V larger_bits(V a, V b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline bool any_beyond(V x, float limit) { return _mm512_cmp_ps_mask(x, all(limit), _CMP_NLE_UQ) != 0; }
// Bits that are set in any of them.
inline V any_bits(V a, V b, V c) {
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b), _mm512_castps_si512(c), 0xfe));
}
inline bool any_bits_but_lowest_4(V x, float of) {
  const __m512i others = _mm512_xor_si512(_mm512_castps_si512(x), _mm512_castps_si512(all(of)));
  return _mm512_test_epi32_mask(others, _mm512_set1_epi32(~15)) != 0;
}
inline V where_beyond(V x, float limit, V a, V b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(limit), _CMP_NLE_UQ), b, a);
}

inline V load_bfloat16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline V load_float16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_bfloat16(uint16_t* p, V x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline void store_float16(uint16_t* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline V unpack_low(V a, V b) { return _mm512_unpacklo_ps(a, b); }
inline V unpack_high(V a, V b) { return _mm512_unpackhi_ps(a, b); }
inline V unpack_low_pairs(V a, V b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline V unpack_high_pairs(V a, V b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

template <int s, bool reversed, int span = W>
inline V shift(V x, V fill) {
  const __m512i a = _mm512_castps_si512(x), f = _mm512_castps_si512(fill);
  if constexpr (span < W) {
    constexpr int kept = reversed ? (1 << (span - s)) - 1 : ((1 << span) - 1) & ~((1 << s) - 1);
    constexpr __mmask16 lanes = static_cast<__mmask16>(span == 8 ? kept * 0x101 : kept * 0x1111);
    return _mm512_castsi512_ps(_mm512_mask_alignr_epi32(f, lanes, a, a, reversed ? s : W - s));
  }
  return _mm512_castsi512_ps(reversed ? _mm512_alignr_epi32(f, a, s) : _mm512_alignr_epi32(a, f, W - s));
}
template <bool reversed>
inline V last_everywhere(V x) {
  return reversed ? _mm512_broadcastss_ps(_mm512_castps512_ps128(x)) : _mm512_permutexvar_ps(_mm512_set1_epi32(15), x);
}

inline void transpose_pieces(V* r) {
  const V x0 = _mm512_shuffle_f32x4(r[0], r[1], 0x44), x1 = _mm512_shuffle_f32x4(r[0], r[1], 0xee);
  const V x2 = _mm512_shuffle_f32x4(r[2], r[3], 0x44), x3 = _mm512_shuffle_f32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_f32x4(x0, x2, 0x88);
  r[1] = _mm512_shuffle_f32x4(x0, x2, 0xdd);
  r[2] = _mm512_shuffle_f32x4(x1, x3, 0x88);
  r[3] = _mm512_shuffle_f32x4(x1, x3, 0xdd);
}

inline V sum_pieces(const V* z) {
  const V x = _mm512_shuffle_f32x4(z[0], z[1], 0x44) + _mm512_shuffle_f32x4(z[0], z[1], 0xee);
  const V y = _mm512_shuffle_f32x4(z[2], z[3], 0x44) + _mm512_shuffle_f32x4(z[2], z[3], 0xee);
  return _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xdd);
}

}  // namespace
}  // namespace dass::cpu
