// For every processor of the target: NEON on 64-bit Arm, SSE2 with compilers that have no target of a function.
#include "scan.h"
#ifndef MINGRU_X86
#define MINGRU_ISA baseline
#include "kernels.h"
template mingru::Kernels mingru::baseline::kernels<float>();
template mingru::Kernels mingru::baseline::kernels<double>();
#endif
