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

// Lanes that are computed together: see `Memo`. Two groups of pairs fill a vector of 512 bits.
#ifdef MINGRU_AVX512
constexpr bool is_split = false;
constexpr int64_t most_lanes = 16;
#else
constexpr bool is_split = true;
constexpr int64_t most_lanes = 64;
#endif

// The loop over the lanes of a block may be split. Exponentials are long chains of operations that wait for each other, so
// a processor must work on those of many lanes at the same time, and it sees only some hundred instructions at once.
// Loops of their own first compute the values that cells mark with 0, the exponentials, and then those marked with 1, the
// rates of timed cells, which need others. Processors with AVX-512 see enough instructions.
template <int stage, bool with_slopes, class A>
struct Memo {
  A (*values)[most_lanes];
  int64_t lane;
  int count = 0;

  MINGRU_INLINE_MEMBER A operator()(int computed_in, A value) {
    A& stored = values[count++][lane];
    if (computed_in == stage) stored = value;
    return computed_in < stage ? stored : value;
  }

  // Slopes are only used backward.
  MINGRU_INLINE_MEMBER Value<A> operator()(int computed_in, const Value<A>& f) {
    const A value = (*this)(computed_in, f.value);
    return {value, with_slopes ? (*this)(computed_in, f.slope) : f.slope};
  }

  // A pair of values.
  template <template <class> class Pair>
  MINGRU_INLINE_MEMBER Pair<A> operator()(int computed_in, const Pair<A>& pair) {
    const auto [first, second] = pair;
    const A first_value = (*this)(computed_in, first);
    return {first_value, (*this)(computed_in, second)};
  }
};

// The values that are computed ahead, if the loop is split.
template <class Cell, class Time, bool with_slopes, class A>
struct Ahead {
  static constexpr bool is_timed = !std::is_same_v<Time, Untimed<A>>;
  static constexpr int last_stage = !is_split ? 0 : is_timed ? 2 : 1;
  static constexpr int most_values = 12;  // that a cell marks

  A values[is_split ? most_values : 1][most_lanes];

  template <int64_t chunk, int count, int stage = 0>
  MINGRU_INLINE_MEMBER void compute(const A* const* inputs, const Time& time, int64_t size) {
    if constexpr (stage < last_stage) {
      for (int64_t first = 0; first < size; first += chunk) {
        MINGRU_LANES
        for (int64_t i = 0; i < chunk; ++i) {
          A x[count];
          for (int k = 0; k < count; ++k) x[k] = inputs[k][first + i];
          Memo<stage, with_slopes, A> memo = {values, first + i};
          Cell::step(x, time, memo);
        }
      }
      compute<chunk, count, stage + 1>(inputs, time, size);
    }
  }

  auto at(int64_t lane) {
    if constexpr (is_split) {
      return Memo<last_stage, with_slopes, A>{values, lane};
    } else {
      return AtOnce{};
    }
  }
};

// The features of a block of lanes. Of pairs, the first numbers and then the second numbers are copied, because compilers
// vectorize loops over adjacent values better.
template <class A, bool is_complex>
struct Block {
  alignas(64) A values[is_complex ? 2 * most_lanes : 1];

  template <int64_t chunk>
  const A* read(const A* features, int64_t size) {
    if constexpr (!is_complex) return features;
    for (int64_t first = 0; first < size; first += chunk) {
      MINGRU_LANES
      for (int64_t i = first; i < first + chunk; ++i) {
        values[i] = features[2 * i];
        values[most_lanes + i] = features[2 * i + 1];
      }
    }
    return values;
  }

  A* place(A* features) { return is_complex ? values : features; }

