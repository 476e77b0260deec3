// exp, softplus and sigmoid of vectors, accurate to about 1.5e-7 relative wherever the result is a normal float.
//
// The kernels use the pieces: a decay factor is exp2 of (A log2 e) dt, dt is a softplus, and its slope comes from dt. Polynomials are minimax fits (Lawson's algorithm on Chebyshev nodes).
#pragma once

namespace dass::cpu {
namespace {

constexpr float log2_e = 1.44269504088896341f, log2_e_rest = 1.925963033500011e-08f;

inline V exp2_polynomial(V r) {  // 2^r, |r| <= 1/2; exactly 1 at 0, where decay factors need their accuracy
  V p = fma(all(1.326472731307149e-03f), r, all(9.671512991189957e-03f));
  p = fma(p, r, all(5.550733581185341e-02f));
  p = fma(p, r, all(2.4022242426872253e-01f));
  p = fma(p, r, all(6.931470036506653e-01f));
  return fma(p, r, all(1.0f));
}

inline V exp2(V x) {
#if defined(DASS_VECTOR_REMAINDER)
  return times_power_of_two(exp2_polynomial(remainder(x)), nearest(x));
#else
  x = larger(all(-151.0f), smaller(all(129.0f), x));  // keeps infinities out of the subtraction; NaN stays
  const V n = nearest(x);
  return times_power_of_two(exp2_polynomial(x - n), n);
#endif
}

// exp(-|v|), to full accuracy for large |v| as well: the product with log2(e) is carried in two parts, or, where that would be
// rounded, n log(2) is, the first part so short that its product with n is exact.
inline V exp_of_negative_magnitude(V v) {
  v = larger(all(-104.0f), negative_magnitude(v));
  const V n = nearest(v * all(log2_e));
  V r;
  if constexpr (fused)
    r = fma(v, all(log2_e_rest), fms(v, all(log2_e), n));
  else
    r = ((v - n * all(0.693359375f)) - n * all(-2.12194440e-4f)) * all(log2_e);
  return times_power_of_two(exp2_polynomial(r), n);
}

constexpr float to_whole = 12582912.0f;  // added to |x| < 2^22, leaves the nearest whole number in the lowest bits

#if defined(DASS_VECTOR_TABLE)
// Without the exponential: log(1 + exp(-t)) as one polynomial for each t = |v| within 1/2 of a whole number. Coefficients fitted for
// the least relative error, one after the other, each rounded before the next; a third fewer operations than by way of e.
constexpr float softplus_near = 15.499999f;  // beyond, the nearest whole number is not in the tables
alignas(64) constexpr float softplus_coefficients[7][16] = {
    {6.931472e-01f, 3.132617e-01f, 1.2692802e-01f, 4.8587352e-02f, 1.8149927e-02f, 6.7153485e-03f, 2.4756852e-03f, 9.114665e-04f,
     3.3540637e-04f, 1.2340219e-04f, 4.53989e-05f, 1.6701562e-05f, 6.1441933e-06f, 2.260327e-06f, 8.315284e-07f, 3.059023e-07f},
    {-5.0000024e-01f, -2.689415e-01f, -1.1920293e-01f, -4.7425866e-02f, -1.798621e-02f, -6.692852e-03f, -2.4726233e-03f, -9.1105123e-04f,
     -3.353502e-04f, -1.2339461e-04f, -4.5397872e-05f, -1.6701422e-05f, -6.144175e-06f, -2.2603244e-06f, -8.3152827e-07f, -3.0590223e-07f},
    {1.2500504e-01f, 9.830587e-02f, 5.2496694e-02f, 2.2588337e-02f, 8.831393e-03f, 3.3240272e-03f, 1.2332519e-03f, 4.5510932e-04f,
     1.6761887e-04f, 6.1689585e-05f, 2.2697783e-05f, 8.350514e-06f, 3.0720685e-06f, 1.1301563e-06f, 4.1576305e-07f, 1.5295015e-07f},
    {-3.9651564e-05f, -1.5140249e-02f, -1.332761e-02f, -6.81561e-03f, -2.8379e-03f, -1.0931405e-03f, -4.0903743e-04f, -1.5142113e-04f,
     -5.583262e-05f, -2.055693e-05f, -7.5649973e-06f, -2.7833432e-06f, -1.023965e-06f, -3.7670193e-07f, -1.3857921e-07f, -5.0982e-08f},
    {-5.067011e-03f, -1.4711748e-03f, 1.6189838e-03f, 1.3720283e-03f, 6.576083e-04f, 2.6597397e-04f, 1.0127535e-04f, 3.7730075e-05f,
     1.3940722e-05f, 5.1378634e-06f, 1.892072e-06f, 6.963386e-07f, 2.5601673e-07f, 9.4207614e-08f, 3.46527e-08f, 1.2754247e-08f},
    {-2.2798323e-04f, 1.0058258e-03f, 1.8038962e-04f, -1.5280188e-04f, -1.11789675e-04f, -5.062888e-05f, -2.0005355e-05f, -7.5535904e-06f,
     -2.8068453e-06f, -1.0367081e-06f, -3.8131816e-07f, -1.4028406e-07f, -5.166719e-08f, -1.9007745e-08f, -6.999889e-09f, -2.5703613e-09f},
    {4.756394e-04f, -6.911306e-05f, -1.1956233e-04f, -7.111606e-06f, 1.3132745e-05f, 7.3840843e-06f, 3.1225268e-06f, 1.2067877e-06f,
     4.6011843e-07f, 1.6927618e-07f, 6.0587226e-08f, 2.199994e-08f, 8.490335e-09f, 3.0818932e-09f, 1.1449935e-09f, 4.0641088e-10f}};

// softplus of |v| <= softplus_near, for loops: the coefficients stay in registers.
struct SoftplusNear {
  V coefficients[7], largest = all(0.0f);

