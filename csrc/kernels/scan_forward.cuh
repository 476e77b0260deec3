// The selective scan, forward: equations (1) to (6) of SCAN.md.
//
// A warp owns a channel and walks its sequence in tiles of 256 steps, kRun to a lane. Within a tile: each lane runs over its
// steps from 0, the warp scans the 32 results, each lane runs again from the state that enters it. No warp waits for another.
// Long sequences are cut into segments that run at the same time: a summary pass, carry.cuh, then this same kernel from the
// states that enter the segments. Where several directions share u, one warp walks them all and adds up their outputs.
#pragma once

#include "arguments.h"
#include "kernels/affine_scan.cuh"

namespace dass {

constexpr int kTile = kWarp * kRun;
static_assert(kTile == kSaveEvery, "a tile starts from a boundary state");

enum Vectors : int { kVectorU = 1, kVectorDelta = 2, kVectorZ = 4, kVectorB = 8, kVectorC = 16, kVectorOut = 32, kVectorRows = 64 };

struct Segments {
  int64_t count = 1, tiles = 0;  // how many (fewer than 2^31, like the blocks of a grid); tiles in each
  void* states = nullptr;        // (batch, directions, count, state, channels): of a summary, then what enters each segment
  void* sums = nullptr;          // (batch, directions, count, channels): sum of dt over the segment
};

struct ScanForwardWork {
  ScanForward call;
  Segments segments;
  int64_t tiles = 0;
  unsigned channel_blocks = 1;        // thread blocks for the channels of one sequence
  unsigned share_B = 1, share_C = 1;  // channels in a group
  void* partial = nullptr;  // (batch, channels, length) of state dtype: the sum over the directions so far, where u is shared
  int vectors = 0;
};

// What a block of the grid (batch, directions, segments, blocks of channels) does. 32 bits: a grid has fewer than 2^31 blocks.
struct BlockPlace {
  unsigned channels, segment, direction, batch;

  DASS_DEVICE BlockPlace(unsigned channel_blocks, int64_t segments, int64_t directions) {
    unsigned index = blockIdx.x;
    channels = index % channel_blocks;
    index /= channel_blocks;
    segment = index % static_cast<unsigned>(segments);
    index /= static_cast<unsigned>(segments);
    direction = index % static_cast<unsigned>(directions);
    batch = index / static_cast<unsigned>(directions);
  }
};

// The row of B or C that a channel reads.
template <typename T>
struct ProjectionRows {
  const void* data;
  int64_t offset, stride;
  bool constant;

  DASS_DEVICE ProjectionRows(const Projection& p, unsigned share, int64_t b, int64_t k, int64_t d)
      : data(p.data), offset(b * p.batch + k * p.direction + static_cast<unsigned>(d) / share * p.group), stride(p.state),
        constant(p.constant) {}

