// Matrix products of float32 in tiles that fit the registers, with AVX-512. The right matrix is first copied into panels,
// whose rows are next to each other in memory. Each value is a sum in the order of the depth, so that it depends neither
// on the number of rows and threads nor on how the work is divided.
#pragma once

#include "math.h"
#include "scan.h"

#ifdef MINGRU_AVX512

namespace mingru::MINGRU_ISA {

constexpr int64_t lanes = 16;

// The lanes of a vector that are columns of the matrix.
MINGRU_INLINE __mmask16 lanes_of(int64_t columns) {
  return columns >= lanes ? 0xffff : columns > 0 ? (1 << columns) - 1 : 0;
}

// Turns rows into columns: exchanges the squares of 8, 4, 2 and 1 lanes that are off the diagonal.
template <int size = lanes / 2>
MINGRU_INLINE void transpose(__m512 (&rows)[lanes]) {
  const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i by = _mm512_set1_epi32(size);
  const __mmask16 is_right = _mm512_test_epi32_mask(index, by);
  // From 16 on, an index is one into the second vector.
  const __m512i upper = _mm512_mask_add_epi32(index, is_right, index, _mm512_set1_epi32(lanes - size));
  const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(index, by), is_right, index, _mm512_set1_epi32(lanes));
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & size) continue;
    const __m512 first = rows[i], second = rows[i + size];
    rows[i] = _mm512_permutex2var_ps(first, upper, second);
    rows[i + size] = _mm512_permutex2var_ps(first, lower, second);
  }
  if constexpr (size > 1) transpose<size / 2>(rows);
}

// Copies columns that are far from each other into a row of lanes for each k, with 0 after the last column.
MINGRU_INLINE void pack_columns(
    const float* from, int64_t stride, int64_t count, int64_t depth, float* to, int64_t to_stride) {
  for (int64_t k = 0; k < depth; k += lanes) {
    const __mmask16 mask = lanes_of(depth - k);
    __m512 values[lanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) {
      // The last column again in place of those that do not exist.
      values[i] = _mm512_maskz_loadu_ps(i < count ? mask : 0, from + least_of(i, count - 1) * stride + k);
    }
    transpose(values);
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes; ++i) {
      if (k + i < depth) _mm512_storeu_ps(to + (k + i) * to_stride, values[i]);
    }
  }
}

// Copies a panel of the right matrix, with 0 after its last column.
static void pack_panel(const MatrixProduct& product, float* to, int64_t panel) {
  const Matrix& right = product.right;
  const int64_t first = panel * panel_columns, columns = least_of(panel_columns, product.columns - first);
  const int64_t width = ceil_div(columns, lanes) * lanes;
  const float* from = right.data + first * right.column_stride;
  for (int64_t column = 0; column < width; column += lanes, from += lanes * right.column_stride, to += lanes) {
    const int64_t count = least_of(columns - column, lanes);
    if (right.column_stride != 1) {
      pack_columns(from, right.column_stride, count, product.depth, to, width);
      continue;
    }
    for (int64_t k = 0; k < product.depth; ++k) {
      _mm512_storeu_ps(to + k * width, _mm512_maskz_loadu_ps(lanes_of(count), from + k * right.row_stride));
    }
  }
}

// A tile is a part of a product: at most `tile_rows` rows, the columns of a panel, which is `right`, and a depth of at
// most `tile_depth`. `last` has the lanes of the last vector. Of the 32 registers, at most 24 have sums, 4 a row of the
// panel, and one a value of the left matrix.
template <int rows, int vectors>
static void multiply_tile(const MatrixProduct& tile, __mmask16 last) {
  __m512 sums[rows][vectors];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_setzero_ps();
  }
  const int64_t row_stride = tile.left.row_stride, column_stride = tile.left.column_stride;
  const float *left = tile.left.data, *panel = tile.right.data;
  for (int64_t k = 0; k < tile.depth; ++k, left += column_stride, panel += vectors * lanes) {
    // The rows of a transposed matrix are far from each other, where the processor does not see what comes next.
    // A number, because it may be after the end of the matrix.
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(left) + 16 * column_stride * sizeof(float);
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
    __m512 right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = _mm512_loadu_ps(panel + j * lanes);
    for (int i = 0; i < rows; ++i) {
      const __m512 factor = _mm512_set1_ps(left[i * row_stride]);
      for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_fmadd_ps(factor, right[j], sums[i][j]);
    }
  }
  // Unrolled, so that the sums stay in registers.
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const __mmask16 mask = j == vectors - 1 ? last : 0xffff;
      if (tile.added) {
        const float* added = tile.added + i * tile.added_stride + j * lanes;
        sums[i][j] = _mm512_add_ps(sums[i][j], _mm512_maskz_loadu_ps(mask, added));
      }
      _mm512_mask_storeu_ps(tile.out + i * tile.out_stride + j * lanes, mask, sums[i][j]);
    }
  }
}

template <int vectors, int rows = tile_rows>
static void multiply_rows(const MatrixProduct& tile, __mmask16 last) {
  if (tile.rows == rows) return multiply_tile<rows, vectors>(tile, last);
  if constexpr (rows > 1) multiply_rows<vectors, rows - 1>(tile, last);
}

// Computes a range of rows of a panel's columns.
static void multiply_panel(const MatrixProduct& product, const float* panel, int64_t index, int64_t begin, int64_t end) {
  constexpr void (*by_vectors[])(const MatrixProduct&, __mmask16) = {
      multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>};
  const int64_t first = index * panel_columns, columns = least_of(panel_columns, product.columns - first);
  const int64_t vectors = ceil_div(columns, lanes);
  const __mmask16 last = lanes_of(columns - (vectors - 1) * lanes);
  MatrixProduct tile = product;
  for (int64_t k = 0; k < product.depth; k += tile_depth) {
    tile.depth = least_of(tile_depth, product.depth - k);
    tile.right.data = panel + k * vectors * lanes;
    const float* added = k == 0 ? product.added : product.out;
    tile.added_stride = k == 0 ? product.added_stride : product.out_stride;
    for (int64_t row = begin; row < end; row += tile_rows) {
      tile.left.data = product.left.data + row * product.left.row_stride + k * product.left.column_stride;
      tile.added = added ? added + row * tile.added_stride + first : nullptr;
      tile.out = product.out + row * product.out_stride + first;
      tile.rows = least_of(tile_rows, end - row);
      by_vectors[vectors - 1](tile, last);
    }
  }
}

}  // namespace mingru::MINGRU_ISA

#endif
