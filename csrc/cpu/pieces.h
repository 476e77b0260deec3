// Long rows in pieces, for when there are fewer rows than threads. What enters a piece is what leaves the one before, a short chain of
// fused multiply-adds: a task that finds the carry missing first finds its own piece's effects (P, q), block by block, waits for
// the carry, takes it through them, hands it on, and only then does its piece. Where the carry is there in time nothing is done twice.
//
// The carries come out as in a walk without pieces, to the bit, so that it may depend on the number of threads which way is taken.
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t row_piece = 16384;  // steps

// (P, q) of each square (block_scan.h) of a piece, for several numbers that are carried.
struct PieceEffects {
  float* at;

  static constexpr int64_t squares = row_piece / (W * W);
  static int64_t floats(int64_t numbers) { return 2 * squares * numbers; }

  // Of the squares from `found` on, from the effects of their runs.
  template <bool reversed>
  static void find(const PieceEffects& effects, int64_t number, int64_t found, Effect* runs, V* entering, int64_t blocks) {
    float* to = effects.at + 2 * (number * squares + found);
    effects_of_blocks<reversed>(runs, entering, blocks, [&](V P, V q) {
      store_part(to, P, 1);
      store_part(to + 1, q, 1);
      to += 2;
    });
  }
  void apply(int64_t found, float* carry, int64_t numbers) const {
    for (int64_t i = 0; i < numbers; ++i) {
      const float* effect = at + 2 * i * squares;
      V x = all(carry[i]);
      for (int64_t j = 0; j < found; ++j) x = fma(all(effect[2 * j]), x, all(effect[2 * j + 1]));
      store_part(carry + i, x, 1);
    }
  }
};

// `rows` tasks without pieces: whether they would leave threads idle.
inline bool worth_pieces(int64_t rows, int64_t pieces) {
  const int64_t threads = thread_count();
  return pieces > 1 && rows < 4 * threads && rows % threads != 0;
}

struct PieceCarry {
  int64_t row, direction, piece, pieces, numbers;
  float* carries;      // (pieces, numbers) of this row and direction: what leaves each piece
  float* carry;        // (numbers), on its way through this one
  int32_t* handed_on;  // (pieces): whether it is there
  int32_t* done;       // (pieces): whether the piece is
  const int32_t* done_before;  // in the direction before

  float* leaving() const { return carries + piece * numbers; }

  // start(carry) for the first piece; found = find(), apply(found, carry): the effects; run(carry): the piece, and what leaves it.
  template <typename Start, typename Find, typename Apply, typename Run>
  void pass(Start start, Find find, Apply apply, Run run, bool turned) const {
    const auto hand_on = [&] {
      __builtin_memcpy(leaving(), carry, 4 * numbers);
      set_flag(handed_on + piece);
    };
    const auto enter = [&] {
      if (piece == 0)
        start(carry);
      else
        __builtin_memcpy(carry, leaving() - numbers, 4 * numbers);
    };
    const bool late = piece != 0 && !is_set(handed_on + piece - 1);
    if (late) {
      const auto found = find();
      wait_for(handed_on + piece - 1);
      enter();
      apply(found, carry);
      hand_on();
    }
    if (direction != 0) {
      if (turned) {  // counted from the other end, pieces overlap two
        const int64_t other = pieces - 1 - piece;
        wait_for(done_before + other);
        if (other > 0) wait_for(done_before + other - 1);
      } else {
        wait_for(done_before + piece);
      }
    }
    enter();
    run(carry);
    if (!late) hand_on();
    set_flag(done + piece);
  }
};

// task(PieceCarry) for each piece, direction after direction, on all threads.
template <typename Task>
inline void run_pieces(int64_t rows, int64_t directions, int64_t pieces, int64_t numbers, Task task) {
  const int64_t all_pieces = rows * directions * pieces;
  const Buffer carries(8 * all_pieces * numbers), flags(8 * all_pieces);
  auto* const handed_on = reinterpret_cast<int32_t*>(flags.floats());
  for (int64_t i = 0; i < 2 * all_pieces; ++i) handed_on[i] = 0;
  int32_t* const done = handed_on + all_pieces;
  // Rows side by side: their carries are there sooner. parallel() begins tasks in order, so that what is waited for is under way.
  parallel(all_pieces, [&](int64_t i) {
    const int64_t row = i % rows, piece = i / rows % pieces, direction = i / (rows * pieces);
    const int64_t first = (row * directions + direction) * pieces;
    task(PieceCarry{row, direction, piece, pieces, numbers, carries.floats() + first * numbers,
                    carries.floats() + (all_pieces + i) * numbers, handed_on + first, done + first,
                    done + first - pieces});
  });
}

}  // namespace
}  // namespace dass::cpu
