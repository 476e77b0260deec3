// The selective scan, backward: equations (7) and (8) of SCAN.md, in the mu form.
//
// A warp owns a channel and walks its tiles from the last to the first in scan order. In each tile it runs the states forward
// again from the boundary state that the forward pass saved, then mu backward, over the same factors. The warps of a block are
// channels of one group of B and of C: what they contribute to d_B and d_C is added up in shared memory, in the warps' order,
// and goes to a slab of the block's own; sums.cuh adds the slabs. No atomics: the order of every sum is fixed by the shapes.
#pragma once

#include "kernels/scan_forward.cuh"

namespace dass {

constexpr int kBackwardWarps = 8;

struct ScanBackwardWork {
  ScanBackward call;
  Segments segments;  // of mu
  int64_t tiles = 0;
  unsigned unit = 1;         // channels between two borders of a group of B or C
  unsigned units = 0;        // of those
  unsigned blocks = 1;       // thread blocks for a unit
  unsigned channel_blocks = 1;        // of scan_adjoint_kernel, for the channels of one sequence
  unsigned share_B = 1, share_C = 1;  // channels in a group
  int rounds = 1;            // channels that a warp handles, one after the other
  int64_t slabs_B = 0, slabs_C = 0;
  // Partial results of state dtype.
  void *slab_B = nullptr, *slab_C = nullptr;  // (slabs, batch, directions, groups, state, length), where they vary
  void* partial = nullptr;                    // (batch, channels, length): d_u so far, where u is shared
  // (batch * segments, directions, channels[, state]); B and C where constant
  void *part_A = nullptr, *part_B = nullptr, *part_C = nullptr, *part_D = nullptr, *part_bias = nullptr;
  int vectors = 0, gradient_vectors = 0;
};

// Shared memory of one block, in this order.
template <typename S>
struct BackwardShared {
  S* exchanged;                      // (2 buffers, d_B and d_C, warps, kTile)
  S *A2, *carry, *d_A, *d_B, *d_C;   // (rounds, warps, state) each
  S* d_D;                            // (rounds, warps, lanes), then the same for the bias

