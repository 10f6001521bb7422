// Products of bfloat16 by the instruction of AVX512-BF16, AMD's processors since 2022: a product of pairs of depths is added
// to each of 16 sums. Rows and weights are packed as for the tiles of tile_products.h, and sums stay in registers.
#pragma once

#include "tile_products.h"

#ifdef MINGRU_AVX512

namespace mingru::MINGRU_ISA {

// Few sums are computed in parts, because an instruction waits for the one before it.
template <int down, int across>
static void multiply_pairs(const TileProduct& product, int64_t row, int64_t vector) {
  constexpr int count = down * across, parts = count < 8 ? 8 / count : 1;
  __m512 sums[count * parts] = {};
  for (const TileProduct::Factors& of : {product.first, product.second}) {
    const int64_t beside = of.depth * tile_bytes;
    const char* rows = static_cast<const char*>(of.rows) + row * of.row_stride;
    const char* weights = static_cast<const char*>(of.weights) + vector * beside;
    for (int64_t k = 0; k < of.depth * tile_pairs; k += parts) {
#pragma GCC unroll 24
      for (int i = 0; i < count * parts; ++i) {
        const int64_t pair = k + i / count;
        float both;
        std::memcpy(&both, rows + i % count / across * of.row_stride + pair * sizeof(both), sizeof(both));
        const __m512 left = _mm512_set1_ps(both), right = _mm512_loadu_ps(weights + i % across * beside + pair * sizeof(left));
        // By inline assembly, because this code is for processors without the instruction too.
        asm("vdpbf16ps %2, %1, %0" : "+v"(sums[i]) : "v"(left), "v"(right));
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < count; ++i) {
    float* const to = product.out + (row + i / across) * product.out_stride + (vector + i % across) * tile_lanes;
    __m512 sum = product.is_added ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
    for (int part = 0; part < parts; ++part) sum = _mm512_add_ps(sum, sums[i + part * count]);
    _mm512_storeu_ps(to, sum);
  }
}

// From a row on, as many rows at once as fit the registers, and then fewer.
template <int across, int down = 12>
static void multiply_columns(const TileProduct& product, int64_t vector, int64_t row = 0) {
  const int64_t rows = product.num_rows * product.num_blocks;
  for (; row + down <= rows; row += down) multiply_pairs<down, across>(product, row, vector);
  if constexpr (down > 1) multiply_columns<across, down == 12 ? 8 : down / 2>(product, vector, row);
}

static void multiply_in_pairs(const TileProduct& product) {
  int64_t vector = 0;
  for (; vector + 2 <= product.num_vectors; vector += 2) multiply_columns<2>(product, vector);
  if (vector < product.num_vectors) multiply_columns<1>(product, vector);
}

constexpr Tiles pair_products{[](int64_t) {}, [] {}, multiply_in_pairs};

}  // namespace mingru::MINGRU_ISA

#endif
