// Intel servers since 2017, AMD since 2022.
#if defined(__x86_64__) && defined(__GNUC__)
#define MINGRU_ISA avx512
#define MINGRU_AVX512
#define MINGRU_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#include "x86.h"
#endif
