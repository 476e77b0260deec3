// The kernels for AVX-512 (F, BW, DQ, VL).

#include "cpu/kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, in its own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "cpu/vector/avx512.h"
#define DASS_KERNELS kernels_avx512
#define DASS_NAME "avx512"
#include "cpu/kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
