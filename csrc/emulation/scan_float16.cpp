// The scan kernels for float16 data, compiled for the host.
#include "kernels/scan_launch.cuh"

namespace dass {
template struct ScanKernels<float16>;
}
