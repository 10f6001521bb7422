// The loops over the features of a step, for each cell.
#pragma once

#include <type_traits>

#include "cells.h"
#include "scan.h"

namespace mingru::MINGRU_ISA {

// A loop over lanes, which are independent. If it is unrolled too early, it cannot be vectorized.
#if defined(__clang__)
#define MINGRU_LANES _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define MINGRU_LANES _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#else
#define MINGRU_LANES
#endif

// Values of some steps: those of the first step, and how far those of the next step are from them.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

// Some steps of some groups of features. A lane is a feature, or a pair of features of complex cells.
template <class A>
struct Lanes {
  int64_t steps, groups;
  Bounded<A> time;
  Rows<const A> dt;
  Rows<const A> inputs[most_inputs];
  // Forward: h. Backward: a_{t+1} delta_{t+1}, the part of delta_t that the following step contributes.
  A* state;
  Rows<A> out;  // only forward
  // Only backward.
  Rows<const A> grad_out, previous;
  Rows<A> grads[most_inputs];
  Rows<A> grads_of_dt;  // of timed cells
};

// A block of lanes is computed together. Two groups of pairs fill a vector of 512 bits.
constexpr int64_t most_lanes = 16;

// The features of a block of lanes. Of pairs, the first numbers and then the second numbers are copied, because compilers
// vectorize loops over adjacent values better.
template <class A, bool is_complex>
struct Block {
  alignas(64) A values[is_complex ? 2 * most_lanes : 1];

  template <int64_t size>
  const A* read(const A* features) {
    if constexpr (!is_complex) return features;
    MINGRU_LANES
    for (int64_t i = 0; i < size; ++i) {
      values[i] = features[2 * i];
      values[most_lanes + i] = features[2 * i + 1];
    }
    return values;
  }

  A* place(A* features) { return is_complex ? values : features; }

  template <int64_t size>
  void write(A* features) const {
    if constexpr (!is_complex) return;
    MINGRU_LANES
    for (int64_t i = 0; i < size; ++i) {
      features[2 * i] = values[i];
      features[2 * i + 1] = values[most_lanes + i];
    }
  }
};

template <bool is_complex, class A>
MINGRU_INLINE auto number(const A* block, int64_t lane) {
  if constexpr (is_complex) {
    return Complex<A>{block[lane], block[most_lanes + lane]};
  } else {
    return block[lane];
  }
}

template <class A>
MINGRU_INLINE void set_number(A* block, int64_t lane, A x) {
  block[lane] = x;
}

template <class A>
MINGRU_INLINE void set_number(A* block, int64_t lane, Complex<A> x) {
  block[lane] = x.re;
  block[most_lanes + lane] = x.im;
}

template <class T>
MINGRU_INLINE void to_next_step(Rows<T>& rows) {
  rows.data += rows.stride;
}

template <class Cell, int num_inputs, class OfStep, class A>
struct Forward {
  using Time = OfStep;
  static constexpr bool is_complex = Cell::is_complex;
  static constexpr int numbers = is_complex ? 2 : 1, count = numbers * num_inputs;

  template <int64_t size>
  MINGRU_INLINE void block(const Lanes<A>& lanes, const Time& time, int64_t feature) {
    Block<A, is_complex> inputs[num_inputs], state;
    const A* from[num_inputs];
    for (int k = 0; k < num_inputs; ++k) from[k] = inputs[k].template read<size>(lanes.inputs[k].data + feature);
    const A* h = state.template read<size>(lanes.state + feature);
    A *next_h = state.place(lanes.state + feature), *out = lanes.out.data + feature;
    MINGRU_LANES
    for (int64_t i = 0; i < size; ++i) {
      A x[count];
      for (int k = 0; k < count; ++k) x[k] = from[k / numbers][k % numbers * most_lanes + i];
      const auto step = Cell::step(x, time);
      const auto next = step.a * number<is_complex>(h, i) + step.b;
      set_number(next_h, i, next);
      if constexpr (!is_complex) out[i] = next;
    }
    state.template write<size>(lanes.state + feature);
    state.template write<size>(out);
  }

  MINGRU_INLINE void next(Lanes<A>& lanes) {
    for (int k = 0; k < num_inputs; ++k) to_next_step(lanes.inputs[k]);
    to_next_step(lanes.out);
  }
};

// From delta = dL/dh_t.
template <class Number, class Scale, class OfA, class OfB>
MINGRU_INLINE auto gradient(Number delta, Number previous, const Partial<Scale, OfA, OfB>& by) {
  return by.scale * dot(delta, previous * by.a + by.b);
}

template <class Number, class First, class Second>
MINGRU_INLINE auto gradient(Number delta, Number previous, const Sum<First, Second>& by) {
  return gradient(delta, previous, by.first) + gradient(delta, previous, by.second);
}

// Computes the first `count` gradients.
template <int count, class Number, class A, class First, class... Rest>
MINGRU_INLINE void gradients(Number delta, Number previous, const List<First, Rest...>& partials, A* grads) {
  grads[0] = gradient(delta, previous, partials.first);
  if constexpr (count > 1) gradients<count - 1>(delta, previous, partials.rest, grads + 1);
}

template <class Cell, int num_inputs, class OfStep, class A>
struct Backward {
  using Time = OfStep;
  static constexpr bool is_complex = Cell::is_complex, is_timed = !std::is_same_v<Time, Untimed<A>>;
  static constexpr int numbers = is_complex ? 2 : 1, count = numbers * num_inputs;

