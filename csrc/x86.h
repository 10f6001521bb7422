// The kernels for MINGRU_TARGET. All code is in the namespace MINGRU_ISA. Otherwise the linker may merge inline functions,
// and code for new processors runs on old ones. So headers with functions are included before the target.
#include "scan.h"

#ifdef MINGRU_X86
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef MINGRU_AVX512
#define MINGRU_ISA avx512
#define MINGRU_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#else
#define MINGRU_ISA avx2
#define MINGRU_TARGET "avx2,fma,f16c"
#endif

#define MINGRU_PRAGMA_OF(text) _Pragma(#text)
#define MINGRU_PRAGMA(text) MINGRU_PRAGMA_OF(text)
#if defined(__clang__)
MINGRU_PRAGMA(clang attribute push(__attribute__((target(MINGRU_TARGET))), apply_to = function))
#else
MINGRU_PRAGMA(GCC target(MINGRU_TARGET, "prefer-vector-width=512"))
#endif
#include "kernels.h"
template mingru::Kernels mingru::MINGRU_ISA::kernels<MINGRU_TYPE>();
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
