// The kernels for AVX2, FMA and F16C.

#include "cpu/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "cpu/vector/avx2.h"
#define DASS_KERNELS kernels_avx2
#define DASS_NAME "avx2"
#include "cpu/kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