  __host__ __device__ static int64_t count(int64_t warps, int64_t rounds, int64_t state) {
    return 4 * warps * kTile + rounds * warps * (5 * state + 2 * kWarp);
  }
  DASS_DEVICE BackwardShared(int64_t warps, int64_t rounds, int64_t state) {
    exchanged = shared_memory<S>();
    A2 = exchanged + 4 * warps * kTile;
    carry = A2 + rounds * warps * state;
    d_A = carry + rounds * warps * state;
    d_B = d_A + rounds * warps * state;
    d_C = d_B + rounds * warps * state;
    d_D = d_C + rounds * warps * state;
  }
};

template <typename T>
DASS_DEVICE void load_output_gradient(Run<State<T>>& g, const ScanBackwardWork& work, int64_t b, int64_t k, int64_t d,
                                      int64_t first, int count) {
  const Sequence& s = work.call.d_out;
  const ScanSizes& sizes = work.call.sizes;
  load_run<T>(g, s.data, b * s.batch + k * s.direction + d * s.channel + first, count, work.vectors & kVectorOut,
              sizes.out != sizes.io);
}

template <typename T, bool kDown>
DASS_DEVICE void scan_backward_tile(const ScanBackwardWork& work, const BackwardShared<State<T>>& shared, int64_t b, int64_t k,
                                    int64_t d, bool active, int slot, int64_t tile, int64_t slab_offset_B,
                                    int64_t slab_offset_C, bool first_round, int& buffer) {
  using S = State<T>;
  const ScanBackward& call = work.call;
  const ScanSizes& sizes = call.sizes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Lanes<kWarp, kDown> up{lane};     // of the states
  const Lanes<kWarp, !kDown> down{lane};  // of mu
  const int64_t N = sizes.state, row = (b * sizes.directions + k) * sizes.channels + d;
  const int64_t first = tile * kTile + lane * kRun;
  const int count = active ? steps_at(first, sizes.length) : 0;
  const S bias = call.delta_bias ? static_cast<const S*>(call.delta_bias)[k * sizes.channels + d] : S(0);
  const S skip = call.D ? static_cast<const S*>(call.D)[k * sizes.channels + d] : S(0);
  const ProjectionRows<T> B_rows(call.B, work.share_B, b, k, d), C_rows(call.C, work.share_C, b, k, d);

  Run<S> dt, slope, u, dtu, g, y, sum_B, sum_A;
  load_run<T>(dt, row_of<T>(call.delta, b, k, d) + first, count, work.vectors & kVectorDelta);
  load_run<T>(u, row_of<T>(call.u, b, k, d) + first, count, work.vectors & kVectorU);
  load_output_gradient<T>(g, work, b, k, d, first, count);
  S total = 0;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const S v = dt[i] + bias;
    const Softplus<S> soft = sizes.delta_softplus ? softplus<T>(v) : Softplus<S>{v, S(1)};
    dt[i] = i < count ? soft.value : S(0);
    slope[i] = soft.slope;
    dtu[i] = dt[i] * u[i];
    y[i] = skip * u[i];
    total += dt[i];
    sum_A[i] = sum_B[i] = S(0);
  }
  if (call.z.data) {  // g becomes the gradient of y; d_z waits for y
    Run<S> z;
    load_run<T>(z, row_of<T>(call.z, b, k, d) + first, count, work.vectors & kVectorZ);
#pragma unroll
    for (int i = 0; i < kRun; ++i) g[i] *= z[i] * logistic<T>(z[i]);
  }
  S entering = 0;  // lane n % 32: the boundary state of n
  for (int64_t n = 0; n < N; ++n) {
    if (n % kWarp == 0)
      entering = n + lane < N && active
                     ? static_cast<const S*>(call.boundary_states)[(row * sizes.chunks + tile) * N + n + lane]
                     : S(0);
    Run<S> a, B, C, ah;
    B_rows.load(B, n, first, count, work.vectors & kVectorB);
    C_rows.load(C, n, first, count, work.vectors & kVectorC);
    const S factor = shared.A2[slot * N + n];
    S q = 0, r = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) a[i] = exp2_of<T>(dt[i] * factor);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int j = up.step(i), m = down.step(i);
      q = a[j] * q + dtu[j] * B[j];
      r = a[m] * (r + C[m] * g[m]);
    }
    const S P = exp2_of<T>(total * factor);
    S entering_state = __shfl_sync(kAllLanes, entering, static_cast<int>(n % kWarp));
    S next = shared.carry[slot * N + n];
    S h = up.enter(P, q, entering_state);
    S mu = down.enter(P, r, next);
    S d_A = 0, d_B_sum = 0, d_C_sum = 0;
    Run<S> d_C, d_B;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int j = up.step(i);
      ah[j] = a[j] * h;
      h = ah[j] + dtu[j] * B[j];
      y[j] += C[j] * h;
      d_C[j] = g[j] * h;
      d_C_sum += d_C[j];
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int j = down.step(i);
      const S lambda = mu + C[j] * g[j];
      mu = a[j] * lambda;
      const S product = lambda * ah[j];
      sum_B[j] += lambda * B[j];
      sum_A[j] += factor * product;
      d_A += dt[j] * product;
      d_B[j] = lambda * dtu[j];
      d_B_sum += d_B[j];
    }
    __syncwarp();
    if (lane == 0) shared.carry[slot * N + n] = next;
    d_A = sum_over<kWarp>(d_A);
    if (lane == 0) shared.d_A[slot * N + n] += d_A;
    if (call.B.constant) {
      d_B_sum = sum_over<kWarp>(d_B_sum);
      if (lane == 0) shared.d_B[slot * N + n] += d_B_sum;
    }
    if (call.C.constant) {
      d_C_sum = sum_over<kWarp>(d_C_sum);
      if (lane == 0) shared.d_C[slot * N + n] += d_C_sum;
    }
    if (call.B.constant && call.C.constant) continue;
    // Over the warps of the block. Two buffers in turn, so that one barrier is enough.
    S* exchanged_B = shared.exchanged + (buffer * 2 * warps) * kTile;
    S* exchanged_C = exchanged_B + warps * kTile;
    buffer ^= 1;
    if (!call.B.constant) store_run<S>(exchanged_B + warp * kTile + lane * kRun, d_B, kRun, true);
    if (!call.C.constant) store_run<S>(exchanged_C + warp * kTile + lane * kRun, d_C, kRun, true);
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += blockDim.x) {
      const int64_t position = tile * kTile + i;
      if (position >= sizes.length) break;
      if (!call.B.constant) {
        S* slab = static_cast<S*>(work.slab_B) + slab_offset_B + n * sizes.length + position;
        S sum = first_round ? S(0) : *slab;
        for (int from = 0; from < warps; ++from) sum += exchanged_B[from * kTile + i];
        *slab = sum;
      }
      if (!call.C.constant) {
        S* slab = static_cast<S*>(work.slab_C) + slab_offset_C + n * sizes.length + position;
        S sum = first_round ? S(0) : *slab;
        for (int from = 0; from < warps; ++from) sum += exchanged_C[from * kTile + i];
        *slab = sum;
      }
    }
  }
  if (!active) return;

  S d_D = 0, d_bias = 0;
  Run<S> d_u, d_delta;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    d_D += g[i] * u[i];
    d_u[i] = skip * g[i] + dt[i] * sum_B[i];
    const S d_dt = S(1 / kLog2E) * sum_A[i] + u[i] * sum_B[i];
    d_delta[i] = i < count ? d_dt * slope[i] : S(0);
    d_bias += d_delta[i];
  }
  shared.d_D[slot * kWarp + lane] += d_D;
  shared.d_D[(work.rounds * warps + slot) * kWarp + lane] += d_bias;
  const int64_t at = row * sizes.length + first;
  store_run<T>(static_cast<T*>(call.d_delta) + at, d_delta, count, work.gradient_vectors & kVectorDelta);
  if (call.z.data) {
    Run<S> z, d_z;
    load_run<T>(z, row_of<T>(call.z, b, k, d) + first, count, work.vectors & kVectorZ);
    load_output_gradient<T>(g, work, b, k, d, first, count);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const S s = logistic<T>(z[i]);
      d_z[i] = g[i] * y[i] * s * (S(1) + z[i] * (S(1) - s));
    }
    store_run<T>(static_cast<T*>(call.d_z) + at, d_z, count, work.gradient_vectors & kVectorZ);
  }
  if (sizes.shared) {
    const int64_t shared_at = (b * sizes.channels + d) * sizes.length + first;
    S* sum_row = static_cast<S*>(work.partial) + shared_at;
    if (k > 0) {
      Run<S> earlier;
      load_run<S>(earlier, sum_row, count, work.gradient_vectors & kVectorRows);
#pragma unroll
      for (int i = 0; i < kRun; ++i) d_u[i] += earlier[i];
    }
    if (k + 1 < sizes.directions) store_run<S>(sum_row, d_u, count, work.gradient_vectors & kVectorRows);
    else store_run<T>(static_cast<T*>(call.d_u) + shared_at, d_u, count, work.gradient_vectors & kVectorU);
  } else {
    store_run<T>(static_cast<T*>(call.d_u) + at, d_u, count, work.gradient_vectors & kVectorU);
  }
}

