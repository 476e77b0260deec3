// The four-direction scan of a map for any sizes and dtypes, forward and backward. A channel's map is held twice, row by row and
// column by column, and so is x_dbl of one image; directions 2 and 3 walk directions 0 and 1 from the end.

#include "cpu/any.h"

namespace dass::cpu {
namespace {

// `from` (rows, columns) to `to` (columns, rows), in blocks that stay in cache.
template <typename S, bool add = false>
void transpose(const S* from, S* to, int64_t rows, int64_t columns) {
  constexpr int64_t block = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += block)
    for (int64_t c0 = 0; c0 < columns; c0 += block)
      for (int64_t c = c0; c < std::min(c0 + block, columns); ++c)
        for (int64_t r = r0; r < std::min(r0 + block, rows); ++r)
          to[c * rows + r] = (add ? to[c * rows + r] : S(0)) + from[r * columns + c];
}

// x_dbl as S in scan order: (batch, 4, rows, L).
template <typename S>
std::vector<S> ordered(const Ss2dSizes& sizes, const LowRank& p) {
  const int64_t rows = sizes.rows(), L = sizes.length();
  std::vector<S> result(sizes.batch * 4 * rows * L);
  parallel(sizes.batch * 4 * rows, [&](int64_t i) {
    const int64_t b = i / (4 * rows), k = i / rows % 4, row = i % rows, offset = b * p.batch + k * p.direction + row * p.row;
    S* to = result.data() + i * L;
    if (k % 2 == 0) return load_row(sizes.io, p.data, offset, to, L);
    std::vector<S> map(L);
    load_row(sizes.io, p.data, offset, map.data(), L);
    transpose(map.data(), to, sizes.height, sizes.width);
  });
  return result;
}

template <typename S>
struct Weights {
  const S *dt_weight, *dt_bias, *Ds;
  std::vector<S> A;

  template <typename Arguments>
  explicit Weights(const Arguments& f)
      : dt_weight(static_cast<const S*>(f.dt_weight)),
        dt_bias(static_cast<const S*>(f.dt_bias)),
        Ds(static_cast<const S*>(f.Ds)),
        A(4 * f.sizes.channels * f.sizes.state) {
    for (size_t i = 0; i < A.size(); ++i) A[i] = -std::exp(static_cast<const S*>(f.A_logs)[i]);
  }

