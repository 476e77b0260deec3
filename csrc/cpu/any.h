// What the kernels for any size and dtype share: rows in the I/O dtype as rows in the state dtype, elementary functions in
// loops a compiler vectorises, and one chunk of one channel's scan in either direction.
//
// `S` is the state dtype, in which everything is computed. A row is a stretch of positions in memory order; a reversed direction
// walks it from its end.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"

namespace dass::cpu {

constexpr int64_t default_chunk = 256;

inline int64_t bytes(Dtype type) {
  return type == Dtype::float64 ? 8 : type == Dtype::float32 ? 4 : 2;
}

template <typename T, typename S>
inline void convert_row(const T* from, S* to, int64_t n, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<S>(from[i * stride]);
  }
}

// n elements of `type` from `data` + offset (elements), `stride` apart, as S.
template <typename S>
inline void load_row(Dtype type, const void* data, int64_t offset, S* to, int64_t n, int64_t stride = 1) {
  switch (type) {
    case Dtype::float32: return convert_row(static_cast<const float*>(data) + offset, to, n, stride);
    case Dtype::float64: return convert_row(static_cast<const double*>(data) + offset, to, n, stride);
    case Dtype::bfloat16: return convert_row(static_cast<const c10::BFloat16*>(data) + offset, to, n, stride);
    case Dtype::float16: return convert_row(static_cast<const c10::Half*>(data) + offset, to, n, stride);
  }
}

template <typename S>
inline void store_row(Dtype type, void* data, int64_t offset, const S* from, int64_t n) {
  switch (type) {
    case Dtype::float32: return convert_row(from, static_cast<float*>(data) + offset, n, 1);
    case Dtype::float64: return convert_row(from, static_cast<double*>(data) + offset, n, 1);
    case Dtype::bfloat16: return convert_row(from, static_cast<c10::BFloat16*>(data) + offset, n, 1);
    case Dtype::float16: return convert_row(from, static_cast<c10::Half*>(data) + offset, n, 1);
  }
}

inline double exponential(double x) { return std::exp(x); }

// 2^x by a polynomial on [-1/2, 1/2] that is exactly 1 at 0: decay factors near 1 are where accuracy matters.
inline float exponential(float x) {
  const float t = std::max(std::min(x * 1.44269504088896341f, 127.5f), -150.0f);
  const float n = (t + 12582912.0f) - 12582912.0f;  // round to nearest
  // The remainder from x itself, in two parts of ln 2, so that large |x| costs no accuracy.
  const float r = ((x - n * 0.693359375f) - n * -2.12194440e-4f);
  float p = 1.3843653723597527e-03f;
  p = p * r + 8.37415549904108e-03f;
  p = p * r + 4.166800156235695e-02f;
  p = p * r + 1.6666431725025177e-01f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors: n reaches -150 (denormal results) and 128.
  const int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
  const int32_t bits0 = (half + 127) << 23, bits1 = (whole - half + 127) << 23;
  float scale0, scale1;
  std::memcpy(&scale0, &bits0, 4);
  std::memcpy(&scale1, &bits1, 4);
  const float result = p * scale0 * scale1;
  return x < -104.0f ? 0.0f : x > 88.73f ? INFINITY : x != x ? x : result;
}

inline double log_one_plus(double z) { return std::log1p(z); }

inline float log_one_plus(float z) {  // z in [0, 1]
  float q = -3.2440228387713432e-03f;
  q = q * z + 1.9851455464959145e-02f;
  q = q * z - 5.6959524750709534e-02f;
  q = q * z + 1.0603655129671097e-01f;
  q = q * z - 1.5305593609809875e-01f;
  q = q * z + 1.967594027519226e-01f;
  q = q * z - 2.4954134225845337e-01f;
  q = q * z + 3.332996368408203e-01f;
  q = q * z - 4.999990165233612e-01f;
  q = q * z + 1.0f;
  return q * z;
}

template <typename S>
inline S softplus(S v) {
  return std::max(v, S(0)) + log_one_plus(exponential(-std::abs(v)));
}

template <typename S>
inline S sigmoid(S v) {
  const S z = exponential(-std::abs(v));
  return (v >= S(0) ? S(1) : z) / (S(1) + z);
}

// Sums in a fixed order that a compiler may vectorise.
template <typename S, typename Term>
inline S sum_of(int64_t n, Term term) {
  constexpr int64_t lanes = 16;
  S partial[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t j = 0; j < lanes; ++j) partial[j] += term(i + j);
  for (int64_t j = 0; i + j < n; ++j) partial[j] += term(i + j);
  for (int64_t width = lanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) partial[j] += partial[j + width];
  return partial[0];
}

// B or C of one channel in a chunk: rows of S, `stride` apart, or N numbers that hold everywhere.
template <typename S>
struct Rows {
  const S* data = nullptr;
  int64_t stride = 0;
  bool constant = false;

  // Row n, filled into `spare` where it is a constant.
  const S* row(int64_t n, int64_t length, S* spare) const {
    if (!constant) return data + n * stride;
    std::fill(spare, spare + length, data[n]);
    return spare;
  }
};