template <typename T>
__global__ void __launch_bounds__(kBackwardWarps * kWarp) scan_backward_kernel(const ScanBackwardWork work) {
  using S = State<T>;
  const ScanBackward& call = work.call;
  const ScanSizes& sizes = call.sizes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t N = sizes.state, segments = work.segments.count;
  const BlockPlace place(work.blocks * work.units, segments, sizes.shared ? 1 : sizes.directions);
  const unsigned block = place.channels % work.blocks, unit = place.channels / work.blocks;
  const int64_t segment = place.segment, first_direction = place.direction, b = place.batch;
  const int64_t first_channel = static_cast<int64_t>(unit) * work.unit + block * warps * work.rounds;
  const int64_t end_channel = (int64_t{1} + unit) * work.unit;
  const int64_t part = b * segments + segment;
  const BackwardShared<S> shared(warps, work.rounds, N);
  const int64_t begin = segment * work.segments.tiles;
  const int64_t end = begin + work.segments.tiles < work.tiles ? begin + work.segments.tiles : work.tiles;
  const auto slab_offset = [&](const Projection& p, unsigned share, int64_t k) {  // of this block's slab, to its group's first state
    if (p.constant) return int64_t{0};
    const unsigned units_of_group = share / work.unit, slab = unit % units_of_group * work.blocks + block;
    return (((slab * sizes.batch + b) * sizes.directions + k) * p.groups + unit / units_of_group) * N * sizes.length;
  };
  int buffer = 0;

  const int64_t end_direction = sizes.shared ? sizes.directions : first_direction + 1;
  for (int64_t k = first_direction; k < end_direction; ++k) {
    const bool reversed = sizes.reversed(k);
    const int64_t offset_B = slab_offset(call.B, work.share_B, k), offset_C = slab_offset(call.C, work.share_C, k);
    __syncwarp();
    for (int round = 0; round < work.rounds; ++round) {
      const int slot = round * warps + warp;
      const int64_t d = first_channel + slot;
      const int64_t row = (b * sizes.directions + k) * sizes.channels + d;
      const bool active = d < end_channel;
      for (int64_t n = lane; n < N; n += kWarp) {
        S mu = 0, A2 = 0;
        if (active) {
          A2 = static_cast<const S*>(call.A)[(k * sizes.channels + d) * N + n] * S(kLog2E);
          if (segments > 1)
            mu = static_cast<const S*>(work.segments.states)[(((b * sizes.directions + k) * segments + segment) * N + n) * sizes.channels + d];
          else if (call.d_last_state)
            mu = static_cast<const S*>(call.d_last_state)[row * N + n];
        }
        shared.A2[slot * N + n] = A2;
        shared.carry[slot * N + n] = mu;
        shared.d_A[slot * N + n] = shared.d_B[slot * N + n] = shared.d_C[slot * N + n] = S(0);
      }
      shared.d_D[slot * kWarp + lane] = shared.d_D[(work.rounds * warps + slot) * kWarp + lane] = S(0);
    }
    __syncwarp();
    for (int64_t s = begin; s < end; ++s) {
      const int64_t tile = reversed ? s : end - 1 - (s - begin);
      for (int round = 0; round < work.rounds; ++round) {
        const int slot = round * warps + warp;
        const bool active = first_channel + slot < end_channel;
        const int64_t d = active ? first_channel + slot : first_channel;  // a warp without a channel helps with the barriers
        if (reversed)
          scan_backward_tile<T, true>(work, shared, b, k, d, active, slot, tile, offset_B, offset_C, round == 0, buffer);
        else
          scan_backward_tile<T, false>(work, shared, b, k, d, active, slot, tile, offset_B, offset_C, round == 0, buffer);
        __syncwarp();
      }
    }
    const bool first_segment = segment == (reversed ? segments - 1 : 0);
    for (int round = 0; round < work.rounds; ++round) {
      const int slot = round * warps + warp;
      const int64_t d = first_channel + slot;
      const S d_D = sum_over<kWarp>(shared.d_D[slot * kWarp + lane]);
      const S d_bias = sum_over<kWarp>(shared.d_D[(work.rounds * warps + slot) * kWarp + lane]);
      if (d >= end_channel) continue;
      const int64_t at = (part * sizes.directions + k) * sizes.channels + d;
      const int64_t row = (b * sizes.directions + k) * sizes.channels + d;
      for (int64_t n = lane; n < N; n += kWarp) {
        static_cast<S*>(work.part_A)[at * N + n] = shared.d_A[slot * N + n];
        if (call.B.constant) static_cast<S*>(work.part_B)[at * N + n] = shared.d_B[slot * N + n];
        if (call.C.constant) static_cast<S*>(work.part_C)[at * N + n] = shared.d_C[slot * N + n];
        if (call.initial_state && first_segment) static_cast<S*>(call.d_initial_state)[row * N + n] = shared.carry[slot * N + n];
      }
      if (lane == 0 && call.D) static_cast<S*>(work.part_D)[at] = d_D;
      if (lane == 0 && call.delta_bias) static_cast<S*>(work.part_bias)[at] = d_bias;
    }
  }
}