  S skip(int64_t d, int64_t channels) const {
    return Ds[d] + Ds[channels + d] + Ds[2 * channels + d] + Ds[3 * channels + d];
  }
};

// v = dt_weight x_dbl[:R] + bias, dt = softplus(v).
template <typename S>
void low_rank_dt(const S* x_dbl, int64_t stride, const S* weight, int64_t rank, S bias, int64_t length, S* v, S* dt) {
  std::fill(v, v + length, bias);
  for (int64_t r = 0; r < rank; ++r)
    for (int64_t l = 0; l < length; ++l) v[l] += weight[r] * x_dbl[r * stride + l];
  for (int64_t l = 0; l < length; ++l) dt[l] = softplus(v[l]);
}

template <typename S>
void forward(const Ss2dForward& f) {
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length(), N = sizes.state, R = sizes.rank, rows = sizes.rows();
  const int64_t tile = std::min(sizes.chunk > 0 ? sizes.chunk : default_chunk, std::max<int64_t>(L, 1));
  const int64_t tiles = L == 0 ? 0 : (L + tile - 1) / tile;
  const auto x_dbl = ordered<S>(sizes, f.x_dbl);
  const Weights<S> weights(f);
  parallel(sizes.batch * D, [&](int64_t item) {
    const int64_t b = item / D, d = item % D;
    Scratch<S> s(tile);
    std::vector<S> h(N), x[2] = {std::vector<S>(L), std::vector<S>(L)}, y[2] = {std::vector<S>(L), std::vector<S>(L, S(0))};
    load_row(sizes.io, f.x.data, b * f.x.batch + d * f.x.channel, x[0].data(), L);
    transpose(x[0].data(), x[1].data(), sizes.height, sizes.width);
    const S skip = weights.skip(d, D);
    for (int64_t l = 0; l < L; ++l) y[0][l] = skip * x[0][l];
    for (int64_t k = 0; k < 4; ++k) {
      const bool reversed = k >= 2;
      std::fill(h.begin(), h.end(), S(0));
      walk<S>(tiles, reversed, [&](int64_t j) {
        const int64_t begin = j * tile, length = std::min(tile, L - begin);
        if (sizes.chunk > 0)
          std::copy(h.begin(), h.end(), static_cast<S*>(f.boundary_states) + (((b * 4 + k) * D + d) * tiles + j) * N);
        const S* rows_here = x_dbl.data() + (b * 4 + k) * rows * L + begin;
        low_rank_dt(rows_here, L, weights.dt_weight + (k * D + d) * R, R, weights.dt_bias[k * D + d], length, s.v.data(),
                    s.dt.data());
        chunk_forward<S>({length, N, reversed, x[k % 2].data() + begin, s.dt.data(), weights.A.data() + (k * D + d) * N,
                          {rows_here + R * L, L}, {rows_here + (R + N) * L, L}},
                         s, h.data(), y[k % 2].data() + begin);
      });
    }
    transpose<S, true>(y[1].data(), y[0].data(), sizes.width, sizes.height);
    store_row(sizes.out, f.y, item * L, y[0].data(), L);
  });
}

template <typename S>
void backward(const Ss2dBackward& f) {
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = sizes.length(), N = sizes.state, R = sizes.rank, rows = sizes.rows(),
                batch = sizes.batch;
  const int64_t tile = std::min(sizes.chunk > 0 ? sizes.chunk : default_chunk, std::max<int64_t>(L, 1));
  const int64_t tiles = L == 0 ? 0 : (L + tile - 1) / tile;
  const auto x_dbl = ordered<S>(sizes, f.x_dbl);
  const Weights<S> weights(f);
  // Slabs of d_x_dbl, one for each run of channels; how many depends on the shape alone.
  const int64_t wanted = std::max<int64_t>(1, batch == 0 ? 1 : 8 / batch), per_slab = (D + wanted - 1) / wanted;
  const int64_t slabs = per_slab == 0 ? 0 : (D + per_slab - 1) / per_slab;
  std::vector<S> partial(batch * slabs * 4 * rows * L, S(0));
  std::vector<S> d_A(batch * 4 * D * N, S(0)), d_bias(batch * 4 * D, S(0)), d_weight(batch * 4 * D * R, S(0)),
      d_D(batch * D, S(0));
  parallel(batch * slabs, [&](int64_t item) {
    const int64_t b = item / slabs, slab = item % slabs;
    Scratch<S> s(tile);
    std::vector<S> mu(N), x[2] = {std::vector<S>(L), std::vector<S>(L)}, g[2] = {std::vector<S>(L), std::vector<S>(L)},
                   dx[2] = {std::vector<S>(L), std::vector<S>(L)};
    for (int64_t d = slab * per_slab; d < std::min((slab + 1) * per_slab, D); ++d) {
      load_row(sizes.io, f.x.data, b * f.x.batch + d * f.x.channel, x[0].data(), L);
      load_row(sizes.out, f.d_y.data, b * f.d_y.batch + d * f.d_y.channel, g[0].data(), L);
      transpose(x[0].data(), x[1].data(), sizes.height, sizes.width);
      transpose(g[0].data(), g[1].data(), sizes.height, sizes.width);
      const S skip = weights.skip(d, D);
      for (int64_t l = 0; l < L; ++l) dx[0][l] = skip * g[0][l];
      std::fill(dx[1].begin(), dx[1].end(), S(0));
      d_D[b * D + d] = sum_of<S>(L, [&](int64_t l) { return g[0][l] * x[0][l]; });
      for (int64_t k = 0; k < 4; ++k) {
        const bool reversed = k >= 2;
        const int64_t sequence = (b * 4 + k) * D + d;
        const S *u = x[k % 2].data(), *dy = g[k % 2].data(), *weight = weights.dt_weight + (k * D + d) * R;
        std::fill(mu.begin(), mu.end(), S(0));
        walk<S>(tiles, !reversed, [&](int64_t j) {
          const int64_t begin = j * tile, length = std::min(tile, L - begin);
          const S* rows_here = x_dbl.data() + (b * 4 + k) * rows * L + begin;
          S* d_rows = partial.data() + (item * 4 + k) * rows * L + begin;
          low_rank_dt(rows_here, L, weight, R, weights.dt_bias[k * D + d], length, s.v.data(), s.dt.data());
          chunk_backward<S>({length, N, reversed, u + begin, s.dt.data(), weights.A.data() + (k * D + d) * N,
                             {rows_here + R * L, L}, {rows_here + (R + N) * L, L}},
                            s, static_cast<const S*>(f.boundary_states) + (sequence * tiles + j) * N, dy + begin, mu.data(),
                            s.du.data(), s.ddt.data(), d_A.data() + sequence * N, {d_rows + R * L, L},
                            {d_rows + (R + N) * L, L});
          for (int64_t l = 0; l < length; ++l) dx[k % 2][begin + l] += s.du[l];
          for (int64_t l = 0; l < length; ++l) s.ddt[l] *= sigmoid(s.v[l]);
          d_bias[sequence] += sum_of<S>(length, [&](int64_t l) { return s.ddt[l]; });
          for (int64_t r = 0; r < R; ++r) {
            for (int64_t l = 0; l < length; ++l) d_rows[r * L + l] += weight[r] * s.ddt[l];
            d_weight[sequence * R + r] += sum_of<S>(length, [&](int64_t l) { return s.ddt[l] * rows_here[r * L + l]; });
          }
        });
      }
      transpose<S, true>(dx[1].data(), dx[0].data(), sizes.width, sizes.height);
      store_row(sizes.io, f.d_x, (b * D + d) * L, dx[0].data(), L);
    }
  });
  parallel(batch * 4 * rows, [&](int64_t i) {
    const int64_t b = i / (4 * rows), k = i / rows % 4, row = i % rows;
    std::vector<S> sum(L, S(0)), map(L);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const S* from = partial.data() + (((b * slabs + slab) * 4 + k) * rows + row) * L;
      for (int64_t l = 0; l < L; ++l) sum[l] += from[l];
    }
    if (k % 2 == 1) transpose(sum.data(), map.data(), sizes.width, sizes.height);
    store_row(sizes.io, f.d_x_dbl, i * L, k % 2 == 1 ? map.data() : sum.data(), L);
  });
  const auto over_batch = [&](const std::vector<S>& from, void* to, int64_t n) {
    S* out = static_cast<S*>(to);
    std::fill(out, out + n, S(0));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i) out[i] += from[b * n + i];
  };
  over_batch(d_weight, f.d_dt_weight, 4 * D * R);
  over_batch(d_bias, f.d_dt_bias, 4 * D);
  over_batch(d_A, f.d_A_logs, 4 * D * N);
  S *d_A_logs = static_cast<S*>(f.d_A_logs), *d_Ds = static_cast<S*>(f.d_Ds);
  for (int64_t i = 0; i < 4 * D * N; ++i) d_A_logs[i] *= weights.A[i];
  over_batch(d_D, f.d_Ds, D);
  for (int64_t k = 1; k < 4; ++k) std::copy(d_Ds, d_Ds + D, d_Ds + k * D);  // the same number for every direction
}

}  // namespace

void ss2d_forward_any(const Ss2dForward& f) { f.sizes.io == Dtype::float64 ? forward<double>(f) : forward<float>(f); }

void ss2d_backward_any(const Ss2dBackward& f) { f.sizes.io == Dtype::float64 ? backward<double>(f) : backward<float>(f); }

}  // namespace dass::cpu
