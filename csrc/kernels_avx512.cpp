// Intel servers since 2017, AMD since 2022.
#define MINGRU_AVX512
#define MINGRU_TYPE float
#include "x86.h"
