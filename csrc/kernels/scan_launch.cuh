// Plans and launches of the selective scan. A plan depends on shapes and dtypes alone, so results repeat bit for bit.
#pragma once

#include <algorithm>
#include <numeric>

#include "kernels/carry.cuh"
#include "kernels/launch.h"
#include "kernels/sums.cuh"
#include "kernels/scan_backward.cuh"

namespace dass {

constexpr int64_t kFewWarps = 1024;     // with fewer sequences than this, long ones are cut into segments
constexpr int64_t kEnoughWarps = 4096;  // this many work at the same time
constexpr int64_t kSegmentTiles = 4;    // the fewest tiles that pay for a summary

inline void plan_segments(Segments& segments, int64_t sequences, int64_t tiles) {
  segments.count = 1;
  if (sequences > 0 && sequences < kFewWarps && tiles >= 2 * kSegmentTiles)
    segments.count = std::min(divide_up(kEnoughWarps, sequences), tiles / kSegmentTiles);
  segments.tiles = std::max<int64_t>(divide_up(tiles, segments.count), 1);
  segments.count = std::max<int64_t>(divide_up(tiles, segments.tiles), 1);
}

template <typename S>
void take_segments(Segments& segments, const ScanSizes& sizes, Scratch& scratch) {
  if (segments.count == 1) return;
  const int64_t rows = sizes.batch * sizes.directions * segments.count * sizes.channels;
  segments.states = scratch.take(rows * sizes.state, sizeof(S));
  segments.sums = scratch.take(rows, sizeof(S));
}

template <typename T>
void carry_segments(const ScanSizes& sizes, const Segments& segments, const void* A, const void* initial, uint64_t down,
                    const Device& device) {
  launch_carry<T>({sizes.batch, sizes.directions, sizes.channels, sizes.state, segments.count, down, segments.states,
                   segments.sums, A, false, 0, 1, initial},
                  device);
}

template <typename T>
int vectors_of(const Sequence& s, int bit) {
  return s.data && in_vectors<T>(s.data, s.batch, s.direction, s.channel) ? bit : 0;
}
template <typename T>
int vectors_of(const Projection& p, int bit) {
  return !p.constant && in_vectors<T>(p.data, p.batch, p.direction, p.group, p.state) ? bit : 0;
}

inline unsigned share_of(const Projection& p, const ScanSizes& sizes) {  // channels in a group
  if (sizes.channels > 0x7fffffff) throw std::runtime_error("The channels are more than 2^31 - 1; split them.");
  return static_cast<unsigned>(std::max<int64_t>(sizes.channels / p.groups, 1));
}

inline std::string too_many_states(int64_t state) {
  return "The state size " + std::to_string(state) + " is more than the shared memory of this GPU holds; split the states.";
}

template <typename T>
ScanForwardWork plan_scan_forward(const ScanForward& call, Scratch& scratch) {
  using S = State<T>;
  const ScanSizes& sizes = call.sizes;
  check_chunk(sizes.chunk);
  ScanForwardWork work;
  work.call = call;
  work.tiles = divide_up(sizes.length, kTile);
  work.share_B = share_of(call.B, sizes);
  work.share_C = share_of(call.C, sizes);
  plan_segments(work.segments, sizes.batch * sizes.outputs() * sizes.channels, work.tiles);
  take_segments<S>(work.segments, sizes, scratch);
  if (sizes.shared)
    work.partial = sizes.out == sizes.io && kHalf<T>
                       ? scratch.take(sizes.batch * sizes.channels * sizes.length, sizeof(S))
                       : call.out;
  work.vectors = vectors_of<T>(call.u, kVectorU) | vectors_of<T>(call.delta, kVectorDelta) | vectors_of<T>(call.z, kVectorZ) |
                 vectors_of<T>(call.B, kVectorB) | vectors_of<T>(call.C, kVectorC);
  if (in_vectors<T>(call.out, sizes.length)) work.vectors |= kVectorOut;
  if (in_vectors<S>(work.partial, sizes.length)) work.vectors |= kVectorRows;
  return work;
}

template <typename T>
size_t ScanKernels<T>::workspace(const ScanForward& call, const Device&) {
  Scratch scratch(nullptr);
  plan_scan_forward<T>(call, scratch);
  return scratch.used();
}

template <typename T>
void ScanKernels<T>::run(const ScanForward& call, const Device& device, void* workspace) {
  using S = State<T>;
  Scratch scratch(workspace);
  ScanForwardWork work = plan_scan_forward<T>(call, scratch);
  const ScanSizes& sizes = call.sizes;
  const size_t per_warp = 2 * sizes.state * sizeof(S);
  if (per_warp > device.shared_bytes) throw std::runtime_error(too_many_states(sizes.state));
  int warps = static_cast<int>(std::min<int64_t>(kForwardWarps, sizes.channels));
  while (warps > 1 && warps * per_warp > device.shared_bytes) --warps;
  if (sizes.channels == 0) return;
  work.channel_blocks = static_cast<unsigned>(divide_up(sizes.channels, warps));
  const int64_t blocks = work.channel_blocks * work.segments.count * sizes.batch;
  if (work.segments.count > 1) {
    launch(scan_forward_kernel<T, true>, blocks * sizes.directions, warps * kWarp, warps * per_warp, device, work);
    carry_segments<T>(sizes, work.segments, call.A, call.initial_state, sizes.reverse, device);
  }
  launch(scan_forward_kernel<T, false>, blocks * sizes.outputs(), warps * kWarp, warps * per_warp, device, work);
}

template <typename T>
struct BackwardPlan {
  ScanBackwardWork work;
  int warps;
  int64_t parts;
};

template <typename T>
BackwardPlan<T> plan_scan_backward(const ScanBackward& call, const Device& device, Scratch& scratch) {
  using S = State<T>;
  const ScanSizes& sizes = call.sizes;
  check_chunk(sizes.chunk);
  ScanBackwardWork work;
  work.call = call;
  work.tiles = divide_up(sizes.length, kTile);
  work.share_B = share_of(call.B, sizes);
  work.share_C = share_of(call.C, sizes);
  // Channels between two borders of a group; the channels of a block lie within one such unit.
  work.unit = static_cast<unsigned>(sizes.channels);
  if (!call.B.constant) work.unit = std::gcd(work.unit, work.share_B);
  if (!call.C.constant) work.unit = std::gcd(work.unit, work.share_C);
  work.units = static_cast<unsigned>(sizes.channels) / work.unit;
  int warps = static_cast<int>(std::min<int64_t>(kBackwardWarps, work.unit));
  const auto bytes = [&](int64_t rounds) { return BackwardShared<S>::count(warps, rounds, sizes.state) * sizeof(S); };
  while (warps > 1 && bytes(1) > device.shared_bytes) warps /= 2;
  if (bytes(1) > device.shared_bytes) throw std::runtime_error(too_many_states(sizes.state));
  const int64_t sequences = sizes.batch * sizes.outputs() * sizes.channels;
  plan_segments(work.segments, sequences, work.tiles);
  // Several channels to a warp: fewer slabs. As long as there is work for the whole machine.
  work.rounds = 1;
  while (work.rounds < 4 && warps * work.rounds < static_cast<int>(work.unit) && bytes(2 * work.rounds) <= device.shared_bytes / 2 &&
         sequences * work.segments.count >= 2 * work.rounds * kEnoughWarps)
    work.rounds *= 2;
  work.blocks = static_cast<unsigned>(divide_up(work.unit, warps * work.rounds));

  take_segments<S>(work.segments, sizes, scratch);
  const int64_t parts = sizes.batch * work.segments.count, rows = sizes.directions * sizes.channels;
  const auto take_slabs = [&](const Projection& p, int64_t& slabs, void*& slab, void*& part) {
    if (p.constant) {
      part = scratch.take(parts * rows * sizes.state, sizeof(S));
    } else {
      slabs = sizes.channels / p.groups / work.unit * int64_t{work.blocks};
      slab = scratch.take(slabs * sizes.batch * sizes.directions * p.groups * sizes.state * sizes.length, sizeof(S));
    }
  };
  take_slabs(call.B, work.slabs_B, work.slab_B, work.part_B);
  take_slabs(call.C, work.slabs_C, work.slab_C, work.part_C);
  work.part_A = scratch.take(parts * rows * sizes.state, sizeof(S));
  if (call.D) work.part_D = scratch.take(parts * rows, sizeof(S));
  if (call.delta_bias) work.part_bias = scratch.take(parts * rows, sizeof(S));
  if (sizes.shared)
    work.partial = kHalf<T> ? scratch.take(sizes.batch * sizes.channels * sizes.length, sizeof(S)) : call.d_u;
  work.vectors = vectors_of<T>(call.u, kVectorU) | vectors_of<T>(call.delta, kVectorDelta) | vectors_of<T>(call.z, kVectorZ) |
                 vectors_of<T>(call.B, kVectorB) | vectors_of<T>(call.C, kVectorC) |
                 (sizes.out == sizes.io ? vectors_of<T>(call.d_out, kVectorOut) : vectors_of<S>(call.d_out, kVectorOut));
  if (in_vectors<T>(call.d_u, sizes.length)) work.gradient_vectors |= kVectorU;
  if (in_vectors<T>(call.d_delta, sizes.length)) work.gradient_vectors |= kVectorDelta;
  if (in_vectors<T>(call.d_z, sizes.length)) work.gradient_vectors |= kVectorZ;
  if (in_vectors<S>(work.partial, sizes.length)) work.gradient_vectors |= kVectorRows;
  return {work, warps, parts};
}

template <typename T>
size_t ScanKernels<T>::workspace(const ScanBackward& call, const Device& device) {
  if (call.sizes.channels == 0) return 0;
  Scratch scratch(nullptr);
  plan_scan_backward<T>(call, device, scratch);
  return scratch.used();
}

template <typename T>
void ScanKernels<T>::run(const ScanBackward& call, const Device& device, void* workspace) {
  using S = State<T>;
  const ScanSizes& sizes = call.sizes;
  if (sizes.channels == 0) return;
  Scratch scratch(workspace);
  BackwardPlan<T> plan = plan_scan_backward<T>(call, device, scratch);
  ScanBackwardWork& work = plan.work;
  if (work.segments.count > 1) {
    const int adjoint_warps = static_cast<int>(std::min<int64_t>(kForwardWarps, sizes.channels));
    work.channel_blocks = static_cast<unsigned>(divide_up(sizes.channels, adjoint_warps));
    launch(scan_adjoint_kernel<T>, work.channel_blocks * work.segments.count * sizes.batch * sizes.directions,
           adjoint_warps * kWarp, adjoint_warps * 2 * sizes.state * sizeof(S), device, work);
    carry_segments<T>(sizes, work.segments, call.A, call.d_last_state, ~sizes.reverse, device);
  }
  launch(scan_backward_kernel<T>,
         work.blocks * static_cast<int64_t>(work.units) * work.segments.count * sizes.batch * sizes.outputs(), plan.warps * kWarp,
         BackwardShared<S>::count(plan.warps, work.rounds, sizes.state) * sizeof(S), device, work);
  const int64_t rows = sizes.directions * sizes.channels;
  const auto sum_slabs = [&](const Projection& p, int64_t slabs, const void* slab, const void* part, void* out) {
    if (p.constant) sum_parts<S, S>(part, out, plan.parts, rows * sizes.state, device);
    else sum_parts<S, T>(slab, out, slabs, sizes.batch * sizes.directions * p.groups * sizes.state * sizes.length, device);
  };
  sum_slabs(call.B, work.slabs_B, work.slab_B, work.part_B, call.d_B);
  sum_slabs(call.C, work.slabs_C, work.slab_C, work.part_C, call.d_C);
  sum_parts<S, S>(work.part_A, call.d_A, plan.parts, rows * sizes.state, device);
  if (call.D) sum_parts<S, S>(work.part_D, call.d_D, plan.parts, rows, device);
  if (call.delta_bias) sum_parts<S, S>(work.part_bias, call.d_delta_bias, plan.parts, rows, device);
}

}  // namespace dass
