// The products of a GRU or an LSTM with its recurrent weights whose operands are bfloat16, and whose sums are float32: in
// tiles of up to 16 rows and 16 columns, by the instructions of amx.h, or as emulated.h computes them. All rows of operands
// are next to each other, as those of float32 are, and weights are packed in tiles of 32 depths and 16 columns.
// register_products.h has the same of float32 and float64.
#pragma once

#include "emulated.h"
#include "tiles.h"
#ifdef MINGRU_AVX512
#include "amx.h"
#endif

namespace mingru::MINGRU_ISA {

constexpr int64_t tile_lanes = 16, tile_pairs = 16, depth_of_tile = 2 * tile_pairs, tile_numbers = depth_of_tile * tile_lanes;

// A block of at most four tiles of sums.
template <class Unit, int down, int across, int i = 0>
MINGRU_INLINE void each_sum(const TileProduct& product, float* out, bool is_stored) {
  float* const sums = out + i / across * product.num_rows * product.out_stride + i % across * tile_lanes;
  const int64_t stride = product.out_stride * sizeof(float);
  if (is_stored) {
    Unit::template store<i>(sums, stride);
  } else if (product.is_added) {
    Unit::template load<i>(sums, stride);
  } else {
    Unit::template zero<i>();
  }
  if constexpr (i + 1 < down * across) each_sum<Unit, down, across, i + 1>(product, out, is_stored);
}

constexpr int64_t tile_bytes = tile_numbers * sizeof(BFloat16);

// Adds the product of a block of rows and a vector of columns.
template <class Unit, int down, int across>
MINGRU_INLINE void add_factors(const TileProduct::Factors& of, int64_t num_rows, int64_t block, int64_t vector) {
  constexpr int64_t line = depth_of_tile * sizeof(BFloat16);
  const int64_t below = num_rows * of.row_stride, beside = of.depth * tile_bytes;
  const char* rows = static_cast<const char*>(of.rows) + block * below;
  const char* weights = static_cast<const char*>(of.weights) + vector * beside;
  for (int64_t k = 0; k < of.depth; ++k, rows += line, weights += tile_bytes) {
    Unit::template load<4>(rows, of.row_stride);
    Unit::template load<6>(weights, line);
    Unit::template multiply<0, 4, 6>();
    if constexpr (across > 1) {
      Unit::template load<7>(weights + beside, line);
      Unit::template multiply<1, 4, 7>();
    }
    if constexpr (across > 2) {
      Unit::template load<6>(weights + 2 * beside, line);
      Unit::template multiply<2, 4, 6>();
      Unit::template load<7>(weights + 3 * beside, line);
      Unit::template multiply<3, 4, 7>();
    }
    if constexpr (down > 1) {
      Unit::template load<5>(rows + below, of.row_stride);
      Unit::template multiply<across, 5, 6>();
      if constexpr (across > 1) Unit::template multiply<across + 1, 5, 7>();
    }
  }
}

template <class Unit, int down, int across>
static void multiply_block(const TileProduct& product, int64_t block, int64_t vector) {
  static_assert(down * across <= 4);
  float* const out = product.out + block * product.num_rows * product.out_stride + vector * tile_lanes;
  each_sum<Unit, down, across>(product, out, false);
  add_factors<Unit, down, across>(product.first, product.num_rows, block, vector);
  add_factors<Unit, down, across>(product.second, product.num_rows, block, vector);
  each_sum<Unit, down, across>(product, out, true);
}

template <class Unit>
static void multiply_tiles(const TileProduct& product) {
  const int64_t across = product.num_blocks == 1 ? 4 : 2;
  for (int64_t vector = 0, count; vector < product.num_vectors; vector += count) {
    count = product.num_vectors - vector >= across ? across : least_of(product.num_vectors - vector, 2);
    for (int64_t block = 0; block < product.num_blocks; block += 2) {
      const bool is_last = block + 1 == product.num_blocks;
      if (count == 4) multiply_block<Unit, 1, 4>(product, block, vector);
      else if (count == 2 && is_last) multiply_block<Unit, 1, 2>(product, block, vector);
      else if (count == 2) multiply_block<Unit, 2, 2>(product, block, vector);
      else if (is_last) multiply_block<Unit, 1, 1>(product, block, vector);
      else multiply_block<Unit, 2, 1>(product, block, vector);
    }
  }
}

template <class Unit>
constexpr Tiles tiles_of{Unit::configure, Unit::release, multiply_tiles<Unit>};

// Pairs of bfloat16, of two depths that follow each other: (16 pairs, 16 columns) in a tile of weights.
using Pairs = uint32_t[tile_pairs][tile_lanes];

MINGRU_INLINE void transpose_pairs(Pairs& pairs) {
#ifdef MINGRU_AVX512
  __m512 rows[tile_lanes];
#pragma GCC unroll 16
  for (int i = 0; i < tile_lanes; ++i) rows[i] = _mm512_loadu_ps(pairs[i]);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < tile_lanes; ++i) _mm512_storeu_ps(pairs[i], rows[i]);
#else
  for (int i = 0; i < tile_lanes; ++i) {
    for (int k = 0; k < i; ++k) std::swap(pairs[i][k], pairs[k][i]);
  }
#endif
}

