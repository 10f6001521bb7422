// The loops over the steps of a GRU or an LSTM, whose features see each other in blocks, or all: the diagonal blocks of its
// recurrent weights. A task has one block of features, of some batch elements.
#pragma once

#include <memory>
#include <optional>
#include <utility>

#include "pair_products.h"
#include "recurrent_cells.h"
#include "register_products.h"

namespace mingru::MINGRU_ISA {

template <class T, class Cell, class Products>
class RecurrentSteps {
  using A = Accumulated<T>;
  using Operand = typename Products::Operand;

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
        is_first_(scan.reverse == is_backward ? part.begin == 0 : part.end == scan.num_steps),
        multiplier_(scan, blocks, block, end - begin) {
    for (int64_t n = 0; n < together_; ++n) {
      lengths_[n] = scan.lengths ? scan.lengths[batch_ + n] : scan.num_steps;
      ends_[n] = least_of(part.end, lengths_[n]);
      if (ends_[n] - begin_ > count_) count_ = ends_[n] - begin_;
    }
    if (is_backward && blocks.rows_together() > 2 * together_) chunk_ = blocks.rows_together() / together_;
    chunk_ = least_of(chunk_, count_);
    const int64_t rows = chunk_ * together_, held = multiplier_.rows_in_memory(together_), all = multiplier_.rows_in_memory(rows);
    const bool has_products = !is_rounded || !is_backward || !scan.sums.data;
    const int64_t of_products = has_products ? all * product_stride_ : 0;
    const int64_t of_states = is_rounded && has_products ? all * state_stride_ : 0;
    const int64_t of_gradients = is_rounded && is_backward ? all * gradient_stride_ : 0;
    const int64_t values = (num_states * held + all) * padded_ + of_products;
    const int64_t of_scratch = is_backward ? Products::scratch_size(blocks, rows) : held * input_stride_;
    const int64_t operands = 2 * of_states + of_gradients + of_scratch;
    memory_.reset(new Line[ceil_div(values * sizeof(A) + operands * sizeof(Operand), sizeof(Line))]);
    states_ = reinterpret_cast<A*>(memory_.get());
    cells_ = states_ + (num_states - 1) * held * padded_;
    others_ = cells_ + held * padded_;
    products_ = others_ + all * padded_;
    if constexpr (is_rounded) {
      rounded_ = reinterpret_cast<Operand*>(products_ + of_products);
      next_rounded_ = rounded_ + of_states;
      gradients_ = next_rounded_ + of_states;
      // What follows the last number of a row must be 0.
      std::memset(rounded_, 0, operands * sizeof(Operand));
    } else {
      gradients_ = products_;
    }
    scratch_ = gradients_ + of_gradients;
    for (int64_t n = 0; n < together_; ++n) set_states(is_first_ ? (is_backward ? scan.grad_last : scan.h) : end_of_pass(), n);
  }

  void forward() {
    [[maybe_unused]] const std::optional<Use> use = use_alone();
    for (int64_t n = 0; n < together_; ++n) round_state(n);
    for (int64_t done = 0; done < count_; ++done) {
      go_to(done);
      for (int64_t n = 0; n < together_; ++n) {
        if (is_mapped()) round_x(n);
        if (!is_reset(n, done)) continue;
        set_states(scan_.initial_state, n);
        round_state(n);
      }
      each(padded_ / group, multiplier_.rows_to_wait_for(together_) * num_gates * group * size_, [&](int64_t begin, int64_t end) {
        const int64_t lanes = multiplier_.lanes_at_once(false), first = begin * group, last = end * group;
        // Each step begins with the weights that the one before read last, which are still in the cache.
        const bool is_reversed = done % 2 != 0;
        for (int64_t own = first; own < last; own += lanes) {
          const int64_t width = least_of(lanes, last - own), from = is_reversed ? first + last - own - width : own, to = from + width;
          const Operand* const x = is_mapped() ? scratch_ : nullptr;
          multiplier_.multiply_states(
              states_to_multiply(), together_, products_, product_stride_, from, to, is_reversed, x, scan_.num_x);
          scan_.sums.data ? advance<true>(from, to) : advance<false>(from, to);
        }
      });
      std::swap(states_, others_);
      std::swap(rounded_, next_rounded_);
    }
    finish();
  }

