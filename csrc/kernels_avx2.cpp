// Intel since 2013, AMD since 2015. All code is in the namespace: the linker could use code outside it on any processor.
#if defined(__x86_64__) && defined(__GNUC__)
#define MINGRU_ISA avx2
#define MINGRU_AVX2
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "scan.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.h"
#include "product.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
