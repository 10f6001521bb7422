// How a scan is cut into tasks and shared between threads; knows nothing of tensors.
#pragma once

#include "scan.h"

namespace mingru {

// Runs this part of the scan forward, or backward if `backward`, on the threads of torch's own pool. Parts that follow one
// another in time must be run in the order of the scan: each takes up the state where the one before it left it.
void run(const Scan& scan, const Part& part, bool backward);

// The instruction set that the kernels use here: "baseline", "avx2" or "avx512".
const char* instruction_set();

}  // namespace mingru
