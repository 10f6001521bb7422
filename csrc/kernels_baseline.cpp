// For every processor of the target: SSE2 on x86-64, NEON on 64-bit Arm.
#define MINGRU_ISA baseline
#include "kernels.h"
