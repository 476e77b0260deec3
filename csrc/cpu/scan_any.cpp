// The selective scan for any sizes and dtypes, forward and backward: one channel at a time, chunk by chunk.

#include "cpu/any.h"

namespace dass::cpu {
namespace {

// B or C as rows of S: the tensor itself where its dtype is S or it is constant, else a converted copy (it is small beside u:
// channels / groups times).
template <typename S>
class ProjectionRows {
 public:
  ProjectionRows(const Projection& p, const ScanSizes& sizes) : p_(p), data_(static_cast<const S*>(p.data)) {
    per_group_ = sizes.channels / p.groups;
    if (p.constant || bytes(sizes.io) == sizeof(S)) return;
    const int64_t rows = sizes.batch * sizes.directions * p.groups * sizes.state, length = sizes.length;
    copy_.resize(rows * length);
    const int64_t N = sizes.state, G = p.groups, K = sizes.directions;
    parallel(sizes.batch * K * G, [&](int64_t i) {
      const int64_t b = i / (K * G), k = i / G % K, g = i % G;
      for (int64_t n = 0; n < N; ++n)
        load_row(sizes.io, p.data, b * p.batch + k * p.direction + g * p.group + n * p.state,
                 copy_.data() + (i * N + n) * length, length);
    });
    p_.batch = K * G * N * length;
    p_.direction = G * N * length;
    p_.group = N * length;
    p_.state = length;
    data_ = copy_.data();
  }

  int64_t group(int64_t channel) const { return channel / per_group_; }

  Rows<S> at(int64_t b, int64_t k, int64_t channel, int64_t position) const {
    const int64_t offset = b * p_.batch + k * p_.direction + group(channel) * p_.group;
    return {data_ + offset + (p_.constant ? 0 : position), p_.state, p_.constant};
  }

 private:
  Projection p_;
  int64_t per_group_ = 1;
  const S* data_;
  std::vector<S> copy_;
};

int64_t tile_of(const ScanSizes& sizes) { return sizes.chunk > 0 ? sizes.chunk : default_chunk; }

// v = delta + bias and dt of positions [begin, begin + length).
template <typename S>
void load_dt(const ScanSizes& sizes, const Sequence& delta, const void* bias, int64_t b, int64_t k, int64_t d, int64_t begin,
             int64_t length, S* v, S* dt) {
  load_row(sizes.io, delta.data, b * delta.batch + k * delta.direction + d * delta.channel + begin, v, length);
  if (bias != nullptr) {
    const S shift = static_cast<const S*>(bias)[k * sizes.channels + d];
    for (int64_t l = 0; l < length; ++l) v[l] += shift;
  }
  if (sizes.delta_softplus)
    for (int64_t l = 0; l < length; ++l) dt[l] = softplus(v[l]);
  else
    std::copy(v, v + length, dt);
}

template <typename S>
void forward(const ScanForward& f) {
  const ScanSizes& sizes = f.sizes;
  const int64_t K = sizes.directions, D = sizes.channels, L = sizes.length, N = sizes.state, outputs = sizes.outputs();
  const int64_t tile = std::min(tile_of(sizes), std::max<int64_t>(L, 1)), tiles = L == 0 ? 0 : (L + tile - 1) / tile;
  const ProjectionRows<S> B(f.B, sizes), C(f.C, sizes);
  parallel(sizes.batch * outputs * D, [&](int64_t item) {
    const int64_t b = item / (outputs * D), o = item / D % outputs, d = item % D;
    Scratch<S> s(tile);
    std::vector<S> h(N), sum(sizes.shared ? L : 0, S(0));
    const int64_t first = sizes.shared ? 0 : o, last = sizes.shared ? K : o + 1;
    for (int64_t k = first; k < last; ++k) {
      const int64_t sequence = (b * K + k) * D + d;
      const S skip = f.D == nullptr ? S(0) : static_cast<const S*>(f.D)[k * D + d];
      const S* initial = static_cast<const S*>(f.initial_state);
      for (int64_t n = 0; n < N; ++n) h[n] = initial == nullptr ? S(0) : initial[sequence * N + n];
      walk<S>(tiles, sizes.reversed(k), [&](int64_t j) {
        const int64_t begin = j * tile, length = std::min(tile, L - begin);
        if (sizes.chunk > 0)
          std::copy(h.begin(), h.end(), static_cast<S*>(f.boundary_states) + (sequence * tiles + j) * N);
        load_row(sizes.io, f.u.data, b * f.u.batch + k * f.u.direction + d * f.u.channel + begin, s.u.data(), length);
        load_dt(sizes, f.delta, f.delta_bias, b, k, d, begin, length, s.v.data(), s.dt.data());
        S* y = sizes.shared ? sum.data() + begin : s.y.data();
        for (int64_t l = 0; l < length; ++l) y[l] = (sizes.shared ? y[l] : S(0)) + skip * s.u[l];
        chunk_forward<S>({length, N, sizes.reversed(k), s.u.data(), s.dt.data(),
                          static_cast<const S*>(f.A) + (k * D + d) * N, B.at(b, k, d, begin), C.at(b, k, d, begin)},
                         s, h.data(), y);
        if (sizes.shared) return;
        if (f.z.data != nullptr) {
          load_row(sizes.io, f.z.data, b * f.z.batch + k * f.z.direction + d * f.z.channel + begin, s.z.data(), length);
          for (int64_t l = 0; l < length; ++l) y[l] *= s.z[l] * sigmoid(s.z[l]);
        }
        store_row(sizes.out, f.out, sequence * L + begin, y, length);
      });
      std::copy(h.begin(), h.end(), static_cast<S*>(f.last_state) + sequence * N);
    }
    if (sizes.shared) store_row(sizes.out, f.out, (b * D + d) * L, sum.data(), L);
  });
}

int64_t lowest_common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y != 0) std::swap(x %= y, y);
  return a / x * b;
}

