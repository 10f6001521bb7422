// The tile instructions of amx.h in C++, with the same bits: operands, sums and results that are subnormal are 0, the
// products of even and of odd depths are summed apart, each rounded once, and both sums are added to the tile at last.
#pragma once

#include "convert.h"

namespace mingru::MINGRU_ISA {

struct Emulated {
  static inline thread_local float sums[4][16][16];
  static inline thread_local uint16_t operands[4][16][32];
  static inline thread_local int64_t num_rows;

  static void configure(int64_t rows) { num_rows = rows; }
  static void release() {}
  template <int tile>
  static void zero() {
    std::memset(sums[tile], 0, sizeof(sums[tile]));
  }
  template <int tile>
  static void load(const void* from, int64_t stride) {
    char* const to = tile < 4 ? reinterpret_cast<char*>(sums[tile]) : reinterpret_cast<char*>(operands[tile - 4]);
    for (int64_t i = 0; i < (tile < 6 ? num_rows : 16); ++i) {
      std::memcpy(to + 64 * i, static_cast<const char*>(from) + i * stride, 64);
    }
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    for (int64_t i = 0; i < num_rows; ++i) std::memcpy(static_cast<char*>(to) + i * stride, sums[tile][i], 64);
  }
  template <int tile, int rows, int weights>
  static void multiply() {
    multiply(sums[tile], operands[rows - 4], operands[weights - 4]);
  }

 private:
  static float flushed(float x) {
    constexpr uint32_t sign = 0x80000000;
    const uint32_t bits = bit_cast<uint32_t>(x);
    return bit_cast<float>((bits & ~sign) < 0x00800000 ? bits & sign : bits);
  }
  static float widened(uint16_t x) { return flushed(bit_cast<float>(uint32_t(x) << 16)); }

  static void multiply(float (*total)[16], const uint16_t (*rows)[32], const uint16_t (*weights)[32]) {
    float wide[2][16][16];
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 2; ++i) wide[i][k][n] = widened(weights[k][2 * n + i]);
      }
    }
    for (int64_t m = 0; m < num_rows; ++m) {
      float both[2][16] = {};
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float x = widened(rows[m][2 * k + i]);
          MINGRU_LANES
          for (int n = 0; n < 16; ++n) both[i][n] = flushed(std::fma(x, wide[i][k][n], both[i][n]));
        }
      }
      for (int n = 0; n < 16; ++n) total[m][n] = flushed(flushed(total[m][n]) + flushed(both[0][n] + both[1][n]));
    }
  }
};

}  // namespace mingru::MINGRU_ISA
