// Intel servers since 2017, AMD since 2022. All code is in the namespace, for the reason in kernels_avx2.cpp.
#if defined(__x86_64__) && defined(__GNUC__)
#define MINGRU_ISA avx512
#define MINGRU_AVX512
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "scan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#include "kernels.h"
#include "product.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
