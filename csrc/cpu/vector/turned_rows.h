// Stretches of rows in an I/O dtype as blocks of runs (block_scan.h), and back.
#pragma once

#if defined(DASS_VECTOR_TABLE)
#include "cpu/vector/runs_avx512.h"
#endif

namespace dass::cpu {
namespace {

template <Dtype type>
__attribute__((always_inline)) inline Block load_runs(const void* row) {
  if constexpr (type == Dtype::float32) {
    return Block::at(static_cast<const float*>(row)).turned();
  } else {
    const auto* p = static_cast<const uint16_t*>(row);
    Block r;
#if defined(DASS_VECTOR_TABLE)
    const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 2 * W);
    type == Dtype::bfloat16 ? runs_of_bfloat16(low, high, r.v) : runs_of_float16(low, high, r.v);
    return r;
#else
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) r.v[j] = type == Dtype::bfloat16 ? load_bfloat16(p + j * W) : load_float16(p + j * W);
    return r.turned();
#endif
  }
}

// `converts`: by the processor's own conversion to bfloat16.
template <Dtype type, bool converts = false>
__attribute__((always_inline)) inline void store_runs(const Block& runs, void* row, bool streamed) {
  if constexpr (type == Dtype::float32) {
    const Block natural = runs.turned();
    streamed ? natural.stream_to(static_cast<float*>(row)) : natural.to(static_cast<float*>(row));
  } else {
    auto* p = static_cast<uint16_t*>(row);
#if defined(DASS_VECTOR_BFLOAT16)
    if constexpr (converts) return convert_runs_bfloat16(p, runs.v, streamed);
#endif
#if defined(DASS_VECTOR_TABLE)
    type == Dtype::bfloat16 ? store_runs_bfloat16(p, runs.v, streamed) : store_runs_float16(p, runs.v, streamed);
#else
    const Block natural = runs.turned();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      type == Dtype::bfloat16 ? store_bfloat16(p + j * W, natural.v[j]) : store_float16(p + j * W, natural.v[j]);
#endif
  }
}

// The beginning of a block, then zeros.
__attribute__((noinline)) inline Block load_part_of_runs(Dtype type, const void* row, int64_t n) {
#if defined(DASS_VECTOR_TABLE)
  if (type != Dtype::float32) {
    Block r;
    __m512i low, high;
    load_part_of_row(static_cast<const uint16_t*>(row), n, low, high);
    type == Dtype::bfloat16 ? runs_of_bfloat16(low, high, r.v) : runs_of_float16(low, high, r.v);
    return r;
  }
#endif
  alignas(64) float part[block];
  load_row(type, row, part, n, block);
  return Block::at(part).turned();
}

// A block of runs without what lies beyond n.
inline void zero_beyond(float* runs, int64_t n) {
#if defined(DASS_VECTOR_TABLE)
  return zero_runs_beyond(runs, n);
#endif
  alignas(64) float part[block];
  Block::at(runs).turned().to(part);
  load_part_of_runs(Dtype::float32, part, n).to(runs);
}

// A stretch of a row, block by block as runs; zeros beyond its end.
struct TurnedRow {
  Dtype type;
  const void* at;
  int64_t n;

  TurnedRow(Dtype type, const void* row, int64_t begin, int64_t n) : type(type), at(element(type, row, begin)), n(n) {}
  void fetch(int64_t i) const {  // a block that will be wanted soon
    for (int64_t line = 0; line < block * size_of(type); line += 64)
      __builtin_prefetch(static_cast<const char*>(at) + i * size_of(type) + line, 0, 2);
  }
  Block operator()(int64_t i) const {
    const void* p = element(type, at, i);
    if (i + block > n) return load_part_of_runs(type, p, n - i);
    if (type == Dtype::float32) return load_runs<Dtype::float32>(p);
    return type == Dtype::bfloat16 ? load_runs<Dtype::bfloat16>(p) : load_runs<Dtype::float16>(p);
  }
};

}  // namespace
}  // namespace dass::cpu
