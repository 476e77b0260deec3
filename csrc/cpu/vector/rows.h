// Stretches of memory in an I/O dtype as rows of floats, and the loops over rows that the kernels share.
#pragma once

namespace dass::cpu {
namespace {

inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr int64_t size_of(Dtype type) { return type == Dtype::float32 ? 4 : 2; }
inline const void* element(Dtype type, const void* data, int64_t i) {
  return static_cast<const char*>(data) + i * size_of(type);
}
inline void* element(Dtype type, void* data, int64_t i) { return static_cast<char*>(data) + i * size_of(type); }

// W numbers from the i-th on.
template <Dtype type>
inline V load_as(const void* from, int64_t i) {
  if constexpr (type == Dtype::float32) return load(static_cast<const float*>(from) + i);
  const uint16_t* p = static_cast<const uint16_t*>(from) + i;
  return type == Dtype::bfloat16 ? load_bfloat16(p) : load_float16(p);
}
template <Dtype type>
inline void store_as(void* to, int64_t i, V x) {
  if constexpr (type == Dtype::float32) return store(static_cast<float*>(to) + i, x);
  uint16_t* p = static_cast<uint16_t*>(to) + i;
  type == Dtype::bfloat16 ? store_bfloat16(p, x) : store_float16(p, x);
}
// n numbers as floats, then zeros up to `padded` (a multiple of W).
inline void load_row(Dtype type, const void* from, float* to, int64_t n, int64_t padded) {
  int64_t i = 0;
  if (type == Dtype::float32) {
    const float* p = static_cast<const float*>(from);
    for (; i + W <= n; i += W) store(to + i, load(p + i));
    if (i < n) store(to + i, load_part(p + i, static_cast<int>(n - i)));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(from);
    const auto convert = [type](const uint16_t* q) { return type == Dtype::bfloat16 ? load_bfloat16(q) : load_float16(q); };
    for (; i + W <= n; i += W) store(to + i, convert(p + i));
    if (i < n) {
      uint16_t part[W] = {};
      __builtin_memcpy(part, p + i, 2 * (n - i));
      store(to + i, convert(part));
    }
  }
  for (i = round_up(n, W); i < padded; i += W) store(to + i, all(0.0f));
}

// The row itself where it is float32 and nothing has to be padded, else a copy in `spare`.
inline const float* row_of(Dtype type, const void* from, float* spare, int64_t n, int64_t padded) {
  if (type == Dtype::float32 && n == padded) return static_cast<const float*>(from);
  load_row(type, from, spare, n, padded);
  return spare;
}

inline void store_row(Dtype type, void* to, const float* from, int64_t n) {
  int64_t i = 0;
  if (type == Dtype::float32) {
    float* p = static_cast<float*>(to);
    for (; i + W <= n; i += W) store(p + i, load(from + i));
    if (i < n) store_part(p + i, load(from + i), static_cast<int>(n - i));
  } else {
    uint16_t* p = static_cast<uint16_t*>(to);
    const auto convert = [type](uint16_t* q, V x) { type == Dtype::bfloat16 ? store_bfloat16(q, x) : store_float16(q, x); };
    for (; i + W <= n; i += W) convert(p + i, load(from + i));
    if (i < n) {
      uint16_t part[W];
      convert(part, load(from + i));
      __builtin_memcpy(p + i, part, 2 * (n - i));
    }
  }
}

// visit(type) with the dtype as a constant of the program.
template <typename Visit>
inline void with_dtype(Dtype type, Visit visit) {
  switch (type) {
    case Dtype::bfloat16: return visit(std::integral_constant<Dtype, Dtype::bfloat16>());
    case Dtype::float16: return visit(std::integral_constant<Dtype, Dtype::float16>());
    default: return visit(std::integral_constant<Dtype, Dtype::float32>());
  }
}

// Past the caches to memory of any alignment.
inline void stream_bytes(char* to, const char* from, int64_t bytes) {
  const int64_t head = smaller_of(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64));
  __builtin_memcpy(to, from, head);
  int64_t i = head;
  for (; i + 4 * W <= bytes; i += 4 * W) stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  __builtin_memcpy(to + i, from + i, bytes - i);
}

// The first n of W floats, of which there may be none or more, then zeros.
inline V load_clipped(const float* p, int64_t n) { return load_part(p, static_cast<int>(larger_of(0, smaller_of(W, n)))); }

// What a tile of this many elements will need soon, fetched in the course of the loops over the present one: hardware prefetchers
// stop at the end of a page, and rows end everywhere. Into the second-level cache: the first has no room for it. Null: nothing.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes = 4;  // of an element

  void fetch(int64_t i) const {
    if (at != nullptr) __builtin_prefetch(at + i * bytes, 0, 2);
  }
  void fetch_lines(int64_t i) const {  // of four vectors
    if (at == nullptr) return;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) __builtin_prefetch(at + (i + j * W) * bytes, 0, 2);
  }
};

// softplus(v + bias) of n numbers.
inline void softplus_row(const float* v, float bias, float* to, int64_t n, Ahead ahead) {
  const V shift_by = all(bias);
#if defined(DASS_VECTOR_TABLE)
  SoftplusNear near;
  for (int64_t i = 0; i < n; i += W) {
    ahead.fetch(i);
    store(to + i, near(load(v + i) + shift_by));
  }
  if (near.was_far())
    for (int64_t i = 0; i < n; i += W) store(to + i, softplus(load(v + i) + shift_by));
#else  // two loops: each keeps its constants in registers
  for (int64_t i = 0; i < n; i += W) {
    ahead.fetch(i);
    store(to + i, exp_of_negative_magnitude(load(v + i) + shift_by));
  }
  for (int64_t i = 0; i < n; i += W) store(to + i, softplus_from(load(v + i) + shift_by, load(to + i)));
#endif
}

// y times silu(z).
inline void gate_row(float* y, const float* z, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const V gate = load(z + i);
    store(y + i, load(y + i) * gate * sigmoid_from(gate, exp_of_negative_magnitude(gate)));
  }
}

inline void fill_row(float* to, float value, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store(to + i, all(value));
}

}  // namespace
}  // namespace dass::cpu
