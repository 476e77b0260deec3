// The scan kernels for float32 data.
#include "kernels/scan_launch.cuh"

namespace dass {
template struct ScanKernels<float>;
}
