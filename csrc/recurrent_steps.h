// The loops over the steps of a GRU or an LSTM, whose features see each other in blocks, or all: the diagonal blocks of its
// recurrent weights. A task has one block of features, of some batch elements; the features are lanes, and each weight is
// loaded once for all batch elements whose sums are in registers.
#pragma once

#include <memory>
#include <utility>

#include "product.h"
#include "recurrent_cells.h"
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

// The gates whose sums are in registers together: all of a GRU, two of an LSTM, because fewer rows of four would be slower.
constexpr int gates_together(int64_t num_gates) { return num_gates % most_vectors == 0 ? most_vectors : 2; }

// Copies the weights of a block in this order: (padded / lanes, gates / together, size, together, lanes), where a vector has
// the weights from one feature to some. Transposed, from some features to one, (padded / (lanes vectors), gates, size,
// vectors, lanes).
template <class A>
static void pack_diagonal_block(const DiagonalBlocks& blocks, void* packed, int64_t block, bool is_transposed) {
  constexpr int64_t lanes = per_register<A>;
  const int64_t size = blocks.size, padded = blocks.padded, num_gates = blocks.num_gates;
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
    const int64_t count = least_of(lanes, size - lane), together = gates_together(num_gates);
    for (int64_t gate = 0; gate < num_gates; ++gate) {
      const A* from = weights + gate * gate_stride + lane * size;
      pack_lanes(from, size, count, size, to + gate % together * lanes, together * lanes);
      if (gate % together == together - 1) to += size * together * lanes;
    }
  }
}

template <class T, class Cell>
class RecurrentSteps {
  using A = Accumulated<T>;

 public:
  // Of the batch elements [begin, end).
  RecurrentSteps(
      const Scan& scan, const DiagonalBlocks& blocks, const Part& part, int64_t block, int64_t begin, int64_t end,
      bool is_backward)
      : scan_(scan),
        blocks_(blocks),
        size_(blocks.size),
        padded_(blocks.padded),
        block_(block),
        batch_(begin),
        together_(end - begin),
        begin_(part.begin),
        is_backward_(is_backward),
        is_first_(scan.reverse == is_backward ? part.begin == 0 : part.end == scan.num_steps) {
    for (int64_t n = 0; n < together_; ++n) {
      lengths_[n] = scan.lengths ? scan.lengths[batch_ + n] : scan.num_steps;
      ends_[n] = least_of(part.end, lengths_[n]);
      if (ends_[n] - begin_ > count_) count_ = ends_[n] - begin_;
    }
    if (is_backward && blocks.rows_together() > 2 * together_) chunk_ = blocks.rows_together() / together_;
    chunk_ = least_of(chunk_, count_);
    const int64_t rows = chunk_ * together_;
    const int64_t count = num_states * together_ + rows * (1 + num_gates);
    memory_.reset(new Line[ceil_div(count * padded_ * sizeof(A), sizeof(Line))]);
    states_ = reinterpret_cast<A*>(memory_.get());
    cells_ = states_ + (num_states - 1) * together_ * padded_;
    others_ = cells_ + together_ * padded_;
    products_ = others_ + rows * padded_;
    for (int64_t n = 0; n < together_; ++n) set_states(is_first_ ? (is_backward ? scan.grad_last : scan.h) : end_of_pass(), n);
  }

  void forward() {
    for (int64_t done = 0; done < count_; ++done) {
      go_to(done);
      for (int64_t n = 0; n < together_; ++n) {
        if (is_reset(n, done)) set_states(scan_.initial_state, n);
      }
      each(padded_ / group, together_ * num_gates * group * size_, [&](int64_t begin, int64_t end) {
        // Each step begins with the weights that the one before read last, which are still in the cache.
        multiply_states(states_, together_, begin * group, end * group, done % 2 != 0);
        scan_.sums.data ? advance<true>(begin * group, end * group) : advance<false>(begin * group, end * group);
      });
      std::swap(states_, others_);
    }
    finish();
  }

