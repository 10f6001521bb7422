// The steps of a diagonal block by the cell, the type and the products that a call asks for, and copies of its weights.
#pragma once

#include "recurrent_steps.h"

namespace mingru::MINGRU_ISA {

// The batch elements [begin, end) of the part.
template <class T, class Cell, class Products>
static void run_steps(
    const Scan& scan, const DiagonalBlocks& blocks, const Part& part, int64_t block, int64_t begin, int64_t end,
    bool is_backward, void* totals) {
  // In equal parts.
  for (int64_t parts = ceil_div(end - begin, blocks.sequences_together()), last; parts > 0; --parts, begin = last) {
    last = begin + ceil_div(end - begin, parts);
    RecurrentSteps<T, Cell, Products> steps(scan, blocks, part, block, begin, last, is_backward);
    is_backward ? steps.backward(static_cast<Accumulated<T>*>(totals)) : steps.forward();
  }
}

template <class A>
static void run_diagonal_block(
    const Scan& scan, const DiagonalBlocks& blocks, const Part& part, int64_t block, int64_t begin, int64_t end,
    bool is_backward, void* totals) {
  const auto run = [&](auto type, auto cell, auto is_rounded) {
    using Cell = decltype(cell);
    using Products = std::conditional_t<is_rounded, TileProducts<Cell::num_gates>, RegisterProducts<A, Cell::num_gates>>;
    run_steps<decltype(type), Cell, Products>(scan, blocks, part, block, begin, end, is_backward, totals);
  };
  const bool is_lstm = scan.cell == mingru::Cell::lstm;
  if constexpr (std::is_same_v<A, float>) {
    const auto in_tiles = [&](auto type) {
      is_lstm ? run(type, LSTMCell(), std::true_type()) : run(type, GRUCell(), std::true_type());
    };
    if (blocks.tiles) return scan.storage == Storage::bfloat16 ? in_tiles(BFloat16()) : in_tiles(A());
  }
  if (is_lstm) return run(A(), LSTMCell(), std::false_type());
  with_type<A>(scan.storage, [&](auto type) { run(type, GRUCell(), std::false_type()); });
}

// Copies the weights of the linear map of a block, whose rows have so many numbers.
template <class A>
static void pack_input_weights(const InputWeights& weights, const DiagonalBlocks& blocks, void* packed, int64_t block) {
  const int64_t rows = blocks.num_gates * blocks.padded, depth = TileProducts<3>::input_stride(weights.num_x);
  BFloat16* const to = static_cast<BFloat16*>(packed) + block * rows * depth;
  const auto pack = [&](auto* data) {
    const int64_t own = block * blocks.size * weights.num_x, gate_stride = blocks.count * blocks.size * weights.num_x;
    using T = std::decay_t<decltype(*data)>;
    pack_tiles<false>(GivenWeights<T>{data + own, blocks.num_gates, blocks.size, weights.num_x, gate_stride}, blocks.padded, to);
  };
  weights.storage == Storage::bfloat16 ? pack(static_cast<const BFloat16*>(weights.data)) : pack(static_cast<const float*>(weights.data));
}

template <class A>
static void pack_diagonal_block(const DiagonalBlocks& blocks, void* packed, int64_t block, bool is_transposed) {
  const auto pack = [&](auto num_gates) {
    if constexpr (std::is_same_v<A, float>) {
      if (blocks.tiles) return TileProducts<num_gates>::pack(blocks, packed, block, is_transposed);
    }
    RegisterProducts<A, num_gates>::pack(blocks, packed, block, is_transposed);
  };
  blocks.num_gates == 4 ? pack(std::integral_constant<int, 4>()) : pack(std::integral_constant<int, 3>());
}

}  // namespace mingru::MINGRU_ISA