// Sets pairs of two rows of 16 columns.
MINGRU_INLINE void interleave(uint32_t* to, const BFloat16* first, const BFloat16* second) {
  MINGRU_LANES
  for (int64_t i = 0; i < tile_lanes; ++i) to[i] = uint32_t(first[i].x) | uint32_t(second[i].x) << 16;
}

// Rounds at most `width` numbers, with 0 after the last.
template <int64_t width, class T>
MINGRU_INLINE void round_few(BFloat16* to, const T* from, int64_t count) {
  T values[width] = {};
  if (count > 0 && count < width) std::memcpy(values, from, count * sizeof(T));
  convert(to, count >= width ? from : values, width);
}

// Weights to be packed, (gates, rows, depth), with strides.
template <class T>
struct GivenWeights {
  const T* data;
  int64_t num_gates, num_rows, depth, gate_stride;
};

// Copies weights in tiles: (gates padded / 16, depth / 32, 16, 32), where a row of a tile has pairs of depths of 16
// columns, with 0 after the last depth. Transposed, (padded / 16, gates padded / 32, 16, 32).
template <bool is_transposed, class T>
static void pack_tiles(const GivenWeights<T>& given, int64_t padded, BFloat16* to) {
  const int64_t rows = given.num_gates * padded, columns = is_transposed ? padded : rows;
  const int64_t depth = is_transposed ? rows : given.depth;
  // The numbers from one on in the row of a feature of a gate, and how many there are; none after the last.
  const auto numbers = [&](int64_t index, int64_t from, int64_t& count) {
    const int64_t gate = index / padded, row = index % padded;
    count = gate < given.num_gates && row < given.num_rows ? given.depth - from : 0;
    return given.data + (count > 0 ? gate * given.gate_stride + row * given.depth + from : 0);
  };
  for (int64_t column = 0; column < columns; column += tile_lanes) {
    for (int64_t k = 0, count; k < depth; k += depth_of_tile, to += tile_numbers) {
      Pairs pairs;
      for (int64_t i = 0; i < tile_pairs; ++i) {
        BFloat16 both[depth_of_tile];
        if (is_transposed) {
          for (int64_t which = 0; which < 2; ++which) {
            const T* const from = numbers(k + 2 * i + which, column, count);
            round_few<tile_lanes>(both + which * tile_lanes, from, count);
          }
          interleave(pairs[i], both, both + tile_lanes);
        } else {
          const T* const from = numbers(column + i, k, count);
          round_few<depth_of_tile>(both, from, count);
          std::memcpy(pairs[i], both, sizeof(both));
        }
      }
      if (!is_transposed) transpose_pairs(pairs);
      std::memcpy(to, pairs, sizeof(pairs));
    }
  }
}

