// The recurrence h = a h + b over a block of 4 W consecutive positions, walked from either end.
//
// A block is four vectors in memory order. Transposing 4x4 within 128-bit pieces turns every lane into a run of four positions: three
// dependent steps compose each run, a log-step scan composes the runs, and the state that enters the block is applied last, as
// h = P carry + q. So the chain from block to block is one fused multiply-add, and a block's (P, q) does not depend on the carry:
// computing them first and the carries later, chunk by chunk on several threads, gives the same bits.
#pragma once

namespace dass::cpu {
namespace {

inline void transpose4(V& a, V& b, V& c, V& d) {
  const V x0 = unpack_low(a, b), x1 = unpack_high(a, b), x2 = unpack_low(c, d), x3 = unpack_high(c, d);
  a = unpack_low_pairs(x0, x2);
  b = unpack_high_pairs(x0, x2);
  c = unpack_low_pairs(x1, x3);
  d = unpack_high_pairs(x1, x3);
}

template <int s, bool reversed>
inline void compose_step(V& a, V& b) {
  const V b_before = shift<s, reversed>(b, all(0.0f)), a_before = shift<s, reversed>(a, all(1.0f));
  b = fma(a, b_before, b);
  a = a * a_before;
}

// Inclusive scan over the lanes of the pairs (a, b), "first f then g" being (a_g a_f, a_g b_f + b_g).
template <bool reversed>
inline void compose_lanes(V& a, V& b) {
  compose_step<1, reversed>(a, b);
  compose_step<2, reversed>(a, b);
  if constexpr (W > 4) compose_step<4, reversed>(a, b);
  if constexpr (W > 8) compose_step<8, reversed>(a, b);
}

constexpr int block = 4 * W;

template <bool reversed>
struct BlockScan {
  V a[4], b[4];  // as loaded; later in runs: lane = run, index = place in the run
  V P, q;        // composition of all runs up to and including that of the lane

  void compose() {
    transpose4(a[0], a[1], a[2], a[3]);
    transpose4(b[0], b[1], b[2], b[3]);
    constexpr int first = reversed ? 3 : 0, step = reversed ? -1 : 1;
#pragma GCC unroll 4
    for (int i = 1; i < 4; ++i) {
      const int here = first + i * step, before = here - step;
      b[here] = fma(a[here], b[before], b[here]);
      a[here] = a[here] * a[before];
    }
    constexpr int last = reversed ? 0 : 3;
    P = groups_in_order(a[last]);
    q = groups_in_order(b[last]);
    compose_lanes<reversed>(P, q);
  }

  // b becomes h at every position; the carry (the same in all lanes) the state after the block.
  void apply(V& carry) {
    const V h = fma(P, carry, q), before = before_each_group<reversed>(h, carry);
    carry = last_everywhere<reversed>(h);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) b[i] = fma(a[i], before, b[i]);
    transpose4(b[0], b[1], b[2], b[3]);
  }
};

}  // namespace
}  // namespace dass::cpu