  template <int64_t chunk>
  void write(A* features, int64_t size) const {
    if constexpr (!is_complex) return;
    for (int64_t first = 0; first < size; first += chunk) {
      MINGRU_LANES
      for (int64_t i = first; i < first + chunk; ++i) {
        features[2 * i] = values[i];
        features[2 * i + 1] = values[most_lanes + i];
      }
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

  template <int64_t chunk>
  MINGRU_INLINE void block(const Lanes<A>& lanes, const Time& time, int64_t feature, int64_t size) {
    Block<A, is_complex> inputs[num_inputs], state;
    const A* from[count];
    for (int k = 0; k < num_inputs; ++k) {
      from[numbers * k] = inputs[k].template read<chunk>(lanes.inputs[k].data + feature, size);
      if (is_complex) from[numbers * k + 1] = from[numbers * k] + most_lanes;
    }
    const A* h = state.template read<chunk>(lanes.state + feature, size);
    A *next_h = state.place(lanes.state + feature), *out = lanes.out.data + feature;
    Ahead<Cell, Time, false, A> ahead;
    ahead.template compute<chunk, count>(from, time, size);
    for (int64_t first = 0; first < size; first += chunk) {
      MINGRU_LANES
      for (int64_t i = first; i < first + chunk; ++i) {
        A x[count];
        for (int k = 0; k < count; ++k) x[k] = from[k][i];
        auto memo = ahead.at(i);
        const auto step = Cell::step(x, time, memo);
        const auto next = step.a * number<is_complex>(h, i) + step.b;
        set_number(next_h, i, next);
        if constexpr (!is_complex) out[i] = next;
      }
    }
    state.template write<chunk>(lanes.state + feature, size);
    state.template write<chunk>(out, size);
  }

  MINGRU_INLINE void next(Lanes<A>& lanes) {
    for (int k = 0; k < num_inputs; ++k) to_next_step(lanes.inputs[k]);
    to_next_step(lanes.out);
  }
};

// The gradient of a number, from delta = dL/dh_t.
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

  template <int64_t chunk>
  MINGRU_INLINE void block(const Lanes<A>& lanes, const Time& time, int64_t feature, int64_t size) {
    Block<A, is_complex> inputs[num_inputs], grad_out_block, previous_block, state, grad_blocks[num_inputs];
    const A* from[count];
    A* to[count];
    for (int k = 0; k < num_inputs; ++k) {
      from[numbers * k] = inputs[k].template read<chunk>(lanes.inputs[k].data + feature, size);
      to[numbers * k] = grad_blocks[k].place(lanes.grads[k].data + feature);
      if (is_complex) from[numbers * k + 1] = from[numbers * k] + most_lanes;
      if (is_complex) to[numbers * k + 1] = to[numbers * k] + most_lanes;
    }
    const A* grad_out = grad_out_block.template read<chunk>(lanes.grad_out.data + feature, size);
    const A* previous = previous_block.template read<chunk>(lanes.previous.data + feature, size);
    const A* carry = state.template read<chunk>(lanes.state + feature, size);
    A *next_carry = state.place(lanes.state + feature), *grads_of_dt = lanes.grads_of_dt.data + feature / numbers;
    Ahead<Cell, Time, true, A> ahead;
    ahead.template compute<chunk, count>(from, time, size);
    for (int64_t first = 0; first < size; first += chunk) {
      MINGRU_LANES
      for (int64_t i = first; i < first + chunk; ++i) {
        A x[count], grads[count + 1];
        for (int k = 0; k < count; ++k) x[k] = from[k][i];
        auto memo = ahead.at(i);
        const auto step = Cell::step(x, time, memo);
        const auto delta = number<is_complex>(grad_out, i) + number<is_complex>(carry, i);
        gradients<is_timed ? count + 1 : count>(delta, number<is_complex>(previous, i), step.partials, grads);
        for (int k = 0; k < count; ++k) to[k][i] = grads[k];
        if constexpr (is_timed) grads_of_dt[i] = grads[count];
        set_number(next_carry, i, conjugate(step.a) * delta);
      }
    }
    for (int k = 0; k < num_inputs; ++k) grad_blocks[k].template write<chunk>(lanes.grads[k].data + feature, size);
    state.template write<chunk>(lanes.state + feature, size);
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

// For an infinite elapsed time, see `rate_at`.
template <class A>
MINGRU_INLINE void set_time(Timed<A>& time, A dt) {
  const bool is_endless = dt == Format<A>::infinity;
  time.dt = is_endless ? A(1) : dt;
  time.endless_above = is_endless ? -Format<A>::infinity : Format<A>::infinity;
}

template <class A>
MINGRU_INLINE void set_time(Untimed<A>&, A) {}

// Blocks consist of chunks of constant size, so that no loop needs code for a rest of lanes.
template <class Pass, class A>
static void run_lanes(const Lanes<A>& given) {
  constexpr int64_t per_group = group / Pass::numbers, chunk = is_split ? per_group : most_lanes;
  constexpr int64_t most = most_lanes / Pass::numbers;
  const int64_t count = given.groups * per_group;
  Lanes<A> lanes = given;  // a copy, to which nothing else points
  typename Pass::Time time = lanes.time;
  for (int64_t step = 0; step < lanes.steps; ++step) {
    set_time(time, lanes.dt.data[step * lanes.dt.stride]);
    int64_t lane = 0;
    while (lane + chunk <= count) {
      int64_t size = chunk;
      if (is_split) size = count - lane < most ? count - lane : most;
      Pass::template block<chunk>(lanes, time, lane * Pass::numbers, size);
      lane += size;
    }
    if (chunk > per_group && lane < count) {
      Pass::template block<per_group>(lanes, time, lane * Pass::numbers, per_group);
    }
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
