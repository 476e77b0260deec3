// The pair (factor, sum) stands for the map h -> factor h + sum, equation (11) of SCAN.md, and how lanes scan such pairs.
//
// Lanes hold the steps in ascending order of position, whichever way the scan walks: where it walks down (kDown), the first in
// scan order is the last lane. The adjoint of a scan walks the other way over the same factors.
#pragma once

#include "kernels/runs.cuh"

namespace dass {

// A group of kLanes lanes of a warp: `place` is the lane's place in it.
template <int kLanes, bool kDown>
struct Lanes {
  int place;

  DASS_DEVICE static int step(int i) { return kDown ? kRun - 1 - i : i; }  // the i-th of a run in scan order
  DASS_DEVICE bool first() const { return place == (kDown ? kLanes - 1 : 0); }
  DASS_DEVICE bool last() const { return place == (kDown ? 0 : kLanes - 1); }

  template <typename S>
  DASS_DEVICE S before(S value, int distance) const {  // of the lane that is `distance` earlier in scan order
    if constexpr (kDown) return __shfl_down_sync(kAllLanes, value, distance, kLanes);
    else return __shfl_up_sync(kAllLanes, value, distance, kLanes);
  }
  template <typename S>
  DASS_DEVICE S of_last(S value) const {
    return __shfl_sync(kAllLanes, value, kDown ? 0 : kLanes - 1, kLanes);
  }
  DASS_DEVICE bool has_before(int distance) const { return kDown ? place + distance < kLanes : place >= distance; }

  // Inclusive: afterwards the pair stands for all steps from the group's first to this lane's last.
  template <typename S>
  DASS_DEVICE void scan(S& factor, S& sum) const {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const S earlier_factor = before(factor, distance), earlier_sum = before(sum, distance);
      if (has_before(distance)) {
        sum = factor * earlier_sum + sum;
        factor *= earlier_factor;
      }
    }
  }

  // What enters this lane's run when `carry` enters the group's first; carry becomes what leaves its last.
  template <typename S>
  DASS_DEVICE S enter(S factor, S sum, S& carry) const {
    if (first()) sum = factor * carry + sum;
    scan(factor, sum);
    const S earlier = before(sum, 1);
    const S entering = first() ? carry : earlier;
    carry = of_last(sum);
    return entering;
  }
};

template <int kLanes, typename S>
DASS_DEVICE S sum_over(S value) {  // of each group of kLanes lanes, in a fixed order; every lane gets it
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

}  // namespace dass
