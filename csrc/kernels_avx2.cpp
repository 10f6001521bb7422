// Intel since 2013, AMD since 2015.
#if defined(__x86_64__) && defined(__GNUC__)
#define MINGRU_ISA avx2
#define MINGRU_AVX2
#define MINGRU_TARGET "avx2,fma,f16c"
#include "x86.h"
#endif
