// The four-direction scan of a map, backward: see ss2d_common.h and, for the equations, dass_ops/SCAN.md.
//
// A task goes through blocks of W channels; for each it walks every direction from its last chunk to its first, recomputing the states
// of a chunk from the one saved at its entry. d_x_dbl is a sum over channels: each task adds up its own blocks in a slab of its own,
// and the slabs are added in order at the end. How many there are depends on shapes alone.
#pragma once

#include <type_traits>

namespace dass::cpu {
namespace {

// A parameter's gradient: for one image alone it is written where it belongs, else for each and added up afterwards.
struct SumOverBatch {
  int64_t batch, n;
  Buffer apart;
  float *result, *to;  // (batch, n)

  SumOverBatch(void* result, int64_t batch, int64_t n)
      : batch(batch),
        n(n),
        apart(batch == 1 ? 0 : 4 * batch * n),
        result(static_cast<float*>(result)),
        to(batch == 1 ? this->result : apart.floats()) {}

  void add_up() const {
    if (batch == 1) return;
    constexpr int64_t per_task = 8192;
    parallel(divide_up(n, per_task), [&](int64_t task) {
      for (int64_t i = task * per_task; i < smaller_of((task + 1) * per_task, n); i += W) {
        const int count = static_cast<int>(smaller_of(W, n - i));
        V sum = load_part(to + i, count);
        for (int64_t b = 1; b < batch; ++b) sum = sum + load_part(to + b * n + i, count);
        store_part(result + i, sum, count);
      }
    });
  }
};

struct Ss2dBackwardPlan {
  const Ss2dBackward& f;
  const Ss2dSizes& sizes;
  PackedMaps packed;
  MapOrder order;
  int64_t blocks, slabs, per_slab, length, slab_row;
  Buffer partial;                              // (batch, slabs, 4, rows, slab_row)
  SumOverBatch d_A, d_bias, d_weight, d_skip;  // (4, D, N), (4, D), (4, D, R), (D)

  explicit Ss2dBackwardPlan(const Ss2dBackward& f)
      : f(f),
        sizes(f.sizes),
        packed(sizes),
        order(sizes),
        blocks(divide_up(sizes.channels, W)),
        slabs(divide_up(blocks, divide_up(blocks, wanted_slabs(sizes)))),
        per_slab(divide_up(blocks, slabs)),
        length(sizes.length()),
        slab_row(round_up(length, 16)),
        partial(4 * sizes.batch * slabs * 4 * sizes.rows() * slab_row),
        d_A(f.d_A_logs, sizes.batch, 4 * sizes.channels * sizes.state),
        d_bias(f.d_dt_bias, sizes.batch, 4 * sizes.channels),
        d_weight(f.d_dt_weight, sizes.batch, 4 * sizes.channels * sizes.rank),
        d_skip(f.d_Ds, sizes.batch, sizes.channels) {}