  // Adds the gradients of the weights, (gates, padded, padded), and of the biases after them, if there are totals.
  void backward(A* totals) {
    for (int64_t first = 0; first < count_; first += chunk_) {
      const int64_t steps = least_of(chunk_, count_ - first), rows = steps * together_;
      std::optional<Use> use = use_alone();
      each(rows, padded_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          read_previous(i % together_, first + i / together_, others_ + i * padded_);
          if (!scan_.sums.data) round_row(rounded_, others_, i, 0, padded_);
        }
      });
      if (!scan_.sums.data) {
        each(padded_ / group, rows * num_gates * group * size_, [&](int64_t begin, int64_t end) {
          const Operand* previous = is_rounded ? rounded_ : reinterpret_cast<Operand*>(others_);
          multiplier_.multiply_states(previous, rows, products_, product_stride_, begin * group, end * group, false);
        });
      }
      // The products of a step need all lanes of its gradients, but the gradients of the step before only their own.
      const int64_t lanes = multiplier_.lanes_at_once(true);
      for (int64_t step = 0; step <= steps; ++step) {
        const int64_t multiplications = step == 0 ? lanes : multiplier_.rows_to_wait_for(together_) * num_gates * lanes * size_;
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
      use.reset();
      if (totals) add_to(totals, rows);
    }
    finish();
  }

 private:
  static constexpr int num_gates = Cell::num_gates, num_states = Cell::num_states;
  static constexpr bool is_rounded = Products::is_rounded;
  using Values = StepValues<A, num_gates>;
  using Use = typename Products::Use;

  // Where a sequence has its values of the present step, in numbers after the first of the block. All inputs, and their
  // gradients, have equal places.
  struct Place {
    bool exists, has_next;
    int64_t input, next_input, out, sum, next_sum, grad_out, next_grad_out, x;
  };

  // Calls f with ranges of [0, count), by several threads if there are enough multiplications.
  template <class F>
  void each(int64_t count, int64_t multiplications, const F& f) const {
    if (!blocks_.parallel_for) return f(0, count);
    const auto run = [&](int64_t begin, int64_t end) {
      const Use use(multiplier_);
      f(begin, end);
    };
    const auto call = [](const void* given, int64_t begin, int64_t end) {
      (*static_cast<const decltype(run)*>(given))(begin, end);
    };
    blocks_.parallel_for(count, ceil_div(multiplications, Products::multiplications_at_once), call, &run);
  }

  std::optional<Use> use_alone() const {
    return blocks_.parallel_for ? std::optional<Use>() : std::optional<Use>(std::in_place, multiplier_);
  }

  A* products_of(int64_t row) const { return products_ + row * product_stride_; }
  Operand* gradients_of(int64_t row) const { return gradients_ + row * gradient_stride_; }
  const Operand* states_to_multiply() const {
    if constexpr (is_rounded) return rounded_;
    else return states_;
  }

  // Rounds features of a row to operands, if these are apart.
  MINGRU_INLINE_MEMBER void round_row(Operand* to, const A* from, int64_t row, int64_t begin, int64_t end) const {
    if constexpr (is_rounded) convert(to + row * state_stride_ + begin, from + row * padded_ + begin, end - begin);
  }
  void round_state(int64_t n) const { round_row(rounded_, states_, n, 0, padded_); }