// d_B or d_C. Tasks add to slabs of their own, (slab, state, length) each; `finish` adds the slabs of a group in order. The
// gradient of a constant is (batch, directions, channels, state), summed over the batch.
template <typename S>
struct ProjectionGradient {
  const ScanSizes& sizes;
  const Projection& p;
  int64_t units, splits;
  std::vector<S> slabs;

  ProjectionGradient(const ScanSizes& sizes, const Projection& p, int64_t units, int64_t splits)
      : sizes(sizes), p(p), units(units), splits(splits) {
    const int64_t rows = p.constant ? sizes.channels : units * splits;
    slabs.assign(sizes.batch * sizes.directions * rows * sizes.state * (p.constant ? 1 : sizes.length), S(0));
  }

  GradientRows<S> at(int64_t b, int64_t k, int64_t unit, int64_t split, int64_t d, int64_t position) {
    const int64_t bk = b * sizes.directions + k, N = sizes.state, L = sizes.length;
    if (p.constant) return {slabs.data() + (bk * sizes.channels + d) * N, 1, true};
    return {slabs.data() + ((bk * units + unit) * splits + split) * N * L + position, L, false};
  }

  void finish(void* to) {
    const int64_t K = sizes.directions, N = sizes.state, L = sizes.length, G = p.groups;
    if (p.constant) {
      const int64_t n = K * sizes.channels * N;
      S* out = static_cast<S*>(to);
      std::fill(out, out + n, S(0));
      for (int64_t b = 0; b < sizes.batch; ++b)
        for (int64_t i = 0; i < n; ++i) out[i] += slabs[b * n + i];
      return;
    }
    const int64_t per_group = units / G * splits;
    parallel(sizes.batch * K * G * N, [&](int64_t i) {
      const int64_t bkg = i / N, n = i % N;
      std::vector<S> sum(L, S(0));
      for (int64_t slab = bkg * per_group; slab < (bkg + 1) * per_group; ++slab)
        for (int64_t l = 0; l < L; ++l) sum[l] += slabs[(slab * N + n) * L + l];
      store_row(sizes.io, to, i * L, sum.data(), L);
    });
  }
};

