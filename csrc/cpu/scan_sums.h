// Sums over channels and over the batch: units of channels that share B and C, and the slabs that tasks leave of d_B and d_C, which
// are added in order.
#pragma once

namespace dass::cpu {
namespace {

inline int64_t lowest_common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y != 0) {
    const int64_t rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

// A unit is a run of channels that share B and C; it is split further where there are few, by shapes alone.
inline int64_t units_of(const Projection& B, const Projection& C) {
  return lowest_common_multiple(B.constant ? 1 : B.groups, C.constant ? 1 : C.groups);
}
inline int64_t wanted_splits(const ScanSizes& sizes, int64_t units) {
  return larger_of(1, 16 / (sizes.batch * sizes.outputs() * units));
}

// The sum of the lanes of each of `count` vectors, so many numbers apart: W of them at a time by way of a turn.
inline void sums_of_lanes(const float* vectors, int64_t apart, int64_t count, float* to, int64_t to_apart) {
  for (int64_t begin = 0; begin < count; begin += W) {
    V parts[W / 4];
    for (int g = 0; g < W / 4; ++g) {
      const auto vector = [&](int64_t i) { return load(vectors + smaller_of(begin + 4 * g + i, count - 1) * apart); };
      const Block turned = Block{{vector(0), vector(1), vector(2), vector(3)}}.turned();
      parts[g] = (turned.v[0] + turned.v[1]) + (turned.v[2] + turned.v[3]);
    }
    float sums[W];
    store(sums, sum_pieces(parts));
    for (int64_t i = begin; i < smaller_of(begin + W, count); ++i) to[i * to_apart] = sums[i - begin];
  }
}

inline void add_over_batch(const Buffer& from, void* to, int64_t batch, int64_t n) {
  float* sum = static_cast<float*>(to);
  const float* const first = from.floats();
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = static_cast<int>(smaller_of(W, n - i));
    V total = load_part(first + i, lanes);
    for (int64_t b = 1; b < batch; ++b) total = total + load_part(first + b * n + i, lanes);
    store_part(sum + i, total, lanes);
  }
}

// d_B or d_C from the slabs, of which `per_group` lie side by side for each group: row i of (batch, K, G, N), steps [begin, end).
inline void finish_steps(const ScanSizes& sizes, const Projection& p, int64_t per_group, int64_t row, const Buffer& slabs, void* to,
                         int64_t i, int64_t begin, int64_t end) {
  const int64_t N = sizes.state, L = sizes.length;
  const float* first = slabs.floats() + (i / N * per_group * N + i % N) * row;
  float* sum = static_cast<float*>(thread_scratch(4 * row_tile));
  for (; begin < end; begin += row_tile) {
    const int64_t n = smaller_of(row_tile, end - begin);
    for (int64_t l = 0; l < n; l += W) {
      V total = load(first + begin + l);
      for (int64_t slab = 1; slab < per_group; ++slab) total = total + load(first + slab * N * row + begin + l);
      store(sum + l, total);
    }
    store_row(sizes.io, element(sizes.io, to, i * L + begin), sum, n);
  }
}
// All of it; of constants there is a slab for each piece of a row.
inline void finish_projection(const ScanSizes& sizes, const Projection& p, int64_t per_group, int64_t row, int64_t pieces,
                              const Buffer& slabs, void* to) {
  const int64_t rows = sizes.batch * sizes.directions * p.groups * sizes.state, L = sizes.length;
  if (p.constant) return add_over_batch(slabs, to, sizes.batch * pieces, sizes.directions * sizes.channels * sizes.state);
  constexpr int64_t steps = 64 * row_tile;
  const int64_t parts = divide_up(L, steps);
  parallel(rows * parts, [&](int64_t task) {
    const int64_t begin = task % parts * steps;
    finish_steps(sizes, p, per_group, row, slabs, to, task / parts, begin, smaller_of(L, begin + steps));
  });
}

}  // namespace
}  // namespace dass::cpu
