// The ss2d kernels for float32 data.
#include "kernels/ss2d_launch.cuh"

namespace dass {
template struct Ss2dKernels<float>;
}
