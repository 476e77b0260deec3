// Plans and launches of ss2d. A plan depends on shapes, dtypes and the GPU's shared memory alone, so results repeat bit for bit.
#pragma once

#include <algorithm>

#include "kernels/carry.cuh"
#include "kernels/launch.h"
#include "kernels/ss2d_backward.cuh"
#include "kernels/ss2d_forward.cuh"
#include "kernels/ss2d_summary.cuh"
#include "kernels/sums.cuh"

namespace dass {

// Kernels of their own for one state, where its loop falls away; not for float64.
template <typename T>
constexpr bool kSpecial = !std::is_same_v<T, double>;

constexpr int64_t kTilePositions = 1024;

// With so few blocks, each direction gets blocks of its own, so that more of the GPU works; the directions are added up afterwards.
inline bool split_directions(int64_t blocks, const Device& device) { return blocks > 0 && blocks <= device.few_blocks / 2; }

inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Pitches in shared memory: see Geometry::spread. Channels are 1 word apart in banks where 8 groups stand beside each other
// (pieces of 32 steps), 4 where there are two (pieces of 128).
inline void set_pitches(Geometry& g, int piece) {
  g.pitch = Geometry::spread(g.tile_width - 1) + 1;
  g.pitch += 1 - g.pitch % 2;
  g.channel_pitch = static_cast<int>(round_up(static_cast<int64_t>(g.pitch) * g.tile_height, kWarp)) + (piece == kWarp ? 1 : 4);
}

inline Geometry whole_map(const Ss2dSizes& sizes, int piece) {
  Geometry g;
  g.height = sizes.height;
  g.width = sizes.width;
  g.tile_height = static_cast<int>(sizes.height);
  g.tile_width = static_cast<int>(sizes.width);
  g.tiles_down = g.tiles_across = 1;
  for (int pair : {kRows, kColumns}) g.total[pair] = g.pieces[pair] = static_cast<int>(divide_up(sizes.length(), piece));
  set_pitches(g, piece);
  return g;
}

// Tiles of at most `positions`, as high or as wide as the map if that is low or narrow; otherwise as long as a piece if they
// may be.
inline Geometry tiles_of(const Ss2dSizes& sizes, int piece, int64_t positions) {
  Geometry g;
  g.height = sizes.height;
  g.width = sizes.width;
  int64_t height = std::min<int64_t>(sizes.height, piece), width = std::min<int64_t>(sizes.width, piece);
  if (sizes.height <= piece) width = std::min(sizes.width, std::max<int64_t>(positions / height / piece * piece, piece));
  else if (sizes.width <= piece) height = std::min(sizes.height, std::max<int64_t>(positions / width / piece * piece, piece));
  while (height * width > positions) (height > width ? height : width) = divide_up(std::max(height, width), 2);
  g.tile_height = static_cast<int>(height);
  g.tile_width = static_cast<int>(width);
  g.tiles_down = divide_up(sizes.height, height);
  g.tiles_across = divide_up(sizes.width, width);
  const auto cut = [&](Pair pair, int64_t line, int64_t map_line, int64_t lines, int64_t map_lines, int64_t tiles) {
    if (line == map_line) {
      g.pieces[pair] = static_cast<int>(divide_up(line * lines, piece));
      g.total[pair] = tiles * g.pieces[pair];
    } else {
      g.per_line[pair] = static_cast<int>(divide_up(line, piece));
      g.pieces[pair] = static_cast<int>(lines) * g.per_line[pair];
      g.total[pair] = map_lines * (g.tiles() / tiles) * g.per_line[pair];
    }
  };
  cut(kRows, width, sizes.width, height, sizes.height, g.tiles_down);
  cut(kColumns, height, sizes.height, width, sizes.width, g.tiles_across);
  set_pitches(g, piece);
  return g;
}

// Whether a run along a row can be stored in vectors.
template <typename T>
bool runs_in_vectors(const Geometry& g, const void* data) {
  return in_vectors<T>(data, g.height * g.width) && (g.tiles() == 1 || g.width % kRun == 0);
}

inline void check_map_chunk(const Ss2dSizes& sizes) {
  if (sizes.chunk != 0 && sizes.chunk < sizes.length())
    throw std::runtime_error("chunk is " + std::to_string(sizes.chunk) + "; the CUDA kernels of ss2d save no states inside a map: expected 0 or at least height * width = " +
                             std::to_string(sizes.length()) + ".");
}

inline std::string does_not_fit(const Ss2dSizes& sizes) {
  return "The rank " + std::to_string(sizes.rank) + " and the state size " + std::to_string(sizes.state) +
         " are more than the shared memory of this GPU holds.";
}

// The warps of a block and the rows of x_dbl that each stages: all rows and as many warps as wanted if there is room, else fewer
// rows, then fewer warps. bytes(warps, staging) is what a block takes.
template <typename T, int kLanes, typename Bytes>
bool choose_staging(Staging& staging, int& warps, const Ss2dSizes& sizes, size_t available, const Bytes& bytes) {
  const int unit = LowRankRows<T, kLanes>::kBlock;
  const int ranks = static_cast<int>(round_up(std::max<int64_t>(sizes.rank, 1), unit)), states = static_cast<int>(sizes.state);
  for (; warps > 0; warps /= 2) {
    for (const int most : {1 << 20, 64, 32, 16, 8}) {
      staging.ranks = std::min(ranks, std::max(most, unit));
      staging.states = std::min(states, most);
      if (bytes(warps, staging) <= available) return true;
    }
  }
  return false;
}

template <typename T, bool kAdjoint, bool kOneState>
void launch_ss2d_summary(const Ss2dSummaryWork& work, int warps, size_t bytes, const Device& device) {
  launch(ss2d_summary_kernel<T, kAdjoint, kOneState>,
         work.channel_blocks * work.geometry.tiles() * work.sizes.batch * (work.split ? 4 : 1), warps * kWarp, bytes, device, work);
}

template <typename T, bool kAdjoint>
void run_ss2d_summary(Ss2dSummaryWork& work, const Device& device) {
  using L = Layout<4>;
  const Ss2dSizes& sizes = work.sizes;
  const auto bytes = [&](int warps, const Staging& staging) {
    return Ss2dSummaryShared<T, kAdjoint>(nullptr, warps, staging, work.geometry, static_cast<int>(sizes.rank),
                                          static_cast<int>(sizes.state), sizes.out != sizes.io)
        .bytes;
  };
  int warps = kBlockWarps / 2;
  if (!choose_staging<T, 4>(work.staging, warps, sizes, device.shared_bytes, bytes)) throw std::runtime_error(does_not_fit(sizes));
  work.channel_blocks = divide_up(sizes.channels, L::kChannels);
  work.split = split_directions(work.channel_blocks * work.geometry.tiles() * sizes.batch, device);
  if (sizes.state == 1) launch_ss2d_summary<T, kAdjoint, kSpecial<T>>(work, warps, bytes(warps, work.staging), device);
  else launch_ss2d_summary<T, kAdjoint, false>(work, warps, bytes(warps, work.staging), device);
  for (int pair : {kRows, kColumns}) {  // pieces are numbered in the order of the scan: no direction walks down
    CarryWork carry{sizes.batch, 2, sizes.channels, sizes.state, work.geometry.total[pair], 0, work.states[pair], work.sums[pair],
                    work.parameters.A_logs, true, pair, 2, nullptr};
    launch_carry<T>(carry, device);
    if (kAdjoint) {
      carry.down = 3;
      carry.states = work.adjoints[pair];
      launch_carry<T>(carry, device);
    }
  }
}

template <typename S>
void take_pieces(const Ss2dSizes& sizes, const Geometry& g, Scratch& scratch, void* (&pieces)[2], bool per_state) {
  for (int pair : {kRows, kColumns})
    pieces[pair] = scratch.take(sizes.batch * 2 * g.total[pair] * sizes.channels * (per_state ? sizes.state : 1), sizeof(S));
}

// -- forward -----------------------------------------------------------------------------------------------------------

// Where a block leaves y or d_x: in `out`, or in partial results of its own direction.
template <typename T, typename Work>
void share_out_directions(Work& work, int64_t& blocks, void* out, bool as_state, const Device& device, Scratch& scratch) {
  const Ss2dSizes& sizes = work.call.sizes;
  work.out = out;
  work.out_as_state = as_state;
  if (split_directions(blocks, device)) {
    blocks *= 4;
    work.out_as_state = true;
    work.out = work.partial = scratch.take(4 * sizes.batch * sizes.channels * sizes.length(), sizeof(State<T>));
  }
  work.vectors = work.out_as_state ? runs_in_vectors<State<T>>(work.geometry, work.out) : runs_in_vectors<T>(work.geometry, work.out);
}

template <typename T, typename Work>
void add_up_directions(const Work& work, void* out, bool as_state, const Device& device) {
  using S = State<T>;
  const Ss2dSizes& sizes = work.call.sizes;
  if (!work.partial) return;
  const int64_t size = sizes.batch * sizes.channels * sizes.length();
  if (as_state) sum_parts<S, S>(work.partial, out, 4, size, device);
  else sum_parts<S, T>(work.partial, out, 4, size, device);
}

struct Ss2dForwardPlan {
  Ss2dForwardWork work;
  int lanes = 4, warps = 1;
  int64_t blocks = 0;
  size_t bytes = 0;
  bool whole = false;
};

template <typename T, int kLanes, bool kWhole>
bool plan_ss2d_forward_layout(Ss2dForwardPlan& plan, const Device& device, int64_t positions = 0) {
  using Shared = Ss2dForwardShared<T, kLanes, kWhole>;
  using L = Layout<kLanes>;
  Ss2dForwardWork& work = plan.work;
  const Ss2dSizes& sizes = work.call.sizes;
  if (kWhole && sizes.length() > (1 << 20)) return false;
  work.geometry = kWhole ? whole_map(sizes, L::kPiece) : tiles_of(sizes, L::kPiece, positions);
  const Geometry& g = work.geometry;
  work.rounds = 1;
  plan.lanes = kLanes;
  plan.whole = kWhole;
  const int most = std::max(g.pieces[0], g.pieces[1]);
  plan.warps = std::min(kWhole ? kBlockWarps : kBlockWarps / 2, most);
  if (kWhole) plan.warps = static_cast<int>(divide_up(most, divide_up(most, plan.warps)));  // even shares
  const auto bytes = [&](int warps, const Staging& staging) {
    return Shared(nullptr, warps, work.rounds, staging, g, static_cast<int>(sizes.rank), static_cast<int>(sizes.state)).bytes;
  };
  if (!choose_staging<T, kLanes>(work.staging, plan.warps, sizes, device.shared_bytes, bytes)) return false;
  // More channels to a block while x_dbl is then read less often, two blocks fit a multiprocessor and there is work for all.
  while (kWhole && work.rounds < 4 && work.rounds * L::kChannels < sizes.channels) {
    work.rounds *= 2;
    if (bytes(plan.warps, work.staging) > device.shared_bytes / 2 ||
        sizes.batch * divide_up(sizes.channels, work.rounds * L::kChannels) < device.few_blocks) {
      work.rounds /= 2;
      break;
    }
  }
  work.channel_blocks = divide_up(sizes.channels, work.rounds * L::kChannels);
  plan.bytes = bytes(plan.warps, work.staging);
  return true;
}

template <typename T>
Ss2dForwardPlan plan_ss2d_forward(const Ss2dForward& call, const Device& device, Scratch& scratch) {
  using S = State<T>;
  check_map_chunk(call.sizes);
  Ss2dForwardPlan plan;
  Ss2dForwardWork& work = plan.work;
  work.call = call;
  work.parameters = {call.dt_weight, call.dt_bias, call.A_logs, call.Ds};
  if (!plan_ss2d_forward_layout<T, 4, true>(plan, device) && !plan_ss2d_forward_layout<T, 16, true>(plan, device)) {
    int64_t positions = kTilePositions;
    while (positions && !plan_ss2d_forward_layout<T, 4, false>(plan, device, positions)) positions /= 2;
    if (!positions) throw std::runtime_error(does_not_fit(call.sizes));
    take_pieces<S>(call.sizes, work.geometry, scratch, work.states, true);
    take_pieces<S>(call.sizes, work.geometry, scratch, work.sums, false);
  }
  plan.blocks = work.channel_blocks * work.geometry.tiles() * call.sizes.batch;
  share_out_directions<T>(work, plan.blocks, call.y, call.sizes.out != call.sizes.io, device, scratch);
  return plan;
}

template <typename T, int kLanes, bool kWhole>
void launch_ss2d_forward(const Ss2dForwardPlan& plan, const Device& device) {
  const Ss2dForwardWork& work = plan.work;
  if (work.call.sizes.state == 1)
    launch(ss2d_forward_kernel<T, kLanes, kWhole, kSpecial<T>>, plan.blocks, plan.warps * kWarp, plan.bytes, device, work);
  else
    launch(ss2d_forward_kernel<T, kLanes, kWhole, false>, plan.blocks, plan.warps * kWarp, plan.bytes, device, work);
  add_up_directions<T>(work, work.call.y, work.call.sizes.out != work.call.sizes.io, device);
}

template <typename T>
size_t Ss2dKernels<T>::workspace(const Ss2dForward& call, const Device& device) {
  Scratch scratch(nullptr);
  if (call.sizes.channels * call.sizes.length() > 0) plan_ss2d_forward<T>(call, device, scratch);
  return scratch.used();
}

template <typename T>
void Ss2dKernels<T>::run(const Ss2dForward& call, const Device& device, void* workspace) {
  if (call.sizes.channels * call.sizes.length() == 0) return;
  Scratch scratch(workspace);
  const Ss2dForwardPlan plan = plan_ss2d_forward<T>(call, device, scratch);
  if (plan.whole) {
    if (plan.lanes == 4) launch_ss2d_forward<T, 4, true>(plan, device);
    else launch_ss2d_forward<T, 16, true>(plan, device);
    return;
  }
  Ss2dSummaryWork summary;
  summary.sizes = call.sizes;
  summary.x = call.x;
  summary.x_dbl = call.x_dbl;
  summary.parameters = plan.work.parameters;
  summary.geometry = plan.work.geometry;
  for (int pair : {kRows, kColumns}) {
    summary.states[pair] = plan.work.states[pair];
    summary.sums[pair] = plan.work.sums[pair];
  }
  run_ss2d_summary<T, false>(summary, device);
  launch_ss2d_forward<T, 4, false>(plan, device);
}

// -- backward ----------------------------------------------------------------------------------------------------------

struct Ss2dBackwardPlan {
  Ss2dBackwardWork work;
  Ss2dSummaryWork summary;
  int warps = 1;
  int64_t blocks = 0;
  size_t bytes = 0;
  bool whole = false;
};

template <typename T, bool kWhole>
bool plan_ss2d_backward_layout(Ss2dBackwardPlan& plan, const Device& device, int64_t positions = 0) {
  using L = Layout<4>;
  Ss2dBackwardWork& work = plan.work;
  const Ss2dSizes& sizes = work.call.sizes;
  const int most_warps = backward_warps(kSpecial<T> && sizes.state == 1);
  if (kWhole && sizes.length() > most_warps * L::kPiece) return false;
  work.geometry = kWhole ? whole_map(sizes, L::kPiece) : tiles_of(sizes, L::kPiece, positions);
  const Geometry& g = work.geometry;
  plan.whole = kWhole;
  const int wanted = kWhole ? std::max(g.pieces[0], g.pieces[1]) : most_warps;
  plan.warps = wanted;
  const auto bytes = [&](int warps, const Staging& staging) {
    return Ss2dBackwardShared<T, kWhole>(nullptr, warps, staging, g, static_cast<int>(sizes.rank), static_cast<int>(sizes.state),
                                         sizes.out != sizes.io)
        .bytes;
  };
  if (!choose_staging<T, 4>(work.staging, plan.warps, sizes, device.shared_bytes, bytes)) return false;
  if (kWhole && plan.warps < wanted) return false;
  plan.bytes = bytes(plan.warps, work.staging);
  // The channels of a tile are shared out until there is work for the whole GPU; each share costs a slab.
  const int64_t all = divide_up(sizes.channels, L::kChannels), blocks = std::max<int64_t>(sizes.batch * g.tiles(), 1);
  work.slabs = std::min(all, divide_up(device.few_blocks, blocks));
  work.sets = static_cast<int>(divide_up(all, work.slabs));
  work.slabs = divide_up(all, work.sets);
  return true;
}

template <typename T>
Ss2dBackwardPlan plan_ss2d_backward(const Ss2dBackward& call, const Device& device, Scratch& scratch) {
  using S = State<T>;
  check_map_chunk(call.sizes);
  Ss2dBackwardPlan plan;
  Ss2dBackwardWork& work = plan.work;
  const Ss2dSizes& sizes = call.sizes;
  work.call = call;
  work.parameters = {call.dt_weight, call.dt_bias, call.A_logs, call.Ds};
  if (!plan_ss2d_backward_layout<T, true>(plan, device)) {
    int64_t positions = kTilePositions;
    while (positions && !plan_ss2d_backward_layout<T, false>(plan, device, positions)) positions /= 2;
    if (!positions) throw std::runtime_error(does_not_fit(sizes));
    Ss2dSummaryWork& summary = plan.summary;
    summary.sizes = sizes;
    summary.x = call.x;
    summary.d_y = call.d_y;
    summary.x_dbl = call.x_dbl;
    summary.parameters = work.parameters;
    summary.geometry = work.geometry;
    take_pieces<S>(sizes, work.geometry, scratch, summary.states, true);
    take_pieces<S>(sizes, work.geometry, scratch, summary.adjoints, true);
    take_pieces<S>(sizes, work.geometry, scratch, summary.sums, false);
    for (int pair : {kRows, kColumns}) {
      work.states[pair] = summary.states[pair];
      work.adjoints[pair] = summary.adjoints[pair];
    }
  }
  const int64_t parts = sizes.batch * work.geometry.tiles();
  for (int pair : {kRows, kColumns})
    work.slab[pair] = scratch.take(work.slabs * sizes.batch * 2 * sizes.rows() * work.geometry.total[pair] * Layout<4>::kPiece, sizeof(S));
  work.part_weight = scratch.take(parts * 4 * sizes.channels * sizes.rank, sizeof(S));
  work.part_bias = scratch.take(parts * 4 * sizes.channels, sizeof(S));
  work.part_A = scratch.take(parts * 4 * sizes.channels * sizes.state, sizeof(S));
  work.part_Ds = scratch.take(parts * sizes.channels, sizeof(S));
  work.position_blocks = static_cast<unsigned>(divide_up(sizes.length(), kSlabThreads));
  plan.blocks = work.slabs * parts;
  share_out_directions<T>(work, plan.blocks, call.d_x, false, device, scratch);
  return plan;
}

template <typename T>
size_t Ss2dKernels<T>::workspace(const Ss2dBackward& call, const Device& device) {
  Scratch scratch(nullptr);
  if (call.sizes.channels * call.sizes.length() > 0) plan_ss2d_backward<T>(call, device, scratch);
  return scratch.used();
}

template <typename T>
void Ss2dKernels<T>::run(const Ss2dBackward& call, const Device& device, void* workspace) {
  using S = State<T>;
  const Ss2dSizes& sizes = call.sizes;
  const int64_t D = sizes.channels;
  Ss2dBackwardPlan plan;
  int64_t parts = 0;
  if (D * sizes.length() > 0) {
    Scratch scratch(workspace);
    plan = plan_ss2d_backward<T>(call, device, scratch);
    const Ss2dBackwardWork& work = plan.work;
    if (!plan.whole) run_ss2d_summary<T, true>(plan.summary, device);
    const auto run_kernel = [&](auto kernel) { launch(kernel, plan.blocks, plan.warps * kWarp, plan.bytes, device, work); };
    if (sizes.state == 1) {
      if (plan.whole) run_kernel(ss2d_backward_kernel<T, true, kSpecial<T>>);
      else run_kernel(ss2d_backward_kernel<T, false, kSpecial<T>>);
    } else {
      if (plan.whole) run_kernel(ss2d_backward_kernel<T, true, false>);
      else run_kernel(ss2d_backward_kernel<T, false, false>);
    }
    add_up_directions<T>(work, call.d_x, false, device);
    parts = sizes.batch * work.geometry.tiles();
  } else if (sizes.length() > 0) {  // no channels: no slabs, and so zeros
    plan.work.call = call;
    plan.work.geometry = whole_map(sizes, Layout<4>::kPiece);
    plan.work.position_blocks = static_cast<unsigned>(divide_up(sizes.length(), kSlabThreads));
  }
  const Ss2dBackwardWork& work = plan.work;
  sum_parts<S, S>(work.part_weight, call.d_dt_weight, parts, 4 * D * sizes.rank, device);
  sum_parts<S, S>(work.part_bias, call.d_dt_bias, parts, 4 * D, device);
  sum_parts<S, S>(work.part_A, call.d_A_logs, parts, 4 * D * sizes.state, device);
  for (int k = 0; k < 4; ++k) sum_parts<S, S>(work.part_Ds, static_cast<S*>(call.d_Ds) + k * D, parts, D, device);
  sum_slabs<T>(work, device);
}

}  // namespace dass