// One chunk of one channel: its inputs, and the scratch that forward and backward share. Each pointer: `length` elements.
template <typename S>
struct Chunk {
  int64_t length = 0, state = 0;
  bool reversed = false;
  const S *u = nullptr, *dt = nullptr, *A = nullptr;
  Rows<S> B, C;
};

template <typename S>
struct Scratch {
  std::vector<S> a, w, h, mu, b_row, c_row, u, v, dt, g, y, z, du, ddt;
  explicit Scratch(int64_t n)
      : a(n), w(n), h(n), mu(n), b_row(n), c_row(n), u(n), v(n), dt(n), g(n), y(n), z(n), du(n), ddt(n) {}
};

template <typename S, typename Step>
inline void walk(int64_t length, bool reversed, Step step) {
  if (reversed)
    for (int64_t l = length - 1; l >= 0; --l) step(l);
  else
    for (int64_t l = 0; l < length; ++l) step(l);
}

// y += sum_n C h; h[n] holds the state that enters, then the one that leaves. y null: only the states.
template <typename S>
inline void chunk_forward(const Chunk<S>& c, Scratch<S>& s, S* h, S* y) {
  S *a = s.a.data(), *w = s.w.data(), *states = s.h.data();
  for (int64_t n = 0; n < c.state; ++n) {
    const S A = c.A[n];
    const S* B = c.B.row(n, c.length, s.b_row.data());
    for (int64_t l = 0; l < c.length; ++l) a[l] = exponential(c.dt[l] * A);
    for (int64_t l = 0; l < c.length; ++l) w[l] = c.dt[l] * c.u[l] * B[l];
    S state = h[n];
    walk<S>(c.length, c.reversed, [&](int64_t l) { states[l] = state = a[l] * state + w[l]; });
    h[n] = state;
    if (y == nullptr) continue;
    const S* C = c.C.row(n, c.length, s.c_row.data());
    for (int64_t l = 0; l < c.length; ++l) y[l] += C[l] * states[l];
  }
}

// Where a chunk's gradients of B and C go: rows (added to), or N sums for constants.
template <typename S>
struct GradientRows {
  S* data = nullptr;
  int64_t stride = 0;
  bool constant = false;
};

// du = sum_n lam B dt and ddt = dL/d(dt), both overwritten; d_A[n], d_B, d_C added to. mu[n] holds the gradient of the state that
// leaves the chunk, then that of the state h[n] that enters it. g is the gradient of y.
template <typename S>
inline void chunk_backward(const Chunk<S>& c, Scratch<S>& s, const S* h, const S* g, S* mu, S* du, S* ddt, S* d_A,
                           GradientRows<S> d_B, GradientRows<S> d_C) {
  S *a = s.a.data(), *ah = s.w.data(), *states = s.h.data(), *lam = s.mu.data();
  std::fill(du, du + c.length, S(0));
  std::fill(ddt, ddt + c.length, S(0));
  for (int64_t n = 0; n < c.state; ++n) {
    const S A = c.A[n];
    const S* B = c.B.row(n, c.length, s.b_row.data());
    const S* C = c.C.row(n, c.length, s.c_row.data());
    for (int64_t l = 0; l < c.length; ++l) a[l] = exponential(c.dt[l] * A);
    for (int64_t l = 0; l < c.length; ++l) lam[l] = c.dt[l] * c.u[l] * B[l];
    S state = h[n];
    walk<S>(c.length, c.reversed, [&](int64_t l) {
      ah[l] = a[l] * state;
      states[l] = state = ah[l] + lam[l];
    });
    for (int64_t l = 0; l < c.length; ++l) lam[l] = C[l] * g[l];
    S later = mu[n];
    walk<S>(c.length, !c.reversed, [&](int64_t l) {
      lam[l] += later;
      later = a[l] * lam[l];
    });
    mu[n] = later;
    for (int64_t l = 0; l < c.length; ++l) {
      du[l] += lam[l] * B[l];
      ddt[l] += lam[l] * (A * ah[l] + B[l] * c.u[l]);
    }
    d_A[n] += sum_of<S>(c.length, [&](int64_t l) { return lam[l] * c.dt[l] * ah[l]; });
    if (d_B.constant) {
      d_B.data[n] += sum_of<S>(c.length, [&](int64_t l) { return lam[l] * c.dt[l] * c.u[l]; });
    } else {
      S* row = d_B.data + n * d_B.stride;
      for (int64_t l = 0; l < c.length; ++l) row[l] += lam[l] * c.dt[l] * c.u[l];
    }
    if (d_C.constant) {
      d_C.data[n] += sum_of<S>(c.length, [&](int64_t l) { return g[l] * states[l]; });
    } else {
      S* row = d_C.data + n * d_C.stride;
      for (int64_t l = 0; l < c.length; ++l) row[l] += g[l] * states[l];
    }
  }
  for (int64_t l = 0; l < c.length; ++l) du[l] *= c.dt[l];
}

}  // namespace dass::cpu
