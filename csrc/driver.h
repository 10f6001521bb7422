// How a scan is cut into tasks and shared between threads; knows nothing of tensors.
#pragma once

#include "scan.h"

namespace mingru {

// Runs the scan forward, or backward if `backward`, on the threads of torch's own pool.
void run(const Scan& scan, bool backward);

// The instruction set that the kernels use here: "baseline", "avx2" or "avx512".
const char* instruction_set();

}  // namespace mingru
