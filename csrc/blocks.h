// The loops over the steps of a GRU whose features see each other in blocks. A task has one block of features, of some
// batch elements; the features are lanes, and each weight is loaded once for all batch elements that are computed together.
#pragma once

#include <vector>

#include "lanes.h"

namespace mingru::MINGRU_ISA {

// Lanes of a group of weights in memory, and of a register, which holds a part of it: compilers keep longer vectors in
// memory.
template <class A>
constexpr int64_t width = Blocks::vector_bytes / sizeof(A);
#ifdef MINGRU_AVX512
constexpr int64_t register_bytes = 64;
#elif defined(MINGRU_AVX2)
constexpr int64_t register_bytes = 32;
#else
constexpr int64_t register_bytes = 16;
#endif
template <class A>
constexpr int64_t per_register = register_bytes / sizeof(A);
#ifdef __GNUC__
template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(register_bytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
#else
template <class A>
struct Vector {
  A values[per_register<A>];
  void operator+=(Vector x) {
    for (int64_t i = 0; i < per_register<A>; ++i) values[i] += x.values[i];
  }
  Vector operator*(A x) const {
    Vector product;
    for (int64_t i = 0; i < per_register<A>; ++i) product.values[i] = values[i] * x;
    return product;
  }
};
#endif

template <class T, int64_t together>
class BlockSteps {
  using A = Accumulated<T>;

 public:
  // Of the batch elements [batch, batch + together).
  BlockSteps(const Scan& scan, const Blocks& blocks, const Part& part, int64_t block, int64_t batch, bool is_backward)
      : scan_(scan),
        blocks_(blocks),
        size_(blocks.size),
        padded_(blocks.padded),
        block_(block),
        batch_(batch),
        begin_(part.begin),
        is_backward_(is_backward),
        is_first_(scan.reverse == is_backward ? part.begin == 0 : part.end == scan.num_steps),
        memory_((together + (is_backward ? most_rows : 0)) * (1 + num_gates) * padded_) {
    for (int64_t n = 0; n < together; ++n) {
      lengths_[n] = scan.lengths ? scan.lengths[batch + n] : scan.num_steps;
      ends_[n] = least_of(part.end, lengths_[n]);
      if (ends_[n] - begin_ > count_) count_ = ends_[n] - begin_;
      copy(states_ + n * padded_, is_first_ ? (is_backward ? scan.grad_last : scan.h) : end_of_pass(), n);
    }
  }

  void forward() {
    for (int64_t done = 0; done < count_; ++done) {
      for (int64_t n = 0; n < together; ++n) {
        if (is_reset(n, done)) copy(states_ + n * padded_, scan_.initial_state, n);
      }
      multiply<false>(sums_, states_, blocks_.weights);
      for (int64_t n = 0; n < together; ++n) {
        if (exists(n, done)) advance(n, position_of(n, done));
      }
    }
    finish();
  }

  // Adds the gradients of the weights, (gates, padded, padded), and of the biases after them.
  void backward(A* totals) {
    for (int64_t done = 0; done < count_; ++done) {
      if (num_rows_ + together > most_rows) add_rows(totals);
      A *previous = previous_ + num_rows_ * padded_, *grads = grads_ + num_rows_ * num_gates * padded_;
      std::memset(grads, 0, together * num_gates * padded_ * sizeof(A));
      num_rows_ += together;
      for (int64_t n = 0; n < together; ++n) read_previous(n, done, previous + n * padded_);
      multiply<false>(sums_, previous, blocks_.weights);
      for (int64_t n = 0; n < together; ++n) {
        if (!exists(n, done)) continue;
        differentiate(n, position_of(n, done), previous + n * padded_, grads + n * num_gates * padded_);
      }
      multiply<true>(sums_, grads, blocks_.transposed);
      for (int64_t n = 0; n < together; ++n) {
        if (!exists(n, done)) continue;
        A *carried = states_ + n * padded_, *sum = sums_ + n * num_gates * padded_;
        for (int64_t i = 0; i < size_; ++i) carried[i] += sum[i] + sum[padded_ + i] + sum[2 * padded_ + i];
        if (!is_reset(n, done)) continue;
        A* total = state_of(scan_.grad_initial_state, n);
        for (int64_t i = 0; i < size_; ++i) total[i] += carried[i];
        std::memset(carried, 0, size_ * sizeof(A));
      }
    }
    add_rows(totals);
    finish();
  }

 private:
  static constexpr int64_t num_gates = Blocks::num_gates, most_rows = 64;

  bool exists(int64_t n, int64_t done) const { return begin_ + done < ends_[n]; }

  // The index in time after so many steps of the pass, and its place in memory.
  int64_t step_of(int64_t n, int64_t done) const {
    return scan_.reverse != is_backward_ ? ends_[n] - 1 - done : begin_ + done;
  }
  int64_t place_of(int64_t step) const { return scan_.step_offsets ? scan_.step_offsets[step] : step; }
  int64_t position_of(int64_t n, int64_t done) const { return place_of(step_of(n, done)); }

  bool is_reset(int64_t n, int64_t done) const {
    if (!scan_.reset.data || !exists(n, done)) return false;
    return static_cast<const uint8_t*>(scan_.reset.data)[scan_.reset.index(batch_ + n, position_of(n, done))];
  }

  T* row(const Sequence& sequence, int64_t n, int64_t position) const {
    return static_cast<T*>(sequence.data) + sequence.index(batch_ + n, position) + block_ * size_;
  }

  // Where the state after the pass, or its gradient, is written.
  void* end_of_pass() const { return is_backward_ ? scan_.grad_h : scan_.last; }
  A* state_of(const void* states, int64_t n) const {
    return static_cast<A*>(const_cast<void*>(states)) + (batch_ + n) * scan_.state_stride + block_ * size_;
  }
  void copy(A* to, const void* states, int64_t n) const { std::memcpy(to, state_of(states, n), size_ * sizeof(A)); }
  void finish() const {
    for (int64_t n = 0; n < together; ++n) {
      std::memcpy(state_of(end_of_pass(), n), states_ + n * padded_, size_ * sizeof(A));
    }
  }

  // Lanes of a row, with 0 after the last feature of the block.
  MINGRU_INLINE_MEMBER void get(A* to, const T* row, int64_t lane) const {
    if (std::is_same_v<T, A> && lane + group <= size_) {
      std::memcpy(to, row + lane, group * sizeof(A));
    } else {
      load(to, Rows<const T>{row + lane, 0}, 1, least_of(size_ - lane, group));
    }
  }

  MINGRU_INLINE_MEMBER void put(T* row, const A* from, int64_t lane) const {
    if (std::is_same_v<T, A> && lane + group <= size_) {
      std::memcpy(row + lane, from, group * sizeof(A));
    } else {
      store(Rows<T>{row + lane, 0}, from, 1, least_of(size_ - lane, group));
    }
  }

  // The products of the states, (together, padded), for each gate, (together, gates, padded), with the bias of the
  // candidate's. Transposed, those of the gradients of these products, whose sum is the gradient of the states.
  template <bool is_transposed>
  void multiply(A* to, const A* from, const void* all_weights) const {
    const A* of_block = static_cast<const A*>(all_weights) + block_ * num_gates * size_ * padded_;
    const A* biases = static_cast<const A*>(blocks_.biases) + block_ * padded_;
    for (int64_t lane = 0; lane < padded_; lane += per_register<A>) {
      const int64_t within = lane % width<A>;
      const A* weights = of_block + (lane - within) * num_gates * size_ + within;
      // A sum for each gate, so that the processor does not wait for the addition before.
      Vector<A> sum[together][num_gates] = {};
      for (int64_t n = 0; n < together && !is_transposed; ++n) std::memcpy(&sum[n][2], biases + lane, sizeof(sum[n][2]));
      for (int64_t k = 0; k < size_; ++k) {
        for (int64_t gate = 0; gate < num_gates; ++gate, weights += width<A>) {
          Vector<A> weight;
          std::memcpy(&weight, weights, sizeof(weight));
          for (int64_t n = 0; n < together; ++n) {
            sum[n][gate] += weight * from[(is_transposed ? n * num_gates + gate : n) * padded_ + k];
          }
        }
      }
      for (int64_t n = 0; n < together; ++n) {
        for (int64_t gate = 0; gate < num_gates; ++gate) {
          std::memcpy(to + (n * num_gates + gate) * padded_ + lane, &sum[n][gate], sizeof(sum[n][gate]));
        }
      }
    }
  }

  // Replaces the state by the next one.
  void advance(int64_t n, int64_t position) const {
    for (int64_t lane = 0; lane < padded_; lane += group) {
      A inputs[num_gates][group], h[group], *r = inputs[0], *z = inputs[1], *c = inputs[2];
      for (int k = 0; k < num_gates; ++k) get(inputs[k], row(scan_.inputs[k], n, position), lane);
      const A *r_sum = sums_ + n * num_gates * padded_ + lane, *z_sum = r_sum + padded_, *c_sum = z_sum + padded_;
      A* state = states_ + n * padded_ + lane;
      MINGRU_LANES
      for (int64_t i = 0; i < group; ++i) {
        AtOnce at_once;
        const A open = logistic(r[i] + r_sum[i], at_once).value;
        const Fraction<A> keep = logistic(z[i] + z_sum[i], at_once);
        const A candidate = Tanh().of(c[i] + open * c_sum[i], at_once).value;
        h[i] = next_state(keep, state[i], keep.rest * candidate);
      }
      std::memcpy(state, h, sizeof(h));
      put(row(scan_.out, n, position), h, lane);
    }
  }

  // Reads the state before a step. Of a batch element without the step, it is 0.
  void read_previous(int64_t n, int64_t done, A* to) const {
    if (!exists(n, done)) return static_cast<void>(std::memset(to, 0, padded_ * sizeof(A)));
    const int64_t step = step_of(n, done), before = scan_.reverse ? step + 1 : step - 1;
    if (is_reset(n, done)) return copy(to, scan_.initial_state, n);
    if (before < 0 || before == lengths_[n]) return copy(to, scan_.h, n);
    for (int64_t lane = 0; lane < padded_; lane += group) get(to + lane, row(scan_.out, n, place_of(before)), lane);
  }

  // Writes the gradients of a step's inputs and of its products. The gradient of the state becomes the part of the previous
  // state's gradient that does not pass the weights.
  void differentiate(int64_t n, int64_t position, const A* before, A* grads) const {
    for (int64_t lane = 0; lane < padded_; lane += group) {
      A inputs[num_gates][group], grad[group], *r = inputs[0], *z = inputs[1], *c = inputs[2];
      for (int k = 0; k < num_gates; ++k) get(inputs[k], row(scan_.inputs[k], n, position), lane);
      get(grad, row(scan_.grad_out, n, position), lane);
      const A *r_sum = sums_ + n * num_gates * padded_ + lane, *z_sum = r_sum + padded_, *c_sum = z_sum + padded_;
      A *r_grad = grads + lane, *z_grad = r_grad + padded_, *c_grad = z_grad + padded_;
      A* carried = states_ + n * padded_ + lane;
      MINGRU_LANES
      for (int64_t i = 0; i < group; ++i) {
        AtOnce at_once;
        const Fraction<A> open = logistic(r[i] + r_sum[i], at_once), keep = logistic(z[i] + z_sum[i], at_once);
        const Value<A> candidate = Tanh().of(c[i] + open.value * c_sum[i], at_once);
        const A of_state = grad[i] + carried[i];
        c[i] = of_state * keep.rest * candidate.slope;
        r[i] = r_grad[i] = c[i] * c_sum[i] * open.value * open.rest;
        z[i] = z_grad[i] = of_state * (before[lane + i] - candidate.value) * keep.value * keep.rest;
        c_grad[i] = c[i] * open.value;
        carried[i] = of_state * keep.value;
      }
      for (int k = 0; k < num_gates; ++k) put(row(scan_.grad_inputs[k], n, position), inputs[k], lane);
    }
  }

  // Adds the products of the rows of gradients and previous states, which are sums of sums, because a long sum is less
  // accurate.
  void add_rows(A* totals) {
    constexpr int64_t tile = 8;
    for (int64_t output = 0; output < num_gates * padded_; output += tile) {
      for (int64_t lane = 0; lane < padded_; lane += per_register<A>) {
        Vector<A> sum[tile] = {};
        for (int64_t k = 0; k < num_rows_; ++k) {
          Vector<A> previous;
          std::memcpy(&previous, previous_ + k * padded_ + lane, sizeof(previous));
          for (int64_t i = 0; i < tile; ++i) sum[i] += previous * grads_[k * num_gates * padded_ + output + i];
        }
        for (int64_t i = 0; i < tile; ++i) {
          A part[per_register<A>], *to = totals + (output + i) * padded_ + lane;
          std::memcpy(part, &sum[i], sizeof(part));
          for (int64_t j = 0; j < per_register<A>; ++j) to[j] += part[j];
        }
      }
    }
    for (int64_t k = 0; k < num_rows_; ++k) {
      const A* grads = grads_ + (k * num_gates + 2) * padded_;
      for (int64_t i = 0; i < padded_; ++i) totals[num_gates * padded_ * padded_ + i] += grads[i];
    }
    num_rows_ = 0;
  }

  const Scan& scan_;
  const Blocks& blocks_;
  const int64_t size_, padded_, block_, batch_, begin_;
  const bool is_backward_, is_first_;
  int64_t lengths_[together], ends_[together], count_ = 0, num_rows_ = 0;
  std::vector<A> memory_;
  // The states, or backward the gradients that are carried to the step before, and the products.
  A *const states_ = memory_.data(), *const sums_ = states_ + together * padded_;
  // Of some steps of a backward pass: the previous states, (rows, padded), and the gradients of the products, (rows, gates,
  // padded).
  A *const previous_ = sums_ + together * num_gates * padded_, *const grads_ = previous_ + most_rows * padded_;
};

// The batch elements [begin, end) of the part. Backward, if there are totals.
template <class A>
static void run_block(
    const Scan& scan, const Blocks& blocks, const Part& part, int64_t block, int64_t begin, int64_t end, void* totals) {
  with_type<A>(scan.storage, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto&& steps) { totals ? steps.backward(static_cast<A*>(totals)) : steps.forward(); };
    for (; begin + most_together <= end; begin += most_together) {
      run(BlockSteps<T, most_together>(scan, blocks, part, block, begin, totals));
    }
    for (; begin < end; ++begin) run(BlockSteps<T, 1>(scan, blocks, part, block, begin, totals));
  });
}

}  // namespace mingru::MINGRU_ISA