  SoftplusNear() {
#pragma GCC unroll 7
    for (int i = 0; i < 7; ++i) coefficients[i] = in_register(load(softplus_coefficients[i]));
  }
  V operator()(V v) {
    const V t = magnitude(v), index = t + all(to_whole), r = t - (index - all(to_whole));
    largest = larger_bits(largest, t);
    V q = table(coefficients[6], index);
#pragma GCC unroll 5
    for (int i = 5; i > 0; --i) q = fma(q, r, table(coefficients[i], index));
    return fma(q, r, table(coefficients[0], index) + larger_bits(v, all(0.0f)));
  }
  bool was_far() const { return any_beyond(largest, softplus_near); }  // some v so far: its result is not valid
};
inline V softplus(V v) {
  const V e = exp_of_negative_magnitude(v), far = fma(e * all(-0.5f), e, e) + larger(all(0.0f), v);
  return where_beyond(magnitude(v), softplus_near, far, SoftplusNear()(v));
}
#else
// log(1 + e) + plus for e in [0, 1].
inline V log_one_plus(V e, V plus) {
  V q = fma(all(-3.2440228387713432e-03f), e, all(1.9851455464959145e-02f));
  q = fma(q, e, all(-5.6959524750709534e-02f));
  q = fma(q, e, all(1.0603655129671097e-01f));
  q = fma(q, e, all(-1.5305593609809875e-01f));
  q = fma(q, e, all(1.967594027519226e-01f));
  q = fma(q, e, all(-2.4954134225845337e-01f));
  q = fma(q, e, all(3.332996368408203e-01f));
  q = fma(q, e, all(-4.999990165233612e-01f));
  q = fma(q, e, all(1.0f));
  return fma(q, e, plus);
}

// softplus(v) = max(v, 0) + log(1 + e) for e = exp(-|v|).
inline V softplus_from(V v, V e) { return log_one_plus(e, larger(all(0.0f), v)); }

inline V softplus(V v) { return softplus_from(v, exp_of_negative_magnitude(v)); }
struct SoftplusNear {
  V operator()(V v) const { return softplus(v); }
  bool was_far() const { return false; }
};
#endif

// 2^x for loops that wait for the multipliers: x to the nearest 16th from a table, a cubic for the rest, so that they have 5
// operations to do instead of 6. Nearer 1 than the polynomial: 1 - a to 1.1e-7 of itself, but for the rounding of a.
#if defined(DASS_VECTOR_TABLE)
alignas(64) constexpr float roots_of_two[16] = {1.0f,        1.0442737f,  1.09050773f, 1.13878863f, 1.18920711f, 1.24185781f,
                                                1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                                1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
struct Exp2 {
  V roots;

  Exp2() : roots(in_register(load(roots_of_two))) {}
  V operator()(V x) const {
    constexpr float to_16ths = to_whole / 16;
    const V index = x + all(to_16ths), r = remainder_of_16ths(x), root = table(roots, index);
    V q = fma(all(5.55026717e-02f), r, all(2.4023357e-01f));
    q = fma(q, r, all(6.93147182e-01f));
    return times_power_of_two(fma(root, q * r, root), index - all(to_16ths));
  }
};
#else
struct Exp2 {
  V operator()(V x) const { return exp2(x); }
};
#endif

// 1 - exp(-s) for s >= 0, accurate for small s as well: the sigmoid of v where s is its softplus, the slope of that. With r = x - n
// and 2^r = 1 + r q, it is (1 - 2^n) - 2^n r q, and n is 0 for small s. So it is q whose relative error counts.
inline V slope_of_softplus(V s) {
  const V x = larger(all(-151.0f), s * all(-log2_e)), n = nearest(x), r = x - n, scale = times_power_of_two(all(1.0f), n);
  V q = fma(all(1.5382083074655384e-04f), r, all(1.3387383660301566e-03f));
  q = fma(q, r, all(9.618311189115047e-03f));
  q = fma(q, r, all(5.550367385149002e-02f));
  q = fma(q, r, all(2.4022649228572845e-01f));
  q = fma(q, r, all(6.931471824645996e-01f));
  return fma(q * r, all(0.0f) - scale, all(1.0f) - scale);
}

inline V sigmoid_from(V v, V e) { return where_not_negative(v, all(1.0f), e) * reciprocal(e + all(1.0f)); }

}  // namespace
}  // namespace dass::cpu
