// exp, softplus and sigmoid of vectors, accurate to about 1.5e-7 relative wherever the result is a normal float.
//
// The kernels use the pieces: a decay factor is exp2 of (A log2 e) dt, dt is softplus from e = exp(-|v|), and the sigmoid that
// the backward needs comes from the same e. Polynomials are minimax fits (Lawson's algorithm on Chebyshev nodes).
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
  x = larger(all(-151.0f), smaller(all(129.0f), x));  // keeps infinities out of the subtraction; NaN stays
  const V n = nearest(x);
  return times_power_of_two(exp2_polynomial(x - n), n);
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

// log(1 + e) + plus for e in [0, 1].
#if defined(DASS_VECTOR_TABLE)
// Nodes 1 + i/15: rounded inverses, and minus the logarithms of those.
alignas(64) constexpr float node_inverse[16] = {
    1.0f,         0.9375f,      0.882352948f, 0.833333313f, 0.789473712f, 0.75f,        0.714285731f, 0.681818187f,
    0.652173936f, 0.625f,       0.600000024f, 0.576923072f, 0.555555582f, 0.535714269f, 0.517241359f, 0.5f};
alignas(64) constexpr float node_log[16] = {
    0.0f,         0.0645385236f, 0.125163138f, 0.182321578f, 0.236388743f, 0.287682086f, 0.336472213f, 0.382992238f,
    0.427443981f, 0.470003635f,  0.510825574f, 0.550046325f, 0.587786615f, 0.62415433f,  0.65924567f,  0.693147182f};

inline V log_one_plus(V e, V plus) {
  const auto node = table_index(e * all(15.0f));
  const V inverse = table(node_inverse, node), f = fma(e, inverse, inverse - all(1.0f));
  V q = fma(all(-0.2501969635486603f), f, all(0.33351755142211914f));
  q = fma(q, f, all(-0.4999999701976776f));
  q = fma(q, f, all(1.0f));
  return fma(q, f, table(node_log, node) + plus);
}
#else
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
#endif

// softplus(v) = max(v, 0) + log(1 + e) for e = exp(-|v|).
inline V softplus_from(V v, V e) { return log_one_plus(e, larger(all(0.0f), v)); }

inline V softplus(V v) { return softplus_from(v, exp_of_negative_magnitude(v)); }

inline V sigmoid_from(V v, V e) { return where_not_negative(v, all(1.0f), e) * reciprocal(e + all(1.0f)); }

}  // namespace
}  // namespace dass::cpu