template <int num_gates>
class TileProducts {
 public:
  using Operand = BFloat16;
  static constexpr bool is_rounded = true;
  // In the time of one of float32.
  static constexpr int64_t multiplications_at_once = 8;

  // Of a block of features, and so many batch elements.
  TileProducts(const Scan&, const DiagonalBlocks& blocks, int64_t block, int64_t together)
      : tiles_(*blocks.tiles), blocks_(blocks), padded_(blocks.padded), block_(block), rows_(rows_of_block(together)) {}

  static void pack(const DiagonalBlocks& blocks, void* packed, int64_t block, bool is_transposed) {
    const int64_t size = blocks.size, all = blocks.count * size;
    const GivenWeights<float> given{static_cast<const float*>(blocks.given) + block * size * size, num_gates, size, size, all * size};
    const int64_t numbers = is_transposed ? blocks.padded * gradient_stride(blocks) : num_gates * blocks.padded * state_stride(blocks);
    BFloat16* const to = static_cast<BFloat16*>(packed) + block * numbers;
    is_transposed ? pack_tiles<true>(given, blocks.padded, to) : pack_tiles<false>(given, blocks.padded, to);
  }

  // A tile of few rows takes as long as a whole one, because its weights are loaded.
  int64_t rows_to_wait_for(int64_t rows) const { return ceil_div(rows, tile_lanes) * tile_lanes; }
  // Rows are multiplied in blocks of equal size, so that the last may have some that do not exist.
  int64_t rows_in_memory(int64_t rows) const { return ceil_div(rows, rows_) * rows_; }
  static int64_t input_stride(int64_t num_x) { return whole(num_x); }
  static int64_t state_stride(const DiagonalBlocks& blocks) { return whole(blocks.padded); }
  static int64_t gradient_stride(const DiagonalBlocks& blocks) { return whole(num_gates * blocks.padded); }
  // Of `add_to`, for so many rows.
  static int64_t scratch_size(const DiagonalBlocks& blocks, int64_t rows) {
    return (num_gates + 1) * blocks.padded * whole(rows);
  }

  // While a thread multiplies rows of batch elements, of which each block has so many.
  struct Use {
    const Tiles& tiles;
    explicit Use(const TileProducts& of) : Use(of.tiles_, of.rows_) {}
    Use(const Tiles& tiles, int64_t rows) : tiles(tiles) { tiles.configure(rows); }
    ~Use() { tiles.release(); }
  };
  // Features that are computed together, so that their sums are still in the first-level cache when they are read.
  int64_t lanes_at_once(bool) const { return 2 * tile_lanes; }

  // The products of rows of states, for some features of each gate, with those of rows of x, if there are any; but apart, as
  // one gate more, those of x and of the candidate of a GRU.
  void multiply_states(
      const BFloat16* from, int64_t rows, float* products, int64_t stride, int64_t begin, int64_t end, bool,
      const BFloat16* x = nullptr, int64_t num_x = 0) const {
    const auto factors = [&](const void* packed, const BFloat16* rows, int64_t row, int64_t depth) {
      const auto* const weights = static_cast<const BFloat16*>(packed) + (block_ * num_gates * padded_ + row) * whole(depth);
      return factors_of(rows, weights, whole(depth));
    };
    for (int64_t gate = 0; gate < num_gates; ++gate) {
      const int64_t row = gate * padded_ + begin;
      const auto of_x = x ? factors(blocks_.input_weights, x, row, num_x) : Factors{};
      const bool is_apart = num_gates == 3 && gate == 2;
      multiply(factors(blocks_.weights, from, row, padded_), is_apart ? Factors{} : of_x, rows, end - begin, products + row, stride, false);
      if (is_apart && x) multiply(of_x, {}, rows, end - begin, products + row + padded_, stride, false);
    }
  }