// The adjoint of a segment from mu = 0 at its end, and its sum of dt.
template <typename T, bool kDown>
DASS_DEVICE void scan_adjoint_walk(const ScanBackwardWork& work, int64_t b, int64_t k, int64_t d, int64_t segment,
                                   State<T>* A2, State<T>* carry) {
  using S = State<T>;
  const ScanBackward& call = work.call;
  const ScanSizes& sizes = call.sizes;
  const int lane = threadIdx.x % kWarp;
  const Lanes<kWarp, !kDown> lanes{lane};
  const int64_t N = sizes.state, segment_row = (b * sizes.directions + k) * work.segments.count + segment;
  const ProjectionRows<T> C_rows(call.C, work.share_C, b, k, d);
  const S bias = call.delta_bias ? static_cast<const S*>(call.delta_bias)[k * sizes.channels + d] : S(0);
  for (int64_t n = lane; n < N; n += kWarp) {
    A2[n] = static_cast<const S*>(call.A)[(k * sizes.channels + d) * N + n] * S(kLog2E);
    carry[n] = S(0);
  }
  S all = 0;
  const int64_t begin = segment * work.segments.tiles;
  const int64_t end = begin + work.segments.tiles < work.tiles ? begin + work.segments.tiles : work.tiles;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t tile = kDown ? s : end - 1 - (s - begin);
    const int64_t first = tile * kTile + lane * kRun;
    const int count = steps_at(first, sizes.length);
    __syncwarp();
    Run<S> dt, g;
    load_run<T>(dt, row_of<T>(call.delta, b, k, d) + first, count, work.vectors & kVectorDelta);
    load_output_gradient<T>(g, work, b, k, d, first, count);
    if (call.z.data) {
      Run<S> z;
      load_run<T>(z, row_of<T>(call.z, b, k, d) + first, count, work.vectors & kVectorZ);
#pragma unroll
      for (int i = 0; i < kRun; ++i) g[i] *= z[i] * logistic<T>(z[i]);
    }
    S total = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const S v = dt[i] + bias;
      dt[i] = i < count ? (sizes.delta_softplus ? softplus<T>(v).value : v) : S(0);
      total += dt[i];
    }
    all += total;
    for (int64_t n = 0; n < N; ++n) {
      Run<S> C;
      C_rows.load(C, n, first, count, work.vectors & kVectorC);
      const S factor = A2[n];
      S r = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int j = lanes.step(i);
        r = exp2_of<T>(dt[j] * factor) * (r + C[j] * g[j]);
      }
      S next = carry[n];
      lanes.enter(exp2_of<T>(total * factor), r, next);
      __syncwarp();
      if (lane == 0) carry[n] = next;
    }
  }
  __syncwarp();
  for (int64_t n = lane; n < N; n += kWarp)
    static_cast<S*>(work.segments.states)[(segment_row * N + n) * sizes.channels + d] = carry[n];
  all = sum_over<kWarp>(all);
  if (lane == 0) static_cast<S*>(work.segments.sums)[segment_row * sizes.channels + d] = all;
}

template <typename T>
__global__ void __launch_bounds__(kForwardWarps * kWarp, 6) scan_adjoint_kernel(const ScanBackwardWork work) {
  using S = State<T>;
  const ScanSizes& sizes = work.call.sizes;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const BlockPlace place(work.channel_blocks, work.segments.count, sizes.directions);
  const int64_t d = static_cast<int64_t>(place.channels) * warps + warp, k = place.direction;
  if (d >= sizes.channels) return;
  S* A2 = shared_memory<S>() + 2 * warp * sizes.state;
  S* carry = A2 + sizes.state;
  if (sizes.reversed(k)) scan_adjoint_walk<T, true>(work, place.batch, k, d, place.segment, A2, carry);
  else scan_adjoint_walk<T, false>(work, place.batch, k, d, place.segment, A2, carry);
}

}  // namespace dass