  // Adds the gradients of the weights, (gates, padded, padded), and of the biases after them, if there are totals.
  void backward(A* totals) {
    for (int64_t first = 0; first < count_; first += chunk_) {
      const int64_t steps = least_of(chunk_, count_ - first), rows = steps * together_;
      each(rows, padded_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) read_previous(i % together_, first + i / together_, others_ + i * padded_);
      });
      if (!scan_.sums.data) {
        each(padded_ / group, rows * num_gates * group * size_, [&](int64_t begin, int64_t end) {
          multiply_states(others_, rows, begin * group, end * group, false);
        });
      }
      // The products of a step need all lanes of its gradients, but the gradients of the step before only their own.
      constexpr int64_t lanes = most_vectors * group;
      for (int64_t step = 0; step <= steps; ++step) {
        const int64_t multiplications = step == 0 ? lanes : together_ * num_gates * lanes * size_;
        if (step < steps) go_to(first + step);
        each(ceil_div(padded_, lanes), multiplications, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t lane = (step % 2 == 0 ? i : begin + end - 1 - i) * lanes, last = least_of(lane + lanes, padded_);
            if (step > 0) pass_back(first, step - 1, lane, last);
            for (int64_t own = lane; step < steps && own < last; own += group) {
              for (int64_t n = 0; n < together_; ++n) differentiate(n, step * together_ + n, own);
            }
          }
        });
      }
      if (totals) add_to(totals, rows);
    }
    finish();
  }

 private:
  static constexpr int num_gates = Cell::num_gates, num_states = Cell::num_states;
  using Values = StepValues<A, num_gates>;

  // Where a sequence has its values of the present step, in numbers after the first of the block. All inputs, and their
  // gradients, have equal places.
  struct Place {
    bool exists, has_next;
    int64_t input, next_input, out, sum, next_sum, grad_out;
  };

  // Calls f with ranges of [0, count), by several threads if there are enough multiplications.
  template <class F>
  void each(int64_t count, int64_t multiplications, const F& f) const {
    if (!blocks_.parallel_for) return f(0, count);
    const auto call = [](const void* given, int64_t begin, int64_t end) { (*static_cast<const F*>(given))(begin, end); };
    blocks_.parallel_for(count, multiplications, call, &f);
  }

  A* products_of(int64_t row) const { return products_ + row * num_gates * padded_; }
  const A* biases_at(int64_t lane) const { return static_cast<const A*>(blocks_.biases) + block_ * padded_ + lane; }

  bool exists(int64_t n, int64_t done) const { return begin_ + done < ends_[n]; }

  // The index in time after so many steps of the pass, and its place in memory.
  int64_t step_of(int64_t n, int64_t done) const {
    return scan_.reverse != is_backward_ ? ends_[n] - 1 - done : begin_ + done;
  }
  int64_t place_of(int64_t step) const { return scan_.step_offsets ? scan_.step_offsets[step] : step; }
  int64_t position_of(int64_t n, int64_t done) const { return place_of(step_of(n, done)); }

  bool is_reset(int64_t n, int64_t done) const {
    return scan_.reset.data && exists(n, done) && scan_.is_reset(batch_ + n, position_of(n, done));
  }

  int64_t index(const Sequence& sequence, int64_t n, int64_t position) const {
    return sequence.index(batch_ + n, position) + block_ * size_;
  }
  static T* data(const Sequence& sequence) { return static_cast<T*>(sequence.data); }

  void go_to(int64_t done) {
    for (int64_t n = 0; n < together_; ++n) {
      Place& at = places_[n];
      at.exists = exists(n, done), at.has_next = exists(n, done + 1);
      if (!at.exists) continue;
      const int64_t position = position_of(n, done);
      at.input = index(scan_.inputs[0], n, position), at.out = index(scan_.out, n, position);
      if (at.has_next) at.next_input = index(scan_.inputs[0], n, position_of(n, done + 1));
      if (scan_.sums.data) at.sum = index(scan_.sums, n, position);
      if (scan_.sums.data && at.has_next) at.next_sum = index(scan_.sums, n, position_of(n, done + 1));
      if (is_backward_) at.grad_out = index(scan_.grad_out, n, position);
    }
  }

  // Where the state after the pass, or its gradient, is written.
  void* end_of_pass() const { return is_backward_ ? scan_.grad_h : scan_.last; }
  A* state_of(const void* states, int64_t n, int index = 0) const {
    const int64_t before = (batch_ + n) * num_states + index;
    return static_cast<A*>(const_cast<void*>(states)) + before * scan_.num_features + block_ * size_;
  }
  A* carried_of(int64_t n, int index) const { return (index == 0 ? states_ : cells_) + n * padded_; }
  void copy(A* to, const void* states, int64_t n, int index = 0) const {
    std::memcpy(to, state_of(states, n, index), size_ * sizeof(A));
  }
  void set_states(const void* states, int64_t n) const {
    for (int k = 0; k < num_states; ++k) copy(carried_of(n, k), states, n, k);
  }
  void finish() const {
    for (int64_t n = 0; n < together_; ++n) {
      for (int k = 0; k < num_states; ++k) std::memcpy(state_of(end_of_pass(), n, k), carried_of(n, k), size_ * sizeof(A));
    }
  }

  // A group of lanes of a row: in its place, or if it is shorter or of another type, in `copy`.
  MINGRU_INLINE_MEMBER A* place(A* copy, T* row, int64_t lane) const {
    if constexpr (std::is_same_v<T, A>) {
      if (lane + group <= size_) return row + lane;
    }
    return copy;
  }

  // The same with what the row has, and 0 after the last feature of the block.
  MINGRU_INLINE_MEMBER A* get(A* copy, T* row, int64_t lane) const {
    A* const lanes = place(copy, row, lane);
    if (lanes == copy) load(copy, Rows<const T>{row + lane, 0}, 1, least_of(size_ - lane, group));
    return lanes;
  }

  // Writes lanes that may be in their place.
  MINGRU_INLINE_MEMBER void put(T* row, const A* lanes, int64_t lane) const {
    A* const to = place(nullptr, row, lane);
    if (!to) return store(Rows<T>{row + lane, 0}, lanes, 1, least_of(size_ - lane, group));
    if (to != lanes) std::memcpy(to, lanes, group * sizeof(A));
  }

  // The products of rows of states, (rows, padded), for some features of each gate, the last first if it `is_reversed`.
  void multiply_states(const A* from, int64_t rows, int64_t begin, int64_t end, bool is_reversed) const {
    if (!blocks_.weights) {
      const int64_t gate_stride = blocks_.count * size_ * size_;
      const int64_t last = least_of(end, size_);
      const A* weights = static_cast<const A*>(blocks_.given) + block_ * size_ * size_;
      for (int64_t gate = 0; gate < num_gates; ++gate) {
        const Product product{
            scan_.storage, from, weights + gate * gate_stride, nullptr, products_ + gate * padded_, rows,
            num_gates * padded_, size_, padded_};
        multiply_few_rows<A>(product, begin, last);
        for (int64_t row = 0; row < rows; ++row) {
          std::memset(products_of(row) + gate * padded_ + last, 0, (end - last) * sizeof(A));
        }
      }
      return;
    }
    const A* weights = static_cast<const A*>(blocks_.weights) + block_ * num_gates * size_ * padded_;
    constexpr int64_t lanes = per_register<A>;
    constexpr int together = gates_together(num_gates);
    RegisterProduct<A> product{from, padded_, 1, 0, nullptr, together * lanes, 0, size_, nullptr, num_gates * padded_,
                               padded_, false};
    for (int64_t own = begin; own < end; own += lanes) {
      const int64_t lane = is_reversed ? begin + end - lanes - own : own;
      for (int gate = 0; gate < num_gates; gate += together) {
        product.right = weights + (lane * num_gates + gate * lanes) * size_;
        product.out = products_ + gate * padded_ + lane;
        multiply_in_registers<A, 1, together>(product, rows, together);
      }
    }
  }

  // Adds the products of a step's gradients with the transposed weights to the gradients that are carried.
  void pass_back(int64_t first, int64_t step, int64_t lane, int64_t last) const {
    const A* weights = static_cast<const A*>(blocks_.transposed);
    RegisterProduct<A> product{products_of(step * together_), num_gates * padded_, 1, padded_, nullptr, 0, 0, size_, nullptr,
                               padded_, per_register<A>, true};
    for (int64_t own = lane; own < last; own += most_vectors * per_register<A>) {
      const int64_t width = least_of(most_vectors * per_register<A>, last - own);
      product.right = weights + (block_ * padded_ + own) * num_gates * size_;
      product.right_stride = width;
      product.right_part_stride = size_ * width;
      if (!weights) {
        product.right = static_cast<const A*>(blocks_.given) + block_ * size_ * size_ + own;
        product.right_stride = size_;
        product.right_part_stride = blocks_.count * size_ * size_;
      }
      product.out = states_ + own;
      multiply_in_registers<A, num_gates>(product, together_, width / per_register<A>);
    }
    for (int64_t n = 0; n < together_; ++n) {
      if (!is_reset(n, first + step)) continue;
      for (int k = 0; k < num_states; ++k) {
        A *total = state_of(scan_.grad_initial_state, n, k), *carried = carried_of(n, k);
        for (int64_t i = lane; i < least_of(last, size_); ++i) {
          total[i] += carried[i];
          carried[i] = 0;
        }
      }
    }
  }

  // In the places of the inputs and the sum, or in copies.
  MINGRU_INLINE_MEMBER void read(Values& values, const Place& at, int64_t lane) const {
    for (int k = 0; k < num_gates; ++k) {
      values.lanes[k] = get(values.copies[k], data(scan_.inputs[k]) + at.input, lane);
      // Steps are farther from each other than processors look ahead.
      if (at.has_next) MINGRU_PREFETCH(data(scan_.inputs[k]) + at.next_input + lane);
    }
    A* const copy = values.copies[num_gates];
    if (scan_.sums.data && at.has_next) MINGRU_PREFETCH(data(scan_.sums) + at.next_sum + lane);
    values.lanes[num_gates] = scan_.sums.data ? get(copy, data(scan_.sums) + at.sum, lane) : copy;
  }

  // Computes features of the next states.
  template <bool is_kept>
  void advance(int64_t begin, int64_t end) const {
    for (int64_t n = 0; n < together_; ++n) {
      const Place& at = places_[n];
      const A* state = states_ + n * padded_;
      A* next = others_ + n * padded_;
      if (!at.exists) {
        std::memcpy(next + begin, state + begin, (end - begin) * sizeof(A));
        continue;
      }
      for (int64_t lane = begin; lane < end; lane += group) {
        Values values;
        read(values, at, lane);
        A* const cell = cells_ + n * padded_ + lane;
        Cell::template activate<is_kept>(values, next + lane, state + lane, cell, products_of(n) + lane, padded_, biases_at(lane));
        put(data(scan_.out) + at.out, next + lane, lane);
        for (int k = 0; is_kept && k < num_gates; ++k) put(data(scan_.inputs[k]) + at.input, values.lanes[k], lane);
        if (is_kept) put(data(scan_.sums) + at.sum, values.lanes[num_gates], lane);
      }
    }
  }

  // Reads the state before a step. Of a batch element without the step, it is 0.
  void read_previous(int64_t n, int64_t done, A* to) const {
    if (!exists(n, done)) return static_cast<void>(std::memset(to, 0, padded_ * sizeof(A)));
    const int64_t step = step_of(n, done), before = scan_.reverse ? step + 1 : step - 1;
    if (is_reset(n, done)) return copy(to, scan_.initial_state, n);
    if (before < 0 || before == lengths_[n]) return copy(to, scan_.h, n);
    T* row = data(scan_.out) + index(scan_.out, n, place_of(before));
    for (int64_t lane = 0; lane < padded_; lane += group) {
      const A* lanes = get(to + lane, row, lane);
      if (lanes != to + lane) std::memcpy(to + lane, lanes, group * sizeof(A));
    }
  }

  // Replaces a group of a row of products by their gradients, which are 0 without the step, and writes those of the step's
  // inputs.
  void differentiate(int64_t n, int64_t index, int64_t lane) const {
    const Place& at = places_[n];
    A* const sums = products_of(index) + lane;
    if (!at.exists) {
      for (int k = 0; k < num_gates; ++k) std::memset(sums + k * padded_, 0, group * sizeof(A));
      return;
    }
    const A* before = others_ + index * padded_ + lane;
    Values values;
    alignas(64) A next[group], grad_copy[group], grad_copies[num_gates][group];
    A *const grad = get(grad_copy, data(scan_.grad_out) + at.grad_out, lane), *grads[num_gates];
    read(values, at, lane);
    if constexpr (num_states == 1) {
      if (!scan_.sums.data) Cell::template activate<true>(values, next, before, next, sums, padded_, biases_at(lane));
    }
    for (int k = 0; k < num_gates; ++k) grads[k] = place(grad_copies[k], data(scan_.grad_inputs[k]) + at.input, lane);
    A *const carried = carried_of(n, 0) + lane, *const of_cell = cells_ + n * padded_ + lane;
    Cell::differentiate(values, grads, sums, padded_, before, grad, carried, of_cell);
    for (int k = 0; k < num_gates; ++k) put(data(scan_.grad_inputs[k]) + at.input, grads[k], lane);
  }

  // Adds the products of the rows of gradients and previous states, which are sums of sums, because a long sum is less
  // accurate.
  void add_to(A* totals, int64_t rows) const {
    each(num_gates * padded_ / most_rows, most_rows * padded_ * rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * most_rows; i < end * most_rows; i += most_rows) {
        for (int64_t lane = 0; lane < padded_; lane += most_vectors * per_register<A>) {
          multiply_in_registers<A, 1>(
              {products_ + i, 1, num_gates * padded_, 0, others_ + lane, padded_, 0, rows, totals + i * padded_ + lane,
               padded_, per_register<A>, true},
              most_rows, (padded_ - lane) / per_register<A>);
        }
      }
    });
    if (num_states > 1) return;  // all biases of an LSTM are those of its inputs
    A* of_biases = totals + num_gates * padded_ * padded_;
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t i = 0; i < padded_; ++i) of_biases[i] += products_of(k)[2 * padded_ + i];
    }
  }

  const Scan& scan_;
  const DiagonalBlocks& blocks_;
  const int64_t size_, padded_, block_, batch_, together_, begin_;
  const bool is_backward_, is_first_;
  int64_t lengths_[DiagonalBlocks::most_together], ends_[DiagonalBlocks::most_together], count_ = 0, chunk_ = 1;
  Place places_[DiagonalBlocks::most_together];
  // Of the cache, so that no vector is in two of them.
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> memory_;
  // (together, padded): the states, or backward the gradients that are carried to the step before; the second states, or
  // without them the first.
  A *states_, *cells_;
  // Forward: the next states, and the products, (together, gates, padded). Backward, of so many steps that are computed
  // together: the previous states, and the products, which the gradients of the products replace.
  A *others_, *products_;
};

// The batch elements [begin, end) of the part.
template <class A>
static void run_diagonal_block(
    const Scan& scan, const DiagonalBlocks& blocks, const Part& part, int64_t block, int64_t begin, int64_t end,
    bool is_backward, void* totals) {
  const auto run = [&](auto type, auto cell) {
    // In equal parts.
    for (int64_t parts = ceil_div(end - begin, blocks.sequences_together()), last; parts > 0; --parts, begin = last) {
      last = begin + ceil_div(end - begin, parts);
      RecurrentSteps<decltype(type), decltype(cell)> steps(scan, blocks, part, block, begin, last, is_backward);
      is_backward ? steps.backward(static_cast<A*>(totals)) : steps.forward();
    }
  };
  if (scan.cell == mingru::Cell::lstm) return run(A(), LSTMCell());
  with_type<A>(scan.storage, [&](auto type) { run(type, GRUCell()); });
}

}  // namespace mingru::MINGRU_ISA
