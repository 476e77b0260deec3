// The kernels of one instruction set, assembled. Included by scalar.cpp, avx2.cpp and avx512.cpp after their vector layer, and
// after whatever makes the compiler use the instruction set. Everything here is in unnamed namespaces: each of those files gets
// its own, and none can end up being used by another.

#include "cpu/vector/elementary.h"
#include "cpu/vector/block_scan.h"
#include "cpu/vector/softplus_slope.h"
#include "cpu/vector/rows.h"
#include "cpu/vector/turned_rows.h"
#include "cpu/pieces.h"
#include "cpu/scan_rows_batch.h"
#include "cpu/scan_rows_forward.h"
#include "cpu/scan_sums.h"
#include "cpu/scan_rows_tile.h"
#include "cpu/scan_rows_gradients.h"
#include "cpu/scan_rows_backward.h"
#include "cpu/lanes.h"
#include "cpu/ss2d_common.h"
#include "cpu/ss2d_forward.h"
#include "cpu/ss2d_backward_chunk.h"
#include "cpu/ss2d_backward.h"
#include "cpu/scan_lanes.h"
#include "cpu/scan_lanes_backward.h"

namespace dass::cpu {
namespace {

bool fits(const ScanSizes& sizes) {
  return sizes.io != Dtype::float64 && sizes.batch > 0 && sizes.channels > 0 && sizes.length > 0 && sizes.state > 0 &&
         (sizes.chunk == 0 || (sizes.chunk % block == 0 && row_tile % sizes.chunk == 0));
}

bool scan_forward(const ScanForward& f) {
  if (!fits(f.sizes)) return false;
  return lanes_fit(f.sizes, f.B, f.C) ? scan_forward_lanes(f) : scan_forward_rows(f);
}
bool scan_backward(const ScanBackward& f) {
  if (!fits(f.sizes)) return false;
  return lanes_fit_backward(f.sizes, f.B, f.C) ? scan_backward_lanes(f) : scan_backward_rows(f);
}

bool fits(const Ss2dSizes& sizes) {
  return sizes.io != Dtype::float64 && sizes.chunk <= 256 && sizes.chunk % 16 == 0 && sizes.state > 0 && sizes.batch > 0 &&
         sizes.channels > 0 && sizes.length() > 0 && sizes.height * (sizes.width + 1) <= UINT32_MAX;
}

bool ss2d_forward(const Ss2dForward& f) { return fits(f.sizes) && ss2d_forward_lanes(f); }
bool ss2d_backward(const Ss2dBackward& f) { return fits(f.sizes) && ss2d_backward_lanes(f); }

void elementary(int function, const float* x, float* y, int64_t n) {
  uint16_t bits[W];
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = static_cast<int>(smaller_of(W, n - i));
    const V v = load_part(x + i, lanes);
    V result = v;
    switch (function) {
      case 0: result = exp2(v * all(log2_e)); break;
      case 1: result = softplus(v); break;
      case 2: result = sigmoid_from(v, exp_of_negative_magnitude(v)); break;
      case 3: result = slope_of_softplus(softplus(v)); break;
      case 4: store_bfloat16(bits, v), result = load_bfloat16(bits); break;
      case 5: store_float16(bits, v), result = load_float16(bits); break;
      case 6: result = Exp2()(v * all(log2_e)); break;
      case 7: {
        Block steps{{v, v, v, v}}, slopes;
        SoftplusAndSlope near;
        near(steps, slopes);
        result = near.was_far() ? slope_of_softplus(softplus(v)) : slopes.v[3];
        break;
      }
    }
    store_part(y + i, result, lanes);
  }
}

}  // namespace

extern const Kernels DASS_KERNELS;
const Kernels DASS_KERNELS = {DASS_NAME, scan_forward, scan_backward, ss2d_forward, ss2d_backward, elementary};

}  // namespace dass::cpu