  // Adds the products of rows of gradients with the transposed weights, for some features, to the gradients of states.
  void pass_back(const BFloat16* gradients, int64_t rows, float* carried, int64_t lane, int64_t last) const {
    const int64_t depth = gradient_stride(blocks_);
    const BFloat16* const weights = static_cast<const BFloat16*>(blocks_.transposed) + (block_ * padded_ + lane) * depth;
    multiply(factors_of(gradients, weights, depth), {}, rows, last - lane, carried + lane, padded_, true);
  }

  // Adds the products of the rows of previous states and gradients to the transposed gradients of the weights, (padded,
  // gates, padded).
  template <class Each>
  void add_to(
      float* totals, const BFloat16* gradients, const float* previous, int64_t rows, BFloat16* scratch,
      const Each& each) const {
    const int64_t depth = whole(rows), columns = num_gates * padded_, stride = gradient_stride(blocks_);
    BFloat16 *const left = scratch, *const right = scratch + padded_ * depth;
    static const BFloat16 zeros[tile_lanes] = {};
    each(padded_ / tile_lanes, tile_lanes * depth, [&](int64_t begin, int64_t end) {
      for (int64_t lane = begin * tile_lanes; lane < end * tile_lanes; lane += tile_lanes) {
        for (int64_t k = 0; k < depth; k += depth_of_tile) {
          Pairs pairs;
          for (int64_t i = 0; i < tile_pairs; ++i) {
            BFloat16 both[2][tile_lanes] = {};
            for (int64_t which = 0, row = k + 2 * i; which < 2 && row < rows; ++which, ++row) {
              convert(both[which], previous + row * padded_ + lane, tile_lanes);
            }
            interleave(pairs[i], both[0], both[1]);
          }
          transpose_pairs(pairs);
          for (int64_t i = 0; i < tile_lanes; ++i) std::memcpy(left + (lane + i) * depth + k, pairs[i], sizeof(pairs[i]));
        }
      }
    });
    each(columns / tile_lanes, tile_lanes * depth * padded_, [&](int64_t begin, int64_t end) {
      for (int64_t column = begin * tile_lanes; column < end * tile_lanes; column += tile_lanes) {
        for (int64_t k = 0; k < depth; k += depth_of_tile) {
          Pairs& pairs = *reinterpret_cast<Pairs*>(right + column * depth + k * tile_lanes);
          for (int64_t i = 0; i < tile_pairs; ++i) {
            const int64_t row = k + 2 * i;
            const BFloat16* const from = gradients + row * stride + column;
            interleave(pairs[i], row < rows ? from : zeros, row + 1 < rows ? from + stride : zeros);
          }
        }
      }
      const Use use(tiles_, tile_lanes);
      const int64_t column = begin * tile_lanes;
      const BFloat16* const own = right + column * depth;
      tiles_.multiply({factors_of(left, own, depth), {}, totals + column, columns, tile_lanes, padded_ / tile_lanes,
                       end - begin, true});
    });
  }

 private:
  using Factors = TileProduct::Factors;

  static int64_t whole(int64_t depth) { return ceil_div(depth, depth_of_tile) * depth_of_tile; }
  static int64_t rows_of_block(int64_t rows) { return ceil_div(rows, ceil_div(rows, tile_lanes)); }
  static Factors factors_of(const BFloat16* rows, const BFloat16* weights, int64_t depth) {
    return {rows, weights, depth * static_cast<int64_t>(sizeof(BFloat16)), depth / depth_of_tile};
  }

  void multiply(
      const Factors& first, const Factors& second, int64_t rows, int64_t columns, float* out, int64_t stride,
      bool is_added) const {
    tiles_.multiply({first, second, out, stride, rows_, ceil_div(rows, rows_), columns / tile_lanes, is_added});
  }

  const Tiles& tiles_;
  const DiagonalBlocks& blocks_;
  const int64_t padded_, block_, rows_;
};

}  // namespace mingru::MINGRU_ISA
