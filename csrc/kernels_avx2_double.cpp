// Also for processors with AVX-512, for which these loops would take a quarter of the time of the build.
#define MINGRU_AVX2
#define MINGRU_TYPE double
#include "x86.h"