  DASS_DEVICE void load(Run<State<T>>& run, int64_t n, int64_t first, int count, bool vectors) const {
    if (constant) {
      const State<T> value = static_cast<const State<T>*>(data)[offset + n * stride];
#pragma unroll
      for (int i = 0; i < kRun; ++i) run[i] = value;
    } else {
      load_run<T>(run, static_cast<const T*>(data) + offset + n * stride + first, count, vectors);
    }
  }
};

template <typename T>
DASS_DEVICE const T* row_of(const Sequence& s, int64_t b, int64_t k, int64_t d) {
  return static_cast<const T*>(s.data) + b * s.batch + k * s.direction + d * s.channel;
}

DASS_DEVICE int steps_at(int64_t first, int64_t length) {  // of a run that starts at `first`
  return length <= first ? 0 : length - first < kRun ? static_cast<int>(length - first) : kRun;
}

template <typename T, bool kDown, bool kSummary>
DASS_DEVICE void scan_forward_walk(const ScanForwardWork& work, int64_t b, int64_t k, int64_t d, int64_t segment,
                                   State<T>* A2, State<T>* carry) {
  using S = State<T>;
  const ScanForward& call = work.call;
  const ScanSizes& sizes = call.sizes;
  const int lane = threadIdx.x % kWarp;
  const Lanes<kWarp, kDown> lanes{lane};
  const int64_t N = sizes.state, row = (b * sizes.directions + k) * sizes.channels + d;
  const int64_t segment_row = (b * sizes.directions + k) * work.segments.count + segment;
  const T *u_row = row_of<T>(call.u, b, k, d), *delta_row = row_of<T>(call.delta, b, k, d);
  const T* z_row = call.z.data ? row_of<T>(call.z, b, k, d) : nullptr;
  const ProjectionRows<T> B_rows(call.B, work.share_B, b, k, d), C_rows(call.C, work.share_C, b, k, d);
  const S bias = call.delta_bias ? static_cast<const S*>(call.delta_bias)[k * sizes.channels + d] : S(0);
  const S skip = call.D ? static_cast<const S*>(call.D)[k * sizes.channels + d] : S(0);
  S* const states = static_cast<S*>(work.segments.states);
  const S* const initial = static_cast<const S*>(call.initial_state);

  __syncwarp();
  for (int64_t n = lane; n < N; n += kWarp) {
    A2[n] = static_cast<const S*>(call.A)[(k * sizes.channels + d) * N + n] * S(kLog2E);
    if (kSummary) carry[n] = S(0);
    else if (work.segments.count > 1) carry[n] = states[(segment_row * N + n) * sizes.channels + d];
    else carry[n] = initial ? initial[row * N + n] : S(0);
  }
  S total = 0;
  const int64_t begin = segment * work.segments.tiles;
  const int64_t end = begin + work.segments.tiles < work.tiles ? begin + work.segments.tiles : work.tiles;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t tile = kDown ? end - 1 - (s - begin) : s;
    const int64_t first = tile * kTile + lane * kRun;
    const int count = steps_at(first, sizes.length);
    __syncwarp();
    if (!kSummary && sizes.chunks) {
      S* boundary = static_cast<S*>(call.boundary_states) + (row * sizes.chunks + tile) * N;
      for (int64_t n = lane; n < N; n += kWarp) boundary[n] = carry[n];
    }
    Run<S> dt, u, dtu, y;
    load_run<T>(dt, delta_row + first, count, work.vectors & kVectorDelta);
    load_run<T>(u, u_row + first, count, work.vectors & kVectorU);
    S sum = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const S v = dt[i] + bias;
      dt[i] = i < count ? (sizes.delta_softplus ? softplus<T>(v).value : v) : S(0);
      dtu[i] = dt[i] * u[i];
      y[i] = skip * u[i];
      sum += dt[i];
    }
    total += sum;
    for (int64_t n = 0; n < N; ++n) {
      Run<S> a, w;
      B_rows.load(w, n, first, count, work.vectors & kVectorB);
      const S factor = A2[n];
      S q = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        a[i] = exp2_of<T>(dt[i] * factor);
        w[i] *= dtu[i];
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) q = a[lanes.step(i)] * q + w[lanes.step(i)];
      S next = carry[n];
      S h = lanes.enter(exp2_of<T>(sum * factor), q, next);
      __syncwarp();
      if (lane == 0) carry[n] = next;
      if constexpr (!kSummary) {
        Run<S> C;  // not before: registers
        C_rows.load(C, n, first, count, work.vectors & kVectorC);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int j = lanes.step(i);
          h = a[j] * h + w[j];
          y[j] += C[j] * h;
        }
      }
    }
    if constexpr (kSummary) continue;
    if (z_row) {
      Run<S> z;
      load_run<T>(z, z_row + first, count, work.vectors & kVectorZ);
#pragma unroll
      for (int i = 0; i < kRun; ++i) y[i] *= z[i] * logistic<T>(z[i]);
    }
    if (sizes.shared) {
      S* sum_row = static_cast<S*>(work.partial) + (b * sizes.channels + d) * sizes.length + first;
      if (k > 0) {
        Run<S> earlier;
        load_run<S>(earlier, sum_row, count, work.vectors & kVectorRows);
#pragma unroll
        for (int i = 0; i < kRun; ++i) y[i] += earlier[i];
      }
      if (k + 1 < sizes.directions) {
        store_run<S>(sum_row, y, count, work.vectors & kVectorRows);
        continue;
      }
    }
    const int64_t out_row = sizes.shared ? b * sizes.channels + d : row;
    store_run<T>(call.out, out_row * sizes.length + first, y, count, work.vectors & kVectorOut, sizes.out != sizes.io);
  }
  __syncwarp();
  const bool last = segment == (kDown ? 0 : work.segments.count - 1);
  for (int64_t n = lane; n < N; n += kWarp) {
    if (kSummary) states[(segment_row * N + n) * sizes.channels + d] = carry[n];
    else if (last) static_cast<S*>(call.last_state)[row * N + n] = carry[n];
  }
  if (kSummary) {
    total = sum_over<kWarp>(total);
    if (lane == 0) static_cast<S*>(work.segments.sums)[segment_row * sizes.channels + d] = total;
  }
}

constexpr int kForwardWarps = 4;

template <typename T, bool kSummary>
__global__ void __launch_bounds__(kForwardWarps * kWarp, kSummary ? 5 : 4) scan_forward_kernel(const ScanForwardWork work) {
  using S = State<T>;
  const ScanSizes& sizes = work.call.sizes;
  const bool all_directions = sizes.shared && !kSummary;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const BlockPlace place(work.channel_blocks, work.segments.count, all_directions ? 1 : sizes.directions);
  const int64_t d = static_cast<int64_t>(place.channels) * warps + warp, first_direction = place.direction;
  if (d >= sizes.channels) return;
  S* A2 = shared_memory<S>() + 2 * warp * sizes.state;
  S* carry = A2 + sizes.state;
  const int64_t end = all_directions ? sizes.directions : first_direction + 1;
  for (int64_t k = first_direction; k < end; ++k) {
    if (sizes.reversed(k)) scan_forward_walk<T, true, kSummary>(work, place.batch, k, d, place.segment, A2, carry);
    else scan_forward_walk<T, false, kSummary>(work, place.batch, k, d, place.segment, A2, carry);
  }
}

}  // namespace dass