  template <int64_t size>
  MINGRU_INLINE void block(const Lanes<A>& lanes, const Time& time, int64_t feature) {
    Block<A, is_complex> inputs[num_inputs], grad_out_block, previous_block, state, grad_blocks[num_inputs];
    const A* from[num_inputs];
    A* to[num_inputs];
    for (int k = 0; k < num_inputs; ++k) {
      from[k] = inputs[k].template read<size>(lanes.inputs[k].data + feature);
      to[k] = grad_blocks[k].place(lanes.grads[k].data + feature);
    }
    const A* grad_out = grad_out_block.template read<size>(lanes.grad_out.data + feature);
    const A* previous = previous_block.template read<size>(lanes.previous.data + feature);
    const A* carry = state.template read<size>(lanes.state + feature);
    A *next_carry = state.place(lanes.state + feature), *grads_of_dt = lanes.grads_of_dt.data + feature / numbers;
    MINGRU_LANES
    for (int64_t i = 0; i < size; ++i) {
      A x[count], grads[count + 1];
      for (int k = 0; k < count; ++k) x[k] = from[k / numbers][k % numbers * most_lanes + i];
      const auto step = Cell::step(x, time);
      const auto delta = number<is_complex>(grad_out, i) + number<is_complex>(carry, i);
      gradients<is_timed ? count + 1 : count>(delta, number<is_complex>(previous, i), step.partials, grads);
      for (int k = 0; k < count; ++k) to[k / numbers][k % numbers * most_lanes + i] = grads[k];
      if constexpr (is_timed) grads_of_dt[i] = grads[count];
      set_number(next_carry, i, conjugate(step.a) * delta);
    }
    for (int k = 0; k < num_inputs; ++k) grad_blocks[k].template write<size>(lanes.grads[k].data + feature);
    state.template write<size>(lanes.state + feature);
  }

  MINGRU_INLINE void next(Lanes<A>& lanes) {
    for (int k = 0; k < num_inputs; ++k) {
      to_next_step(lanes.inputs[k]);
      to_next_step(lanes.grads[k]);
    }
    to_next_step(lanes.grad_out);
    to_next_step(lanes.previous);
    to_next_step(lanes.grads_of_dt);
  }
};

// With an infinite elapsed time, see `decay`.
template <class A>
MINGRU_INLINE void set_time(Timed<A>& time, A dt) {
  const bool is_endless = dt == Format<A>::infinity;
  time.dt = is_endless ? A(1) : dt;
  time.endless_above = is_endless ? -Format<A>::infinity : Format<A>::infinity;
}

template <class A>
MINGRU_INLINE void set_time(Untimed<A>&, A) {}

template <class Pass, class A>
static void run_lanes(const Lanes<A>& given) {
  constexpr int64_t together = most_lanes * Pass::numbers;
  const int64_t features = given.groups * group;
  Lanes<A> lanes = given;  // a copy, to which nothing else points
  typename Pass::Time time = lanes.time;
  for (int64_t step = 0; step < lanes.steps; ++step) {
    set_time(time, lanes.dt.data[step * lanes.dt.stride]);
    int64_t feature = 0;
    for (; feature + together <= features; feature += together) {
      Pass::template block<most_lanes>(lanes, time, feature);
    }
    if (together > group && feature < features) Pass::template block<most_lanes / 2>(lanes, time, feature);
    Pass::next(lanes);
  }
}

// The loops of a cell.
template <class A>
struct Loops {
  int num_inputs;
  bool is_complex, is_timed;
  void (*forward)(const Lanes<A>&);
  void (*backward)(const Lanes<A>&);
};

template <class A, class Cell, int num_inputs, class Time>
constexpr Loops<A> loops_in_time = {
    num_inputs, Cell::is_complex, !std::is_same_v<Time, Untimed<A>>, run_lanes<Forward<Cell, num_inputs, Time, A>, A>,
    run_lanes<Backward<Cell, num_inputs, Time, A>, A>};

template <class A, class Cell, int num_inputs, bool takes_time>
static Loops<A> loops_of(const Scan& scan) {
  if constexpr (takes_time) {
    if (scan.is_bounded) return loops_in_time<A, Cell, num_inputs, Bounded<A>>;
    if (scan.dt) return loops_in_time<A, Cell, num_inputs, Timed<A>>;
  }
  return loops_in_time<A, Cell, num_inputs, Untimed<A>>;
}

template <class A, template <class> class Cell, int num_inputs, bool takes_time>
static Loops<A> loops_of(const Scan& scan) {
  switch (scan.activation) {
    case Activation::positive: return loops_of<A, Cell<Positive>, num_inputs, takes_time>(scan);
    case Activation::linear: return loops_of<A, Cell<Linear>, num_inputs, takes_time>(scan);
    case Activation::tanh: return loops_of<A, Cell<Tanh>, num_inputs, takes_time>(scan);
  }
  return {};
}

template <class A>
static Loops<A> loops_of(const Scan& scan) {
#define MINGRU_CASE(name, num_inputs, takes_time, type) \
  case Cell::name: return loops_of<A, type, num_inputs, takes_time>(scan);
  switch (scan.cell) { MINGRU_CELLS(MINGRU_CASE) }
#undef MINGRU_CASE
  return {};
}

}  // namespace mingru::MINGRU_ISA
