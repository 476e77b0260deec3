// The scan kernels for bfloat16 data.
#include "kernels/scan_launch.cuh"

namespace dass {
template struct ScanKernels<bfloat16>;
}
