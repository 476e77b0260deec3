// Blocks of 16-bit numbers as runs (block_scan.h) and back, with AVX-512: pairs of them are moved as one number of 32 bits, half
// as many as after conversion.
#pragma once

namespace dass::cpu {
namespace {

// Lane 4 p + i of run vectors 2 h and 2 h + 1 is pair 8 i + 2 p + h of the row.
inline __m512i pairs_of_runs(int h) {
  return _mm512_add_epi32(_mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30), _mm512_set1_epi32(h));
}
// The other way: pair 16 i' + k of the row is a lane of the first vector of pairs or (from 16 on) of the second.
inline __m512i runs_of_pairs(int half) {
  return _mm512_add_epi32(_mm512_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28, 1, 17, 5, 21, 9, 25, 13, 29), _mm512_set1_epi32(2 * half));
}

__attribute__((always_inline)) inline void store_pairs(uint16_t* p, __m512i first, __m512i second, bool streamed) {
  const __m512i low = _mm512_permutex2var_epi32(first, runs_of_pairs(0), second);
  const __m512i high = _mm512_permutex2var_epi32(first, runs_of_pairs(1), second);
  if (streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), low);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p + 32), high);
  } else {
    _mm512_storeu_si512(p, low);
    _mm512_storeu_si512(p + 32, high);
  }
}

__attribute__((always_inline)) inline void load_runs_bfloat16(const uint16_t* p, V* runs) {
  const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 32);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i pairs = _mm512_permutex2var_epi32(low, pairs_of_runs(h), high);
    runs[2 * h] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    runs[2 * h + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
}
__attribute__((always_inline)) inline void load_runs_float16(const uint16_t* p, V* runs) {
  const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 32);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i pairs = _mm512_permutex2var_epi32(low, pairs_of_runs(h), high);
    runs[2 * h] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    runs[2 * h + 1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  }
}

// Rounded to nearest even, in the upper half of each lane.
inline __m512i rounded_bfloat16(V x) {
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc00000));
}
__attribute__((always_inline)) inline void store_runs_bfloat16(uint16_t* p, const V* runs, bool streamed) {
  __m512i pairs[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
    pairs[h] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded_bfloat16(runs[2 * h]), 16),
                                       rounded_bfloat16(runs[2 * h + 1]));
  store_pairs(p, pairs[0], pairs[1], streamed);
}
__attribute__((always_inline)) inline void store_runs_float16(uint16_t* p, const V* runs, bool streamed) {
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m512i pairs[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
    pairs[h] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm512_cvtps_ph(runs[2 * h], rounding)),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_cvtps_ph(runs[2 * h + 1], rounding)), 16));
  store_pairs(p, pairs[0], pairs[1], streamed);
}

}  // namespace
}  // namespace dass::cpu