  static int64_t wanted_slabs(const Ss2dSizes& sizes) {
    return larger_of(1, (sizes.length() > 65536 ? 4 : 8) / larger_of(1, sizes.batch));
  }
  float* slab(int64_t b, int64_t s, int64_t k) const {
    return partial.floats() + ((b * slabs + s) * 4 + k) * sizes.rows() * slab_row;
  }
};

template <bool reversed, bool starts>
void backward_direction(const Ss2dBackwardTask& task, int64_t k, float* slab) {
  const Ss2dBackwardPlan& plan = task.plan;
  const Ss2dBackward& f = plan.f;
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = plan.length, N = sizes.state, R = sizes.rank, rows = sizes.rows();
  const int64_t chunk = sizes.chunk, chunks = sizes.chunks, channel = k * D + task.first;
  const int64_t sequence = (task.b * 4 + k) * D + task.first;
  turn_weight(static_cast<const float*>(f.dt_weight) + channel * R, R, task.channels, task.weight);
  const V bias = lane_parameter(static_cast<const float*>(f.dt_bias) + channel, 1, task.channels);
  const float* boundary = static_cast<const float*>(f.boundary_states) + sequence * chunks * N;
  BackwardSums sums{all(0.0f), all(0.0f)};
  fill_row(task.d_weight, 0.0f, R * W);
  for (int64_t n = 0; n < N; ++n) {
    store(task.mu + n * W, all(0.0f));
    store(task.d_A + n * W, all(0.0f));
    const V A_log = lane_parameter(static_cast<const float*>(f.A_logs) + channel * N + n, N, task.channels);
    store(task.A + n * W, exp2(A_log * all(log2_e)) * all(-1.0f));
  }
  for (int64_t walked = 0; walked < chunks; ++walked) {
    const int64_t j = reversed ? walked : chunks - 1 - walked, p = j * chunk, n = smaller_of(chunk, L - p);
    const int64_t padded = round_up(n, W);
    const float* steps = plan.packed.at(task.b, k, p);
    const uint32_t* order = plan.order.of(k) + p;
    const bool together = interleaved && N == 1;
    if (!together) {
      low_rank(steps, rows, R, task.weight, bias, task.v, n);
      step_sizes_and_slopes(task.v, task.dt, n);
    }
    const int64_t turned_row = chunk + 16;  // off a power of two
    float* const tiles[] = {task.d_B, task.d_C, task.d_dt};
    for (float* tile : tiles) fill_row(tile + n * W, 0.0f, (padded - n) * W);
    for (int64_t state = 0; state < N; ++state) {
      const float *B = steps + (R + state) * group, *C = B + N * group;
      float *slab_B = slab + (R + state) * plan.slab_row + p, *slab_C = slab_B + N * plan.slab_row;
      const V entering = lane_parameter(boundary + j * N + state, chunks * N, task.channels);
      const V exponent = load(task.A + state * W) * all(log2_e);
      if (together) {
        recompute_alone<reversed>(task, order, n, exponent, bias, steps, rows, R, entering);
      } else if (N == 1) {
        recompute_apart<reversed, true>(task, order, n, exponent, B, rows, entering);
      } else {
        recompute_apart<reversed, false>(task, order, n, exponent, B, rows, entering);
        walk_back<reversed>(task, order, n, B, C, rows, state);
        add_sums(task.d_B, slab_B, task.adds, padded);
        add_sums(task.d_C, slab_C, task.adds, padded);
        continue;
      }
      walk_back_alone<reversed, starts>(task, order, n, B, C, rows, slab_B, slab_C, turned_row, sums);
    }
    if (N != 1)
      for (int64_t t = 0; t < n; ++t) {
        const int64_t at = order[t] * int64_t{W};
        const V d_v = load(task.d_dt + t * W) * load(task.v + t * W);
        sums.bias = sums.bias + d_v;
        store(task.d_dt + t * W, d_v);
        const V g = load(task.g + at);
        store(task.d_x + at, (starts ? g * task.skip : load(task.d_x + at)) + load(task.d_u + t * W));
        if constexpr (starts) sums.skip = fma(g, load(task.x + at), sums.skip);
      }
    if (N != 1) turn_tile(task.d_dt, task.turned, turned_row, padded);
    // -- products
    for (int64_t part = 0, parts = divide_up(R, octet); part < parts; ++part) {
      const int64_t r = part * R / parts, together = (part + 1) * R / parts - r;
      float* const to = slab + r * plan.slab_row + p;
      const auto products = [&](auto count) {
        add_to_slab<decltype(count)::value>(task.turned, turned_row, task.weight + r * W, to, plan.slab_row, task.adds, padded);
        add_weight_gradient<decltype(count)::value>(task.d_dt, steps + r * group, rows, task.d_weight + r * W, n);
      };
      switch (together) {
        case 1: products(std::integral_constant<int, 1>{}); break;
        case 2: products(std::integral_constant<int, 2>{}); break;
        case 3: products(std::integral_constant<int, 3>{}); break;
        case 4: products(std::integral_constant<int, 4>{}); break;
        case 5: products(std::integral_constant<int, 5>{}); break;
        case 6: products(std::integral_constant<int, 6>{}); break;
        case 7: products(std::integral_constant<int, 7>{}); break;
        default: products(std::integral_constant<int, 8>{});
      }
    }
  }
  scatter_lanes(sums.bias, plan.d_bias.to + sequence, 1, task.channels);
  if (k == 0) scatter_lanes(sums.skip, plan.d_skip.to + task.b * D + task.first, 1, task.channels);
  for (int64_t n = 0; n < N; ++n)  // d_A_logs = A d_A
    scatter_lanes(load(task.d_A + n * W) * load(task.A + n * W), plan.d_A.to + sequence * N + n, N, task.channels);
  lanes_to_rows(Dtype::float32, plan.d_weight.to + sequence * R, R, task.channels, R,
                [&](int64_t r) { return load(task.d_weight + r * W); });
}

// d_x_dbl from the slabs, put back into the order of the map.
void finish_low_rank(const Ss2dBackwardPlan& plan) {
  const Ss2dSizes& sizes = plan.sizes;
  const int64_t rows = sizes.rows(), L = plan.length, height = sizes.height, width = sizes.width, slab = 4 * rows * plan.slab_row;
  parallel(sizes.batch * 4 * rows, [&](int64_t i) {
    const int64_t b = i / (4 * rows), k = i / rows % 4, row = i % rows;
    const float* first = plan.slab(b, 0, k) + row * plan.slab_row;
    float* sum = static_cast<float*>(thread_scratch(8 * plan.slab_row));
    for (int64_t l = 0; l < L; l += W) {
      V total = load(first + l);
      for (int64_t s = 1; s < plan.slabs; ++s) total = total + load(first + s * slab + l);
      store(sum + l, total);
    }
    void* to = element(sizes.io, plan.f.d_x_dbl, i * L);
    if (k % 2 == 0) return store_row(sizes.io, to, sum, L);
    float* map = sum + plan.slab_row;
    for (int64_t w = 0; w < width; w += W) {
      const int64_t count = smaller_of(W, width - w);
      rows_to_lanes(Dtype::float32, sum + w * height, height, count, height,
                    [&](int64_t h, V x) {
                      float* at = map + h * width + w;
                      count == W ? store(at, x) : store_part(at, x, static_cast<int>(count));
                    });
    }
    store_row(sizes.io, to, map, L);
  });
}

bool ss2d_backward_lanes(const Ss2dBackward& f) {
  const Ss2dBackwardPlan plan(f);
  const Ss2dSizes& sizes = f.sizes;
  const int64_t D = sizes.channels, L = plan.length, N = sizes.state, R = sizes.rank, chunk = sizes.chunk;
  const int64_t map = plan.order.places() * W, blocks = plan.blocks;
  pack_and_order(plan.packed, f.x_dbl, plan.order);
  const uint32_t* place = plan.order.of(0);
  const int64_t position = sizes.channels_last ? D : 1, channel = sizes.channels_last ? 1 : L;
  const bool streamed = sizes.batch * D * L >= streaming_elements && can_be_streamed(sizes.io, f.d_x, D, position, L);
  // As in the forward: with few slabs each direction is a task of its own, and d_x the same to the bit.
  const bool split = sizes.batch * plan.slabs < thread_count();
  const Buffer apart(split ? 4 * sizes.batch * blocks * 4 * map : 0);
  const auto skip_of = [&](int64_t d, int64_t channels) {
    const float* Ds = static_cast<const float*>(f.Ds) + d;
    V sum = lane_parameter(Ds, 1, channels);
    for (int k = 1; k < 4; ++k) sum = sum + lane_parameter(Ds + k * D, 1, channels);
    return sum;
  };
  const auto x_rows = [&](int64_t b, int64_t d) { return element(sizes.io, f.x.data, b * f.x.batch + d * f.x.channel); };
  const auto g_rows = [&](int64_t b, int64_t d) { return element(sizes.out, f.d_y.data, b * f.d_y.batch + d * f.d_y.channel); };
  const auto d_x_rows = [&](int64_t b, int64_t d) { return element(sizes.io, f.d_x, b * D * L + d * channel); };
  const auto store_d_x = [&](int64_t b, int64_t d, int64_t channels, const float* d_x) {
    lanes_to_map(sizes.io, d_x_rows(b, d), channel, position, channels, L,
                 [&](int64_t p) { return load(d_x + place[p] * int64_t{W}); }, streamed);
  };
  const bool small = L * W <= 1 << 14;  // as in the forward
  parallel(sizes.batch * plan.slabs * (split ? 4 : 1), [&](int64_t i) {
    const int64_t item = split ? i / 4 : i, b = item / plan.slabs, slab = item % plan.slabs;
    const int64_t tile = (round_up(chunk, W) + 3) * W;  // off a power of two
    float* scratch = static_cast<float*>(
        thread_scratch(4 * ((split ? 2 : 3) * map + 8 * tile + W * (chunk + 16) + (2 * R + 3 * N) * W)));
    const int64_t end = smaller_of((slab + 1) * plan.per_slab, blocks);
    for (int64_t block = slab * plan.per_slab; block < end; ++block) {
      const int64_t d = block * W, channels = smaller_of(W, D - d);
      float* next = scratch;
      const auto take = [&](int64_t n) { return next += n, next - n; };
      Ss2dBackwardTask task{plan, b, d, channels, block != slab * plan.per_slab};
      task.x = take(map), task.g = take(map);
      task.d_x = split ? apart.floats() + ((b * blocks + block) * 4 + i % 4) * map : take(map);
      float** const tiles[] = {&task.v, &task.dt, &task.a, &task.ah, &task.d_B, &task.d_C, &task.d_dt, &task.d_u};
      for (float** at : tiles) *at = take(tile);
      task.turned = take(W * (chunk + 16));
      task.weight = take(R * W), task.d_weight = take(R * W);
      task.mu = take(N * W), task.A = take(N * W), task.d_A = take(N * W);
      map_to_lanes(sizes.io, x_rows(b, d), f.x.channel, position, channels, L,
                    [&](int64_t p, V x) { store(task.x + place[p] * int64_t{W}, x); });
      task.skip = split ? all(0.0f) : skip_of(d, channels);
      map_to_lanes(sizes.out, g_rows(b, d), f.d_y.channel, position, channels, L,
                    [&](int64_t p, V g) { store(task.g + place[p] * int64_t{W}, g); });
      FetchedAhead ahead;
      task.ahead = &ahead;
      const bool last = block + 1 == end;
      if (small && !split && !streamed) ahead.out = lines_of_map(sizes.io, d_x_rows(b, d), channel, position, channels, L);
      if (small && !split && !last) {
        const int64_t next = smaller_of(W, D - d - W);
        ahead.x = lines_of_map(sizes.io, x_rows(b, d + W), f.x.channel, position, next, L);
        ahead.g = lines_of_map(sizes.out, g_rows(b, d + W), f.d_y.channel, position, next, L);
      }
      for (int64_t k = split ? i % 4 : 0; k < (split ? i % 4 + 1 : 4); ++k) {
        ahead.d_weight = lines_of_weight(plan.d_weight.to + b * plan.d_weight.n, sizes, k, d);
        ahead.weight = split || (k == 3 && last) ? Lines{} : lines_of_weight(f.dt_weight, sizes, k < 3 ? k + 1 : 0, k < 3 ? d : d + W);
        const auto run = k >= 2 ? (split ? backward_direction<true, true> : backward_direction<true, false>)
                                : (split || k == 0 ? backward_direction<false, true> : backward_direction<false, false>);
        run(task, k, plan.slab(b, slab, k));
      }
      // -- out
      if (!split) store_d_x(b, d, channels, task.d_x);
    }
  });
  if (split)
    parallel(sizes.batch * blocks, [&](int64_t item) {
      const int64_t b = item / blocks, d = item % blocks * W, channels = smaller_of(W, D - d);
      float* d_x = apart.floats() + item * 4 * map;
      const V skip = skip_of(d, channels);
      map_to_lanes(sizes.out, g_rows(b, d), f.d_y.channel, position, channels, L,
                    [&](int64_t p, V g) {
                      const int64_t at = place[p] * int64_t{W};
                      V sum = g * skip;
                      for (int k = 0; k < 4; ++k) sum = sum + load(d_x + k * map + at);
                      store(d_x + at, sum);
                    });
      store_d_x(b, d, channels, d_x);
    });
  finish_low_rank(plan);
  const SumOverBatch* const sums[] = {&plan.d_weight, &plan.d_bias, &plan.d_A, &plan.d_skip};
  for (const SumOverBatch* sum : sums) sum->add_up();
  float* d_Ds = static_cast<float*>(f.d_Ds);
  for (int k = 1; k < 4; ++k) __builtin_memcpy(d_Ds + k * D, d_Ds, 4 * D);  // the same number for every direction
  return true;
}

}  // namespace
}  // namespace dass::cpu
