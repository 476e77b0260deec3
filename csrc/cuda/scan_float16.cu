// The scan kernels for float16 data.
#include "kernels/scan_launch.cuh"

namespace dass {
template struct ScanKernels<float16>;
}