  // Whether the steps compute the linear map too, of rows of x that are rounded to the memory of operands.
  bool is_mapped() const { return is_rounded && input_stride_ > 0 && !is_backward_; }
  void round_x(int64_t n) const {
    if constexpr (is_rounded) {
      Operand* const to = scratch_ + n * input_stride_;
      const T* const from = data(scan_.x) + places_[n].x;
      for (int64_t i = 0; places_[n].exists && i < scan_.num_x; i += group) round_few<group>(to + i, from + i, scan_.num_x - i);
    }
  }


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
      if (is_mapped()) at.x = scan_.x.index(batch_ + n, position);
      if (at.has_next) at.next_input = index(scan_.inputs[0], n, position_of(n, done + 1));
      if (scan_.sums.data) at.sum = index(scan_.sums, n, position);
      if (scan_.sums.data && at.has_next) at.next_sum = index(scan_.sums, n, position_of(n, done + 1));
      if (is_backward_) at.grad_out = index(scan_.grad_out, n, position);
      if (is_backward_ && at.has_next) at.next_grad_out = index(scan_.grad_out, n, position_of(n, done + 1));
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
    // In tiles, what follows is multiplied by 0.
    if (is_rounded) std::memset(to + size_, 0, (padded_ - size_) * sizeof(A));
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
      if (is_whole(lane)) return row + lane;
    }
    return copy;
  }
  bool is_whole(int64_t lane) const { return lane + group <= size_; }

  // The same with what the row has, and 0 after the last feature of the block.
  MINGRU_INLINE_MEMBER A* get(A* copy, T* row, int64_t lane) const {
    A* const lanes = place(copy, row, lane);
    if (lanes != copy) return lanes;
    is_whole(lane) ? convert(copy, row + lane, group) : load(copy, Rows<const T>{row + lane, 0}, 1, size_ - lane);
    return copy;
  }

  // Writes lanes that may be in their place.
  MINGRU_INLINE_MEMBER void put(T* row, const A* lanes, int64_t lane) const {
    if (!is_whole(lane)) return store(Rows<T>{row + lane, 0}, lanes, 1, size_ - lane);
    if (place(nullptr, row, lane) != lanes) convert(row + lane, lanes, group);
  }

  // Adds the products of a step's gradients with the transposed weights to the gradients that are carried.
  void pass_back(int64_t first, int64_t step, int64_t lane, int64_t last) const {
    multiplier_.pass_back(gradients_of(step * together_), together_, states_, lane, last);
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

  // In the places of the inputs and the sum, or in copies. Inputs that the steps compute are in the products, but for the
  // biases, and apart that of the candidate of a GRU.
  MINGRU_INLINE_MEMBER void read(
      Values& values, const Place& at, int64_t lane, const A* biases = nullptr, const A* apart = nullptr) const {
    if (biases) {
      for (int k = 0; k < num_gates; ++k) values.lanes[k] = const_cast<A*>(biases) + k * padded_;
      for (int k = 0; k <= num_gates; ++k) values.kept[k] = values.copies[k];
      if (num_states > 1) return;
      A* const sum = values.lanes[num_gates - 1] = values.copies[num_gates];
      MINGRU_LANES
      for (int64_t i = 0; i < group; ++i) sum[i] = biases[(num_gates - 1) * padded_ + i] + apart[i];
      return;
    }
    for (int k = 0; k < num_gates; ++k) {
      values.kept[k] = values.lanes[k] = get(values.copies[k], data(scan_.inputs[k]) + at.input, lane);
      // Steps are farther from each other than processors look ahead.
      if (at.has_next) MINGRU_PREFETCH(data(scan_.inputs[k]) + at.next_input + lane);
    }
    A* const copy = values.copies[num_gates];
    if (scan_.sums.data && at.has_next) MINGRU_PREFETCH(data(scan_.sums) + at.next_sum + lane);
    A* const sum = scan_.sums.data ? get(copy, data(scan_.sums) + at.sum, lane) : copy;
    values.kept[num_gates] = values.lanes[num_gates] = sum;
  }

  // Computes features of the next states.
  template <bool is_kept>
  void advance(int64_t begin, int64_t end) const {
    // Not read again from the object after each value that is written.
    const int64_t padded = padded_, size = size_, of_candidate = num_gates * padded;
    const auto* const of_x = static_cast<const A*>(blocks_.input_biases) + block_ * num_gates * padded;
    const bool has_x = is_mapped();
    for (int64_t n = 0; n < together_; ++n) {
      const Place& at = places_[n];
      const A* const state = states_ + n * padded;
      A *const next = others_ + n * padded, *const cell = cells_ + n * padded;
      if (!at.exists) {
        std::memcpy(next + begin, state + begin, (end - begin) * sizeof(A));
        round_row(next_rounded_, others_, n, begin, end);
        continue;
      }
      const A *const products = products_of(n), *const biases = biases_at(0);
      Operand* const rounded = next_rounded_ + n * state_stride_;
      T* const out = data(scan_.out) + at.out;
      for (int64_t lane = begin; lane < end; lane += group) {
        Values values;
        read(values, at, lane, has_x ? of_x + lane : nullptr, products + of_candidate + lane);
        Cell::template activate<is_kept, is_rounded>(
            values, next + lane, state + lane, cell + lane, products + lane, padded, biases + lane);
        if constexpr (is_rounded) convert(rounded + lane, next + lane, group);
        if constexpr (is_rounded && std::is_same_v<T, Operand>) {
          copy_few(out + lane, rounded + lane, least_of(size - lane, group));
        } else {
          put(out, next + lane, lane);
        }
        for (int k = 0; is_kept && k < num_gates; ++k) put(data(scan_.inputs[k]) + at.input, values.kept[k], lane);
        if (is_kept) put(data(scan_.sums) + at.sum, values.kept[num_gates], lane);
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

  // Sets the gradients of a group of a row of products, which may be in their place, and are 0 without the step, and those
  // of the step's inputs.
  void differentiate(int64_t n, int64_t index, int64_t lane) const {
    const Place& at = places_[n];
    Operand* const gradients = gradients_of(index) + lane;
    if (!at.exists) {
      for (int k = 0; k < num_gates; ++k) std::memset(gradients + k * padded_, 0, group * sizeof(Operand));
      return;
    }
    alignas(64) A copies[is_rounded ? num_gates : 1][group];
    A* sums = copies[0];
    if constexpr (!is_rounded) sums = gradients;
    const int64_t stride = is_rounded ? group : padded_;
    const A* before = others_ + index * padded_ + lane;
    Values values;
    alignas(64) A next[group], grad_copy[group], grad_copies[num_gates][group];
    A *const grad = get(grad_copy, data(scan_.grad_out) + at.grad_out, lane), *grads[num_gates];
    if (at.has_next) MINGRU_PREFETCH(data(scan_.grad_out) + at.next_grad_out + lane);
    read(values, at, lane);
    if constexpr (num_states == 1) {
      const A* products = products_of(index) + lane;
      if (!scan_.sums.data) Cell::template activate<true, is_rounded>(values, next, before, next, products, padded_, biases_at(lane));
    }
    for (int k = 0; k < num_gates; ++k) grads[k] = place(grad_copies[k], data(scan_.grad_inputs[k]) + at.input, lane);
    A *const carried = carried_of(n, 0) + lane, *const of_cell = cells_ + n * padded_ + lane;
    Cell::differentiate(values, grads, sums, stride, before, grad, carried, of_cell);
    for (int k = 0; is_rounded && k < num_gates; ++k) convert(gradients + k * padded_, sums + k * stride, group);
    for (int k = 0; k < num_gates; ++k) put(data(scan_.grad_inputs[k]) + at.input, grads[k], lane);
  }

  // Adds the products of the rows of gradients and previous states, and of a GRU the biases of the candidates.
  void add_to(A* totals, int64_t rows) const {
    const auto each_of = [&](int64_t count, int64_t multiplications, const auto& f) { each(count, multiplications, f); };
    multiplier_.add_to(totals, gradients_, others_, rows, scratch_, each_of);
    if (num_states > 1) return;  // all biases of an LSTM are those of its inputs
    A* of_biases = totals + num_gates * padded_ * padded_;
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t lane = 0; lane < padded_; lane += group) {
        A values[group];
        convert(values, gradients_of(k) + 2 * padded_ + lane, group);
        MINGRU_LANES
        for (int64_t i = 0; i < group; ++i) of_biases[lane + i] += values[i];
      }
    }
  }

  const Scan& scan_;
  const DiagonalBlocks& blocks_;
  const int64_t size_, padded_, block_, batch_, together_, begin_;
  const bool is_backward_, is_first_;
  const Products multiplier_;
  int64_t lengths_[DiagonalBlocks::most_together], ends_[DiagonalBlocks::most_together], count_ = 0, chunk_ = 1;
  Place places_[DiagonalBlocks::most_together];
  const int64_t state_stride_ = Products::state_stride(blocks_), gradient_stride_ = Products::gradient_stride(blocks_);
  const int64_t input_stride_ = blocks_.input_weights ? Products::input_stride(scan_.num_x) : 0;
  // With the products of x and the candidates of a GRU.
  const int64_t product_stride_ = (num_gates + (is_mapped() && num_states == 1)) * padded_;
  // Of the cache, so that no vector is in two of them.
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> memory_;
  // (together, padded): the states, or backward the gradients that are carried to the step before; the second states, or
  // without them the first.
  A *states_, *cells_;
  // Forward: the next states, and the products, (together, gates, padded). Backward, of so many steps that are computed
  // together: the previous states, and the products.
  A *others_, *products_;
  // Operands of products: the states and the next states, if rounded, and the gradients of products, (rows, gates,
  // padded), which otherwise replace the products.
  Operand *rounded_ = nullptr, *next_rounded_ = nullptr, *gradients_, *scratch_;
};

}  // namespace mingru::MINGRU_ISA
