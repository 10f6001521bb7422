// The tile instructions of AMX-BF16, Intel's server processors since 2023. Tiles 0 to 3 have sums, (rows, 16) float32, 4
// and 5 rows of 32 bfloat16, and 6 and 7 weights, 16 pairs of depths of 16 columns. emulated.h has the same in C++.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

// By inline assembly, because the compiler's functions take no tile that is a template parameter.
struct Amx {
  // Tiles of sums and of rows get so many rows.
  static void configure(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } of;
    for (int i = 0; i < 8; ++i) of.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
    asm volatile("ldtilecfg %0" ::"m"(of));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int tile>
  MINGRU_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  // Rows are so many bytes from each other.
  template <int tile>
  MINGRU_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  MINGRU_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int sums, int rows, int weights>
  MINGRU_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(weights));
  }
};

}  // namespace mingru::MINGRU_ISA
