// The kernels for MINGRU_TARGET. All code is in the namespace MINGRU_ISA. Otherwise the linker may merge inline functions,
// and code for new processors runs on old ones. So headers with functions are included before the target.
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "scan.h"

#define MINGRU_PRAGMA_OF(text) _Pragma(#text)
#define MINGRU_PRAGMA(text) MINGRU_PRAGMA_OF(text)
#if defined(__clang__)
MINGRU_PRAGMA(clang attribute push(__attribute__((target(MINGRU_TARGET))), apply_to = function))
#else
MINGRU_PRAGMA(GCC target(MINGRU_TARGET, "prefer-vector-width=512"))
#endif
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
