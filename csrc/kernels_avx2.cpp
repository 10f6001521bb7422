// Intel since 2013, AMD since 2015.
#define MINGRU_AVX2
#define MINGRU_TYPE float
#include "x86.h"
