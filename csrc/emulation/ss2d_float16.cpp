// The ss2d kernels for float16 data, compiled for the host.
#include "kernels/ss2d_launch.cuh"

namespace dass {
template struct Ss2dKernels<float16>;
}
