// What a kernel may use beyond C++: CUDA where nvcc compiles, its emulation otherwise. The only choice between the two in
// kernels/; both headers define the same names.
#pragma once

#ifdef __CUDACC__
#include "kernels/device_cuda.h"
#else
#include "emulation/device_host.h"
#endif
