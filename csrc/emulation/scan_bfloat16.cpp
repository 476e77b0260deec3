// The scan kernels for bfloat16 data, compiled for the host.
#include "kernels/scan_launch.cuh"

namespace dass {
template struct ScanKernels<bfloat16>;
}