template <typename S>
void backward(const ScanBackward& f) {
  const ScanSizes& sizes = f.sizes;
  const int64_t K = sizes.directions, D = sizes.channels, L = sizes.length, N = sizes.state, batch = sizes.batch;
  const int64_t tile = std::min(tile_of(sizes), std::max<int64_t>(L, 1)), tiles = L == 0 ? 0 : (L + tile - 1) / tile;
  const ProjectionRows<S> B(f.B, sizes), C(f.C, sizes);
  // A unit is a run of channels that share B and C; it is split further where there are few, by the shape alone.
  const int64_t units = lowest_common_multiple(f.B.constant ? 1 : f.B.groups, f.C.constant ? 1 : f.C.groups);
  const int64_t per_unit = D / units, rows = batch * sizes.outputs() * units;
  const int64_t wanted = rows == 0 ? 1 : std::max<int64_t>(1, 16 / rows);
  const int64_t per_split = (per_unit + wanted - 1) / std::max<int64_t>(wanted, 1);
  const int64_t splits = per_split == 0 ? 1 : (per_unit + per_split - 1) / per_split;
  ProjectionGradient<S> d_B(sizes, f.B, units, splits), d_C(sizes, f.C, units, splits);
  const int64_t sequences = batch * K * D;
  std::vector<S> d_A(sequences * N, S(0)), d_D(sequences, S(0)), d_bias(sequences, S(0));
  parallel(rows * splits, [&](int64_t item) {
    const int64_t split = item % splits, unit = item / splits % units, o = item / (splits * units) % sizes.outputs(),
                  b = item / (splits * units * sizes.outputs());
    Scratch<S> s(tile);
    std::vector<S> h(N), mu(N), d_u(sizes.shared ? L : 0);
    const int64_t begin_channel = unit * per_unit + split * per_split;
    const int64_t end_channel = std::min(begin_channel + per_split, (unit + 1) * per_unit);
    const int64_t first = sizes.shared ? 0 : o, last = sizes.shared ? K : o + 1;
    for (int64_t d = begin_channel; d < end_channel; ++d) {
      std::fill(d_u.begin(), d_u.end(), S(0));
      for (int64_t k = first; k < last; ++k) {
        const int64_t sequence = (b * K + k) * D + d;
        const S skip = f.D == nullptr ? S(0) : static_cast<const S*>(f.D)[k * D + d];
        const S* A = static_cast<const S*>(f.A) + (k * D + d) * N;
        const S* seed = static_cast<const S*>(f.d_last_state);
        for (int64_t n = 0; n < N; ++n) mu[n] = seed == nullptr ? S(0) : seed[sequence * N + n];
        walk<S>(tiles, !sizes.reversed(k), [&](int64_t j) {
          const int64_t begin = j * tile, length = std::min(tile, L - begin);
          const S* entering = static_cast<const S*>(f.boundary_states) + (sequence * tiles + j) * N;
          load_row(sizes.io, f.u.data, b * f.u.batch + k * f.u.direction + d * f.u.channel + begin, s.u.data(), length);
          load_dt(sizes, f.delta, f.delta_bias, b, k, d, begin, length, s.v.data(), s.dt.data());
          load_row(sizes.out, f.d_out.data, b * f.d_out.batch + k * f.d_out.direction + d * f.d_out.channel + begin, s.g.data(),
                   length);
          const Chunk<S> chunk{length, N, sizes.reversed(k), s.u.data(), s.dt.data(), A,
                               B.at(b, k, d, begin), C.at(b, k, d, begin)};
          if (f.z.data != nullptr) {
            load_row(sizes.io, f.z.data, b * f.z.batch + k * f.z.direction + d * f.z.channel + begin, s.z.data(), length);
            for (int64_t l = 0; l < length; ++l) s.y[l] = skip * s.u[l];
            std::copy(entering, entering + N, h.begin());
            chunk_forward<S>(chunk, s, h.data(), s.y.data());
            for (int64_t l = 0; l < length; ++l) {
              const S gate = sigmoid(s.z[l]), g = s.g[l];
              s.g[l] = g * s.z[l] * gate;
              s.y[l] = g * s.y[l] * gate * (S(1) + s.z[l] * (S(1) - gate));
            }
            store_row(sizes.io, f.d_z, sequence * L + begin, s.y.data(), length);
          }
          chunk_backward<S>(chunk, s, entering, s.g.data(), mu.data(), s.du.data(), s.ddt.data(), d_A.data() + sequence * N,
                            d_B.at(b, k, unit, split, d, begin), d_C.at(b, k, unit, split, d, begin));
          for (int64_t l = 0; l < length; ++l) s.du[l] += skip * s.g[l];
          if (sizes.delta_softplus)
            for (int64_t l = 0; l < length; ++l) s.ddt[l] *= sigmoid(s.v[l]);
          d_bias[sequence] += sum_of<S>(length, [&](int64_t l) { return s.ddt[l]; });
          d_D[sequence] += sum_of<S>(length, [&](int64_t l) { return s.g[l] * s.u[l]; });
          store_row(sizes.io, f.d_delta, sequence * L + begin, s.ddt.data(), length);
          if (sizes.shared)
            for (int64_t l = 0; l < length; ++l) d_u[begin + l] += s.du[l];
          else
            store_row(sizes.io, f.d_u, sequence * L + begin, s.du.data(), length);
        });
        if (f.initial_state != nullptr)
          std::copy(mu.begin(), mu.end(), static_cast<S*>(f.d_initial_state) + sequence * N);
      }
      if (sizes.shared) store_row(sizes.io, f.d_u, (b * D + d) * L, d_u.data(), L);
    }
  });
  d_B.finish(f.d_B);
  d_C.finish(f.d_C);
  const auto over_batch = [&](const std::vector<S>& from, void* to, int64_t n) {
    S* out = static_cast<S*>(to);
    std::fill(out, out + n, S(0));
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i) out[i] += from[b * n + i];
  };
  over_batch(d_A, f.d_A, K * D * N);
  if (f.D != nullptr) over_batch(d_D, f.d_D, K * D);
  if (f.delta_bias != nullptr) over_batch(d_bias, f.d_delta_bias, K * D);
}

}  // namespace

void scan_forward_any(const ScanForward& f) { f.sizes.io == Dtype::float64 ? forward<double>(f) : forward<float>(f); }

void scan_backward_any(const ScanBackward& f) { f.sizes.io == Dtype::float64 ? backward<double>(f) : backward<float>(f); }

}  // namespace dass::cpu
