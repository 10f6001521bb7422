// The products of a GRU or an LSTM with its recurrent weights in the accumulation dtype, whose sums stay in registers. The
// features are lanes, and each weight is loaded once for all batch elements whose sums are in registers. tile_products.h
// has the same of operands in bfloat16.
#pragma once

#include "product.h"
#include "tiles.h"

namespace mingru::MINGRU_ISA {

// Copies columns as tiles.h does, for other numbers and processors. A line of the cache is read at once.
template <class A>
static void pack_lanes(const A* from, int64_t stride, int64_t count, int64_t depth, A* to, int64_t to_stride) {
  for (int64_t first = 0; first < depth; first += 16) {
    for (int64_t i = 0; i < per_register<A>; ++i) {
      for (int64_t k = first; k < least_of(first + 16, depth); ++k) {
        to[k * to_stride + i] = i < count ? from[i * stride + k] : A(0);
      }
    }
  }
}

template <class A, int num_gates>
class RegisterProducts {
 public:
  using Operand = A;
  static constexpr bool is_rounded = false;
  static constexpr int64_t multiplications_at_once = 1;

  RegisterProducts(const Scan& scan, const DiagonalBlocks& blocks, int64_t block, int64_t)
      : scan_(scan), blocks_(blocks), size_(blocks.size), padded_(blocks.padded), block_(block) {}

  // Copies the weights of a block in this order: (padded / lanes, gates / together, size, together, lanes), where a vector
  // has the weights from one feature to some. Transposed, from some features to one, (padded / (lanes vectors), gates,
  // size, vectors, lanes).
  static void pack(const DiagonalBlocks& blocks, void* packed, int64_t block, bool is_transposed) {
    const int64_t size = blocks.size, padded = blocks.padded;
    A* to = static_cast<A*>(packed) + block * num_gates * size * padded;
    const A* weights = static_cast<const A*>(blocks.given) + block * size * size;
    const int64_t gate_stride = blocks.count * size * size;
    for (int64_t lane = 0; is_transposed && lane < padded; lane += most_vectors * lanes) {
      const int64_t width = least_of(most_vectors * lanes, padded - lane), count = least_of(width, size - lane);
      for (int64_t row = 0; row < num_gates * size; ++row, to += width) {
        const A* from = weights + row / size * gate_stride + row % size * size + lane;
        for (int64_t i = 0; i < width; ++i) to[i] = i < count ? from[i] : A(0);
      }
    }
    for (int64_t lane = 0; !is_transposed && lane < padded; lane += lanes) {
      const int64_t count = least_of(lanes, size - lane);
      for (int64_t gate = 0; gate < num_gates; ++gate) {
        const A* from = weights + gate * gate_stride + lane * size;
        pack_lanes(from, size, count, size, to + gate % together * lanes, together * lanes);
        if (gate % together == together - 1) to += size * together * lanes;
      }
    }
  }

  // Rows that take as long as so many.
  int64_t rows_to_wait_for(int64_t rows) const { return rows; }
  // Rows that are multiplied are next to each other.
  int64_t rows_in_memory(int64_t rows) const { return rows; }
  static int64_t input_stride(int64_t) { return 0; }
  static int64_t state_stride(const DiagonalBlocks& blocks) { return blocks.padded; }
  static int64_t gradient_stride(const DiagonalBlocks& blocks) { return num_gates * blocks.padded; }
  static int64_t scratch_size(const DiagonalBlocks&, int64_t) { return 0; }
  struct Use {
    explicit Use(const RegisterProducts&) {}
  };
  // Forward, all features of a thread are multiplied before the functions of the step.
  int64_t lanes_at_once(bool is_backward) const { return is_backward ? most_vectors * group : ceil_div(padded_, group) * group; }

  // The products of rows of states, (rows, padded), for some features of each gate, the last first if it `is_reversed`.
  void multiply_states(
      const A* from, int64_t rows, A* products, int64_t stride, int64_t begin, int64_t end, bool is_reversed,
      const A* = nullptr, int64_t = 0) const {
    if (!blocks_.weights) {
      const int64_t gate_stride = blocks_.count * size_ * size_;
      const int64_t last = least_of(end, size_);
      const A* weights = static_cast<const A*>(blocks_.given) + block_ * size_ * size_;
      for (int64_t gate = 0; gate < num_gates; ++gate) {
        A* const own = products + gate * padded_;
        const Product product{
            scan_.storage, from, weights + gate * gate_stride, nullptr, own, rows, stride, size_, padded_};
        multiply_few_rows<A>(product, begin, last);
        for (int64_t row = 0; row < rows; ++row) std::memset(own + row * stride + last, 0, (end - last) * sizeof(A));
      }
      return;
    }
    const A* weights = static_cast<const A*>(blocks_.weights) + block_ * num_gates * size_ * padded_;
    RegisterProduct<A> product{from, padded_, 1, 0, nullptr, together * lanes, 0, size_, nullptr, stride, padded_, false};
    for (int64_t own = begin; own < end; own += lanes) {
      const int64_t lane = is_reversed ? begin + end - lanes - own : own;
      for (int gate = 0; gate < num_gates; gate += together) {
        product.right = weights + (lane * num_gates + gate * lanes) * size_;
        product.out = products + gate * padded_ + lane;
        multiply_in_registers<A, 1, together>(product, rows, together);
      }
    }
  }

  // Adds the products of rows of gradients with the transposed weights, for some features, to the gradients of states.
  void pass_back(const A* gradients, int64_t rows, A* carried, int64_t lane, int64_t last) const {
    const A* weights = static_cast<const A*>(blocks_.transposed);
    RegisterProduct<A> product{gradients, num_gates * padded_, 1, padded_, nullptr, 0, 0, size_, nullptr, padded_, lanes, true};
    for (int64_t own = lane; own < last; own += most_vectors * lanes) {
      const int64_t width = least_of(most_vectors * lanes, last - own);
      product.right = weights + (block_ * padded_ + own) * num_gates * size_;
      product.right_stride = width;
      product.right_part_stride = size_ * width;
      if (!weights) {
        product.right = static_cast<const A*>(blocks_.given) + block_ * size_ * size_ + own;
        product.right_stride = size_;
        product.right_part_stride = blocks_.count * size_ * size_;
      }
      product.out = carried + own;
      multiply_in_registers<A, num_gates>(product, rows, width / lanes);
    }
  }

  // Adds the products of the rows of gradients and previous states to those of the weights, (gates, padded, padded). They
  // are sums of sums, because a long sum is less accurate.
  template <class Each>
  void add_to(A* totals, const A* gradients, const A* previous, int64_t rows, A*, const Each& each) const {
    each(num_gates * padded_ / most_rows, most_rows * padded_ * rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * most_rows; i < end * most_rows; i += most_rows) {
        for (int64_t lane = 0; lane < padded_; lane += most_vectors * lanes) {
          multiply_in_registers<A, 1>(
              {gradients + i, 1, num_gates * padded_, 0, previous + lane, padded_, 0, rows, totals + i * padded_ + lane,
               padded_, lanes, true},
              most_rows, (padded_ - lane) / lanes);
        }
      }
    });
  }

 private:
  static constexpr int64_t lanes = per_register<A>;
  // The gates whose sums are in registers together: all of a GRU, two of an LSTM, because fewer rows of four would be slower.
  static constexpr int together = num_gates % most_vectors == 0 ? most_vectors : 2;

  const Scan& scan_;
  const DiagonalBlocks& blocks_;
  const int64_t size_, padded_, block_;
};

}  // namespace mingru::MINGRU_ISA
