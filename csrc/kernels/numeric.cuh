// Arithmetic by I/O dtype: float32 data keeps float32 accuracy, 16-bit data takes the fast exponential, float64 the library's.
// Numbers and their errors: section 5 of SCAN.md.
#pragma once

#include "kernels/device.h"

namespace dass {

constexpr double kLog2E = 1.4426950408889634074;

DASS_DEVICE double maximum(double a, double b) { return a < b ? b : a; }  // keeps a NaN in a

// 2^(whole + part) with |part| <= 1/2 and shifted = whole + 1.5 * 2^23. The polynomial is 1 + part * q(part), degree 5: exact
// where the result is near 1, 1.6e-7 at the ends (own fit). 2^whole is 0 at whole = -127 and infinite at 128.
DASS_DEVICE float exp2_polynomial(float shifted, float part) {
  float q = 0.0013264722046353484f;
  q = fmaf(q, part, 0.009671512997047655f);
  q = fmaf(q, part, 0.055507337603904854f);
  q = fmaf(q, part, 0.24022242077583716f);
  q = fmaf(q, part, 0.6931469775872137f);
  return fmaf(q, part, 1.0f) * of_bits((bits_of(shifted) << 23) + 0x3f800000u);
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits

template <typename T>
DASS_DEVICE State<T> exp2_of(State<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return exp2(x);
  } else if constexpr (kHalf<T>) {
    return exp2_approximate(x);
  } else {
    x = minimum(maximum(x, -127.0f), 128.0f);
    const float shifted = x + kRound;
    return exp2_polynomial(shifted, x - (shifted - kRound));
  }
}

// exp(x) for x <= 0.
template <typename T>
DASS_DEVICE State<T> exp_negative(State<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return exp(x);
  } else if constexpr (kHalf<T>) {
    return exp2_approximate(x * static_cast<float>(kLog2E));
  } else {
    constexpr float high = static_cast<float>(kLog2E), low = static_cast<float>(kLog2E - high);
    x = maximum(x, -88.0f);
    const float shifted = fmaf(x, high, kRound), whole = shifted - kRound;
    return exp2_polynomial(shifted, fmaf(x, low, fmaf(x, high, -whole)));
  }
}

// log1p(z) for 0 <= z <= 1, as z (1 + z q(z)); relative error 1.6e-7 at degree 8, 1e-5 at degree 5 (own fits). Unlike forms
// through log2(1 + z) it keeps its digits for small z.
template <typename T>
DASS_DEVICE State<T> log1p_unit(State<T> z) {
  if constexpr (std::is_same_v<T, double>) {
    return log1p(z);
  } else if constexpr (kHalf<T>) {
    float q = -0.024734505724971066f;
    q = fmaf(q, z, 0.10359255233401214f);
    q = fmaf(q, z, -0.21240413223960591f);
    q = fmaf(q, z, 0.32622605787303893f);
    q = fmaf(q, z, -0.49953947070027394f);
    return z * fmaf(q, z, 1.0f);
  } else {
    float q = 0.005364684823077502f;
    q = fmaf(q, z, -0.030065234432526063f);
    q = fmaf(q, z, 0.07920363009490324f);
    q = fmaf(q, z, -0.13753725939335099f);
    q = fmaf(q, z, 0.19153619349759135f);
    q = fmaf(q, z, -0.248571547362578f);
    q = fmaf(q, z, 0.3332132154176129f);
    q = fmaf(q, z, -0.4999964791845646f);
    return z * fmaf(q, z, 1.0f);
  }
}

DASS_DEVICE float divide_one_by(float x) { return reciprocal(x); }
DASS_DEVICE double divide_one_by(double x) { return 1.0 / x; }

template <typename S>
struct Softplus {
  S value, slope;  // slope: the logistic function
};

template <typename T>
DASS_DEVICE Softplus<State<T>> softplus(State<T> v) {
  using S = State<T>;
  const S z = exp_negative<T>(v > S(0) ? -v : v), r = divide_one_by(S(1) + z);
  return {maximum(v, S(0)) + log1p_unit<T>(z), v > S(0) ? r : z * r};
}

template <typename T>
DASS_DEVICE State<T> logistic(State<T> v) {
  using S = State<T>;
  const S z = exp_negative<T>(v > S(0) ? -v : v), r = divide_one_by(S(1) + z);
  return v > S(0) ? r : z * r;
}

// A log2(e), of which exp2 is taken; or that of A = -exp(logarithm).
template <typename T>
DASS_DEVICE State<T> base2_factor(State<T> A, bool logarithm) {
  using S = State<T>;
  if constexpr (std::is_same_v<S, double>) return (logarithm ? -exp(A) : A) * S(kLog2E);
  else return (logarithm ? -expf(A) : A) * S(kLog2E);
}

}  // namespace dass
