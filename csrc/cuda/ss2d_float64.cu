// The ss2d kernels for float64 data.
#include "kernels/ss2d_launch.cuh"

namespace dass {
template struct Ss2dKernels<double>;
}
