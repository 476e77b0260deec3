// The kernels for any processor.

#include "cpu/kernels.h"
#include "cpu/vector/portable.h"
#define DASS_KERNELS kernels_scalar
#define DASS_NAME "scalar"
#include "cpu/kernels_impl.h"
