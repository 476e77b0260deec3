// Softplus and its slope, the logistic function, of four vectors at a time: step sizes for a backward.
#pragma once

namespace dass::cpu {
namespace {

#if defined(DASS_VECTOR_TABLE)
// As SoftplusNear in elementary.h, one degree higher: the derivative of the same polynomial is then good enough to be the slope, and
// comes with it for six products. In whole - t, so that it is the slope and not its negative. Fitted for the least relative error of
// both, each coefficient rounded before the next.
alignas(64) constexpr float softplus_slope_coefficients[8][16] = {
    {6.931472e-01f, 3.132617e-01f, 1.2692802e-01f, 4.8587352e-02f, 1.8149927e-02f, 6.7153485e-03f, 2.4756852e-03f, 9.114664e-04f,
     3.3540637e-04f, 1.2340219e-04f, 4.5398898e-05f, 1.670156e-05f, 6.1441933e-06f, 2.260327e-06f, 8.315284e-07f, 3.0590226e-07f},
    {5.0e-01f, 2.6894143e-01f, 1.1920293e-01f, 4.7425874e-02f, 1.798621e-02f, 6.692851e-03f, 2.4726233e-03f, 9.110512e-04f,
     3.3535014e-04f, 1.2339458e-04f, 4.539787e-05f, 1.670142e-05f, 6.1441747e-06f, 2.2603244e-06f, 8.3152804e-07f, 3.0590223e-07f},
    {1.2499999e-01f, 9.830603e-02f, 5.249679e-02f, 2.258832e-02f, 8.831355e-03f, 3.3240286e-03f, 1.2332547e-03f, 4.5511065e-04f,
     1.6761887e-04f, 6.168968e-05f, 2.2697908e-05f, 8.350571e-06f, 3.0720691e-06f, 1.1301597e-06f, 4.157638e-07f, 1.5295115e-07f},
    {1.3667622e-07f, 1.5142778e-02f, 1.33270575e-02f, 6.815271e-03f, 2.8378924e-03f, 1.093177e-03f, 4.0905012e-04f, 1.5142704e-04f,
     5.5835328e-05f, 2.0558085e-05f, 7.5652674e-06f, 2.783449e-06f, 1.0240076e-06f, 3.767151e-07f, 1.3858737e-07f, 5.098354e-08f},
    {-5.2062287e-03f, -1.4731751e-03f, 1.6187589e-03f, 1.3723145e-03f, 6.5796287e-04f, 2.6594923e-04f, 1.0124758e-04f, 3.771721e-05f,
     1.39394315e-05f, 5.1367824e-06f, 1.890884e-06f, 6.957989e-07f, 2.559826e-07f, 9.4174865e-08f, 3.4644682e-08f, 1.2744943e-08f},
    {1.17356585e-05f, -1.0280341e-03f, -1.7309721e-04f, 1.5596142e-04f, 1.11790585e-04f, 5.0304992e-05f, 1.9858471e-05f, 7.489637e-06f,
     2.7813314e-06f, 1.0267321e-06f, 3.781537e-07f, 1.3907257e-07f, 5.1212158e-08f, 1.8853752e-08f, 6.930968e-09f, 2.5497895e-09f},
    {3.7984335e-04f, -6.338868e-05f, -1.2002192e-04f, -8.001954e-06f, 1.2313426e-05f, 7.462698e-06f, 3.1955128e-06f, 1.2400782e-06f,
     4.6524167e-07f, 1.7226415e-07f, 6.355254e-08f, 2.3349125e-08f, 8.614247e-09f, 3.1665772e-09f, 1.1666136e-09f, 4.2949233e-10f},
    {4.5693017e-05f, 5.3356573e-05f, -2.0822014e-05f, -7.847888e-06f, 2.1212982e-07f, 7.8729073e-07f, 3.9612092e-07f, 1.6881e-07f,
     6.4022814e-08f, 2.3790626e-08f, 8.837889e-09f, 3.4099208e-09f, 1.1964302e-09f, 4.1709924e-10f, 1.6275875e-10f, 5.991267e-11f}};

// Of |v| <= softplus_near, for loops: the coefficients stay in registers.
struct SoftplusAndSlope {
  V coefficients[8], seen = all(to_whole);

  SoftplusAndSlope() {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) coefficients[i] = in_register(load(softplus_slope_coefficients[i]));
  }
  // v becomes its softplus. Step by step for all n vectors, by force: the processor does not look far enough ahead to interleave them.
  template <int n>
  void apply(V* v, V* slope) {
    V index[n], r[n], derivative[n], q[n];
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      const V t = magnitude(v[i]);
      index[i] = t + all(to_whole);
      r[i] = (index[i] - all(to_whole)) - t;
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i += 2) seen = any_bits(seen, index[i], index[(i + 1) % n]);
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      derivative[i] = table(coefficients[7], index[i]);
      q[i] = in_register(fma(derivative[i], r[i], table(coefficients[6], index[i])));
    }
#pragma GCC unroll 5
    for (int k = 5; k > 0; --k)
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        derivative[i] = in_register(fma(derivative[i], r[i], q[i]));
        q[i] = in_register(fma(q[i], r[i], table(coefficients[k], index[i])));
      }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      derivative[i] = fma(derivative[i], r[i], q[i]);  // the slope at -t
      slope[i] = one_minus_where_not_negative(v[i], derivative[i]);
      v[i] = fma(q[i], r[i], plus_where_not_negative(v[i], table(coefficients[0], index[i])));
    }
  }
  void operator()(V& v, V& slope) { apply<1>(&v, &slope); }
  void operator()(Block& v, Block& slope) { apply<4>(v.v, slope.v); }
  bool was_far() const { return any_bits_but_lowest_4(seen, to_whole); }  // some v so far: its results are not valid
};
#else
struct SoftplusAndSlope {
  void operator()(V& v, V& slope) const {
    const V e = exp_of_negative_magnitude(v);
    slope = sigmoid_from(v, e);
    v = softplus_from(v, e);
  }
  void operator()(Block& v, Block& slope) const {
    for (int i = 0; i < 4; ++i) (*this)(v.v[i], slope.v[i]);
  }
  bool was_far() const { return false; }
};
#endif

}  // namespace
}  // namespace dass::cpu
