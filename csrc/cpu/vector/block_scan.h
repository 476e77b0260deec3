// The recurrence h = a h + b over a block of 4 W consecutive positions, walked from either end.
//
// Four vectors in memory order are turned into "runs" by transposing 4x4 within 128-bit pieces: every lane then holds four
// consecutive positions, one in each of the four vectors. Three dependent steps compose each run. Then W / 4 blocks at once (a
// "square" of W vectors): turning the pieces of what their runs do brings a vector's runs one above the other, three more steps
// compose them, and one log-step scan over lanes composes W vectors. From the state that enters the square the same way leads
// back to the states that enter the runs, and to all others.
#pragma once

namespace dass::cpu {
namespace {

constexpr int block = 4 * W;

inline void transpose4(V& a, V& b, V& c, V& d) {
  const V x0 = unpack_low(a, b), x1 = unpack_high(a, b), x2 = unpack_low(c, d), x3 = unpack_high(c, d);
  a = unpack_low_pairs(x0, x2);
  b = unpack_high_pairs(x0, x2);
  c = unpack_low_pairs(x1, x3);
  d = unpack_high_pairs(x1, x3);
}

// One block of a row, as runs or as it lies; the turn is its own inverse.
struct Block {
  V v[4];

  static Block at(const float* p) {
    return {{load(p), load(p + W), load(p + 2 * W), load(p + 3 * W)}};
  }
  void to(float* p) const {
    store(p, v[0]), store(p + W, v[1]), store(p + 2 * W, v[2]), store(p + 3 * W, v[3]);
  }
  void stream_to(float* p) const {
    stream(p, v[0]), stream(p + W, v[1]), stream(p + 2 * W, v[2]), stream(p + 3 * W, v[3]);
  }
  Block turned() const {
    Block r = *this;
    transpose4(r.v[0], r.v[1], r.v[2], r.v[3]);
    return r;
  }
};

// One step of a log-step scan over the lanes of each span; the last `s` that is needed is half a span.
template <int s, bool reversed, int span = W>
inline void compose_step(V& a, V& b) {
  if constexpr (s < span) {
    const V b_before = shift<s, reversed, span>(b, all(0.0f)), a_before = shift<s, reversed, span>(a, all(1.0f));
    b = fma(a, b_before, b);
    a = a * a_before;
  }
}

// What a run does to the state, lane by lane: h becomes P h + q.
struct Effect {
  V P, q;
};

// What each of a block's runs does to the state: "first f then g" is (a_g a_f, a_g b_f + b_g).
template <bool reversed>
inline Effect compose_runs(const Block& a, const Block& b) {
  constexpr int first = reversed ? 3 : 0, step = reversed ? -1 : 1;
  V P = a.v[first], q = b.v[first];
#pragma GCC unroll 4
  for (int i = 1; i < 4; ++i) {
    q = fma(a.v[first + i * step], q, b.v[first + i * step]);
    P = a.v[first + i * step] * P;
  }
  return {P, q};
}

// W / 4 blocks, a square of W vectors, at once: the states that enter their runs, from the runs' effects, and the carry moves on.
// Turning the pieces of the effects as well leaves one log-step scan, over the W vectors, instead of one in each block.
// With a span of less than W vectors, several rows of that many: the carry then has a lane for each vector, and becomes the states
// after each.
constexpr int square_blocks = W / 4;

template <bool reversed, int span = W>
inline void enter_square(const Effect* runs, V* entering, V& carry) {
  constexpr int first = reversed ? square_blocks - 1 : 0, step = reversed ? -1 : 1;
  V P[square_blocks], q[square_blocks], h[square_blocks];
#pragma GCC unroll 4
  for (int i = 0; i < square_blocks; ++i) P[i] = runs[i].P, q[i] = runs[i].q;
  transpose_pieces(P);
  transpose_pieces(q);
  V a = P[first], b = q[first];
#pragma GCC unroll 4
  for (int i = 1; i < square_blocks; ++i) {
    b = fma(P[first + i * step], b, q[first + i * step]);
    a = P[first + i * step] * a;
  }
  compose_step<1, reversed, span>(a, b);
  compose_step<2, reversed, span>(a, b);
  compose_step<4, reversed, span>(a, b);
  compose_step<8, reversed, span>(a, b);
  const V after = fma(a, carry, b);
  h[first] = shift<1, reversed, span>(after, carry);
  carry = span == W ? last_everywhere<reversed>(after) : after;
#pragma GCC unroll 4
  for (int i = 1; i < square_blocks; ++i)
    h[first + i * step] = fma(P[first + (i - 1) * step], h[first + (i - 1) * step], q[first + (i - 1) * step]);
  transpose_pieces(h);
#pragma GCC unroll 4
  for (int i = 0; i < square_blocks; ++i) entering[i] = h[i];
}

// The same for any number of blocks, from the state that enters them; the rest of the last square leaves the state as it is.
template <bool reversed>
inline void enter_blocks(Effect* runs, V* entering, int64_t blocks, V& carry) {
  for (; blocks % square_blocks != 0; ++blocks) runs[blocks] = {all(1.0f), all(0.0f)};
  for (int64_t walked = 0; walked < blocks; walked += square_blocks) {
    const int64_t at = reversed ? blocks - square_blocks - walked : walked;
    enter_square<reversed>(runs + at, entering + at, carry);
  }
}

// What each square does to the carry, in scan order: put(P, q), the same in all lanes.
template <bool reversed, typename Put>
inline void effects_of_blocks(Effect* runs, V* entering, int64_t blocks, Put put) {
  for (; blocks % square_blocks != 0; ++blocks) runs[blocks] = {all(1.0f), all(0.0f)};
  for (int64_t walked = 0; walked < blocks; walked += square_blocks) {
    Effect* const square = runs + (reversed ? blocks - square_blocks - walked : walked);
    V P = all(1.0f), q = all(0.0f);
    enter_square<reversed>(square, entering, q);
    for (int i = 0; i < square_blocks; ++i) square[i].q = all(0.0f);
    enter_square<reversed>(square, entering, P);
    put(P, q);
  }
}

// visit(i) for the places in a run in scan order.
template <bool reversed, typename Visit>
inline void along_run(Visit visit) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) visit(reversed ? 3 - i : i);
}

}  // namespace
}  // namespace dass::cpu
