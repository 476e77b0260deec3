// The gradients of a tile in the backward along rows: see scan_rows_tile.h.
#pragma once

namespace dass::cpu {
namespace {

// Runs from `whole` on to a stretch of n elements of a row.
template <Dtype type>
inline void store_row_of_runs(const float* from, char* row, int64_t whole, int64_t n, bool streamed) {
  int64_t i = whole;
  for (; i + block <= n; i += block) store_runs<type>(Block::at(from + i), row + i * size_of(type), streamed);
  if (i < n) {
    alignas(64) float part[block];
    Block::at(from + i).turned().to(part);
    store_row(type, row + i * size_of(type), part, n - i);
  }
}
inline void store_tile(const RowBackwardTile& t, void* gradient, const float* from) {
  const Dtype io = t.plan.sizes.io;
  const auto run = io == Dtype::float32    ? store_row_of_runs<Dtype::float32>
                   : io == Dtype::bfloat16 ? store_row_of_runs<Dtype::bfloat16>
                                           : store_row_of_runs<Dtype::float16>;
  for (int64_t j = 0; j < t.count; ++j) {
    void* const row = element(io, gradient, t.sequence(j) * t.plan.sizes.length + t.begin);
    run(from + t.place(j), static_cast<char*>(row), 0, t.n, t.plan.streamed && reinterpret_cast<uintptr_t>(row) % 64 == 0);
  }
}

// Through the gate: y again, d_z from it, and g becomes the gradient of y.
template <bool reversed>
inline void gate_tile(const RowBackwardTile& t) {
  const ScanBackward& f = t.plan.f;
  RowBackwardScratch& s = t.s;
  for (int64_t j = 0; j < t.count; ++j) {
    const V skip = all(t.of_channel(f.D, j));
    for (int64_t i = t.place(j); i < t.place(j + 1); i += W) store(s.y + i, load(s.u + i) * skip);
  }
  for (int64_t state = 0; state < f.sizes.state; ++state) {
    decays_of_tile<reversed>(t, state);
    const float* const C = t.C[state].data;
    for (int64_t j = 0; j < t.count; ++j) {
      float* const y = s.y + t.place(j);
      along_states<reversed, 1>(
          t, j, [=](int64_t, int64_t i, int, int, V, V, V h) { store(y + i, fma(load(C + i), h, load(y + i))); },
          [](int64_t) {});
    }
  }
  load_tile(t, f.sizes.io, f.z, s.d_u);
  for (int64_t i = 0; i < t.place(t.count); i += W) {
    const V x = load(s.d_u + i), gate = sigmoid_from(x, exp_of_negative_magnitude(x)), g = load(s.g + i);
    store(s.g + i, g * x * gate);
    store(s.y + i, g * load(s.y + i) * gate * fma(x, all(1.0f) - gate, all(1.0f)));
  }
  store_tile(t, f.d_z, s.y);
}

// Where the gradients of a channel go to: the sums over its steps, as vectors, and rows or scratch memory.
struct RowGradients {
  float *d_A, *d_D, *d_bias;
  char *d_delta, *d_u;
};

// From what enters the runs of the adjoint to the gradients of `count` channels, for one state; those of delta and u go on from state
// to state in the scratch memory, and at the last to where they are stored as `to`.
template <bool reversed, bool starts, bool ends, Dtype to, int count>
void gradients_of_channels(const RowBackwardTile& t, int64_t j, int64_t state, const RowGradients* where) {
  RowBackwardScratch& s = t.s;
  const int64_t place = t.place(j), padded = t.padded, runs_apart = t.runs_of(1);
  const float *const a_at = s.a + place, *const ah_at = s.ah + place, *const g_at = s.g + place, *const dt_at = s.dt + place,
              *const u_at = s.u + place, *const slope_at = s.slope + place;
  float *const d_dt_at = s.d_dt + place, *const d_u_at = s.d_u + place;
  const float *const B_at = t.B[state].data, *const C_at = t.C[state].data;
  float* const d_B_at = t.B[state].gradient;
  const V* entering = s.entering + t.runs_of(j);
  // Rows that begin anywhere are written to the scratch memory first and streamed from there.
  const auto anywhere = [](const char* row) { return reinterpret_cast<uintptr_t>(row) % 64 != 0; };
  const bool unaligned = t.plan.streamed &&
                     (anywhere(where[0].d_delta) || anywhere(where[0].d_u) || anywhere(where[count - 1].d_delta));
  const bool later = ends && unaligned && t.n * size_of(to) >= 256, streamed = t.plan.streamed && !unaligned;
  const int64_t whole = later ? padded : t.n / block * block, d_u_whole = where->d_u == nullptr ? 0 : whole;
  V A[count], skip[count], d_A[count], d_D[count], d_bias[count];
  char *d_delta_to[count], *d_u_to[count];
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) {
    A[m] = all(t.A(j + m, state)), skip[m] = all(t.of_channel(t.plan.f.D, j + m));
    d_A[m] = load(where[m].d_A), d_D[m] = load(where[m].d_D), d_bias[m] = load(where[m].d_bias);
    d_delta_to[m] = later ? reinterpret_cast<char*>(d_dt_at + m * padded) : where[m].d_delta;
    d_u_to[m] = later && d_u_whole != 0 ? reinterpret_cast<char*>(d_u_at + m * padded) : where[m].d_u;
    const auto fetch_ends = [&](const char* row) {  // the cache lines that will not be written as a whole
      __builtin_prefetch(row, 1);
      __builtin_prefetch(row + t.n * size_of(to) - 1, 1);
    };
    if (later) fetch_ends(where[m].d_delta), fetch_ends(where[m].d_u);
  }
  Ahead ahead[count];
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m)
    if (ends) ahead[m] = t.ahead(t.plan.sizes.out, t.plan.f.d_out, j + m);
  for (int64_t i = 0; i < padded; i += block) {
    Block d_dt[count], d_u[count];
    V leaving[count];
#pragma GCC unroll 2
    for (int m = 0; m < count; ++m) leaving[m] = entering[m * runs_apart];
    ++entering;
    along_run<!reversed>([&](int q) {
      const int64_t i_q = i + q * W;
      const V c = in_register(load(C_at + i_q)), b = in_register(load(B_at + i_q));
      V d_B = load(d_B_at + i_q);
#pragma GCC unroll 2
      for (int m = 0; m < count; ++m) {
        const int64_t l = i_q + m * padded;
        if (ends) ahead[m].fetch(i_q);
        const V g = in_register(load(g_at + l)), lambda = fma(c, g, leaving[m]);
        leaving[m] = load(a_at + l) * lambda;
        const V by_step = lambda * load(dt_at + l), u = in_register(load(u_at + l)), ah = in_register(load(ah_at + l));
        d_B = fma(by_step, u, d_B);
        d_A[m] = fma(by_step, ah, d_A[m]);
        V x = lambda * fma(A[m], ah, b * u);
        d_u[m].v[q] = fma(by_step, b, starts ? g * skip[m] : load(d_u_at + l));
        if (!starts) x = x + load(d_dt_at + l);
        if (ends) {
          x = x * load(slope_at + l);
          d_bias[m] = d_bias[m] + x;
          d_D[m] = fma(g, u, d_D[m]);
        }
        d_dt[m].v[q] = x;
      }
      store(d_B_at + i_q, d_B);
    });
#pragma GCC unroll 2
    for (int m = 0; m < count; ++m) {
      if (ends && i < whole)
        store_runs<to>(d_dt[m], d_delta_to[m] + i * size_of(to), streamed);
      else
        d_dt[m].to(d_dt_at + m * padded + i);
      if (ends && i < d_u_whole)
        store_runs<to>(d_u[m], d_u_to[m] + i * size_of(to), streamed);
      else
        d_u[m].to(d_u_at + m * padded + i);
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < count; ++m) {
    store(where[m].d_A, d_A[m]);
    store(where[m].d_D, d_D[m]);
    store(where[m].d_bias, d_bias[m]);
    if (later) {
      s.pending[s.pending_count++] = {where[m].d_delta, d_delta_to[m], t.n * size_of(to)};
      if (d_u_whole != 0) s.pending[s.pending_count++] = {where[m].d_u, d_u_to[m], t.n * size_of(to)};
    } else if (ends && whole < t.n) {
      store_row_of_runs<to>(d_dt_at + m * padded, d_delta_to[m], whole, t.n, false);
      if (d_u_to[m] != nullptr) store_row_of_runs<to>(d_u_at + m * padded, d_u_to[m], whole, t.n, false);
    }
  }
}

template <bool reversed, Dtype to>
void gradients_of_tile(const RowBackwardTile& t, int64_t state) {
  const ScanBackward& f = t.plan.f;
  const int64_t N = f.sizes.state, L = f.sizes.length;
  const auto where = [&](int64_t j) {
    const auto row = [&](void* gradient) {
      return static_cast<char*>(element(to, gradient, t.sequence(j) * L + t.begin));
    };
    const RowBackwardMemory& m = t.memory;
    return RowGradients{m.d_A(t.c + j) + state * W, m.d_D(t.c + j), m.d_bias(t.c + j), row(f.d_delta),
                        f.sizes.shared ? nullptr : row(f.d_u)};
  };
  in_pairs(t.count, [&](int64_t j, auto pair) {
    constexpr int count = pair.value;
    const RowGradients at[] = {where(j), where(j + count - 1)};
    const auto run = N == 1           ? gradients_of_channels<reversed, true, true, to, count>
                     : state == 0     ? gradients_of_channels<reversed, true, false, Dtype::float32, count>
                     : state == N - 1 ? gradients_of_channels<reversed, false, true, to, count>
                                      : gradients_of_channels<reversed, false, false, Dtype::float32, count>;
    run(t, j, state, at);
  });
}

// d_u of one of the directions that are summed.
inline void add_to_sum(const RowBackwardTile& t) {
  const ScanBackward& f = t.plan.f;
  const int64_t L = f.sizes.length;
  const bool direct = f.sizes.io == Dtype::float32;
  for (int64_t j = 0; j < t.count; ++j) {
    const int64_t at = (t.b * f.sizes.channels + t.first + t.c + j) * L + t.begin;
    float *const d_u = t.s.d_u + t.place(j), *const sum = (direct ? static_cast<float*>(f.d_u) : t.plan.d_u.floats()) + at;
    for (int64_t i = 0; i < t.padded; i += block) Block::at(d_u + i).turned().to(d_u + i);
    if (!t.first_direction)
      for (int64_t i = 0; i < t.n; i += W)
        store(d_u + i, load(d_u + i) + load_part(sum + i, static_cast<int>(smaller_of(W, t.n - i))));
    t.last_direction ? store_row(f.sizes.io, element(f.sizes.io, f.d_u, at), d_u, t.n) : store_row(Dtype::float32, sum, d_u, t.n);
  }
}

template <bool reversed>
void backward_tile(const RowBackwardTile& t) {
  const ScanBackward& f = t.plan.f;
  RowBackwardScratch& s = t.s;
  load_steps(t);
  s.stream_pending();
  const bool gated = f.z.data != nullptr;
  load_tile(t, f.sizes.io, f.u, s.u);
  if (gated) {
    load_tile(t, f.sizes.out, f.d_out, s.g);
    gate_tile<reversed>(t);
  }
  const auto gradients = f.sizes.io == Dtype::float32    ? gradients_of_tile<reversed, Dtype::float32>
                         : f.sizes.io == Dtype::bfloat16 ? gradients_of_tile<reversed, Dtype::bfloat16>
                                                         : gradients_of_tile<reversed, Dtype::float16>;
  for (int64_t state = 0; state < f.sizes.state; ++state) {
    decays_of_tile<reversed>(t, state);
    if (state == 0 && !gated) load_tile(t, f.sizes.out, f.d_out, s.g);
    adjoint_of_tile<reversed>(t, state);
    gradients(t, state);
  }
  if (f.sizes.shared) add_to_sum(t);
}

}  // namespace
}  // namespace dass::cpu
