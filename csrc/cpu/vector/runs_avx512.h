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

__attribute__((always_inline)) inline void store_halves(uint16_t* p, __m512i low, __m512i high, bool streamed) {
  if (streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), low);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p + 32), high);
  } else {
    _mm512_storeu_si512(p, low);
    _mm512_storeu_si512(p + 32, high);
  }
}
__attribute__((always_inline)) inline void store_pairs(uint16_t* p, __m512i first, __m512i second, bool streamed) {
  const __m512i low = _mm512_permutex2var_epi32(first, runs_of_pairs(0), second);
  const __m512i high = _mm512_permutex2var_epi32(first, runs_of_pairs(1), second);
  store_halves(p, low, high, streamed);
}

__attribute__((always_inline)) inline void runs_of_bfloat16(__m512i low, __m512i high, V* runs) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i pairs = _mm512_permutex2var_epi32(low, pairs_of_runs(h), high);
    runs[2 * h] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    runs[2 * h + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
}
__attribute__((always_inline)) inline void runs_of_float16(__m512i low, __m512i high, V* runs) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i pairs = _mm512_permutex2var_epi32(low, pairs_of_runs(h), high);
    runs[2 * h] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    runs[2 * h + 1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  }
}

// The first n of 64 numbers, then zeros.
__attribute__((always_inline)) inline void load_part_of_row(const uint16_t* p, int64_t n, __m512i& low, __m512i& high) {
  const uint64_t there = n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(there), p);
  high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(there >> 32), p + 32);
}
// Without what lies beyond n; lane 4 p + i of run vector j is number 16 i + 4 p + j.
inline void zero_runs_beyond(float* runs, int64_t n) {
  const __m512i first = _mm512_setr_epi32(0, 16, 32, 48, 4, 20, 36, 52, 8, 24, 40, 56, 12, 28, 44, 60);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __mmask16 there = _mm512_cmplt_epi32_mask(first, _mm512_set1_epi32(static_cast<int>(n) - j));
    store(runs + j * W, _mm512_maskz_mov_ps(there, load(runs + j * W)));
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

#if !defined(__clang__)
#define DASS_VECTOR_BFLOAT16  // where AVX-512 BF16 is present, too, which is known at run time
inline bool converts_bfloat16() {
  static const bool present = __builtin_cpu_supports("avx512bf16");
  return present;
}
// Numbers of less than the least normal one become 0; otherwise as above.
__attribute__((always_inline)) inline void convert_runs_bfloat16(uint16_t* p, const V* runs, bool streamed) {
  __m512i first, second;  // as assembly, since the rest is compiled for processors without
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(first) : "v"(runs[0]), "v"(runs[1]));
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(second) : "v"(runs[2]), "v"(runs[3]));
  // Number 16 i + 4 p + j of the row is lane 4 p + i of run vector j.
  alignas(64) static constexpr uint16_t places[32] = {0, 16, 32, 48, 4, 20, 36, 52, 8,  24, 40, 56, 12, 28, 44, 60,
                                                      1, 17, 33, 49, 5, 21, 37, 53, 9,  25, 41, 57, 13, 29, 45, 61};
  const __m512i of_low = _mm512_load_si512(places), of_high = _mm512_add_epi16(of_low, _mm512_set1_epi16(2));
  const __m512i low = _mm512_permutex2var_epi16(first, of_low, second), high = _mm512_permutex2var_epi16(first, of_high, second);
  store_halves(p, low, high, streamed);
}
#endif

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
