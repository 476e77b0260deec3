// The scan kernels for float64 data.
#include "kernels/scan_launch.cuh"

namespace dass {
template struct ScanKernels<double>;
}
