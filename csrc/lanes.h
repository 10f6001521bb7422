// The loops over the features of a step, for each cell.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "cells.h"
#include "convert.h"

namespace mingru::MINGRU_ISA {

// Some steps of some groups of features. A lane is a number: a feature, or two or four features.
template <class A>
struct Lanes {
  const Scan* scan;
  int64_t feature;  // the first of the lanes, counted in the scan
  int64_t steps, groups;
  Rows<const A> dt;
  // The inputs and, only backward, the gradient of the states and the previous states.
  Rows<const A> read[most_inputs + 2];
  // Forward: h. Backward: a_{t+1} delta_{t+1}, the part of delta_t that the following step contributes.
  A* state;
  Rows<A> written[most_inputs];  // forward: the states; backward: the gradients of the inputs
  Rows<A> grads_of_dt;           // the sums of all groups of the scan; null if not needed
};

// Lanes that are computed together: see `Memo`. Two groups of pairs fill a vector of 512 bits.
#ifdef MINGRU_AVX512
constexpr bool is_split = false;
constexpr int64_t most_lanes = 16;
#else
constexpr bool is_split = true;
constexpr int64_t most_lanes = 64;
#endif

// The most values that a cell may mark, if the loop over lanes is split.
constexpr int most_values = 14;

// The loop over the lanes of a strip may be split. Exponentials are long chains of operations that wait for each other, so
// a processor must work on those of many lanes at the same time, and it sees only some hundred instructions at once.
// Loops of their own first compute the values that cells mark with 0, the exponentials, and then those marked with 1, the
// rates of timed cells, which need others. Processors with AVX-512 see enough instructions.
template <int stage, bool with_slopes, class A>
struct Memo {
  A (*values)[most_lanes];
  int64_t lane;
  int count = 0;

  MINGRU_INLINE_MEMBER A operator()(int computed_in, A value) {
    if constexpr (!is_split) return value;
    if (count == most_values) std::abort();  // never: compilers leave this out, because all counts are constants
    A& stored = values[count++][lane];
    if (computed_in == stage) stored = value;
    return computed_in < stage ? stored : value;
  }

  // Slopes are only used backward.
  MINGRU_INLINE_MEMBER Value<A> operator()(int computed_in, const Value<A>& f) {
    return {(*this)(computed_in, f.value), with_slopes ? (*this)(computed_in, f.slope) : f.slope};
  }

  // A pair of values.
  template <template <class> class Two>
  MINGRU_INLINE_MEMBER Two<A> operator()(int computed_in, const Two<A>& pair) {
    const auto [first, second] = pair;
    return {(*this)(computed_in, first), (*this)(computed_in, second)};
  }
};

// The features of a strip of lanes. The first parts of all numbers are copied, then the second ones, and so on, because
// compilers vectorize loops over adjacent values better.
template <class A, int parts>
struct Strip {
  alignas(64) A values[parts > 1 ? parts * most_lanes : 1];

  template <int64_t width>
  const A* read(const A* features, int64_t size) {
    if constexpr (parts == 1) return features;
    for (int64_t first = 0; first < size; first += width) {
      MINGRU_LANES
      for (int64_t i = first; i < first + width; ++i) {
        for (int k = 0; k < parts; ++k) values[k * most_lanes + i] = features[parts * i + k];
      }
    }
    return values;
  }

  A* place(A* features) { return parts > 1 ? values : features; }

  template <int64_t width>
  void write(A* features, int64_t size) const {
    if constexpr (parts == 1) return;
    for (int64_t first = 0; first < size; first += width) {
      MINGRU_LANES
      for (int64_t i = first; i < first + width; ++i) {
        for (int k = 0; k < parts; ++k) features[parts * i + k] = values[k * most_lanes + i];
      }
    }
  }
};

// A step of a cell, forward or backward.
template <class Cell, int num_inputs, class OfStep, bool is_backward>
struct Pass {
  using Time = OfStep;
  using A = typename Time::Accumulation;
  using Number = typename Cell::template Number<A>;
  static constexpr bool is_timed = !std::is_same_v<Time, Untimed<A>>;
  static constexpr int parts = sizeof(Number) / sizeof(A), count = parts * num_inputs;
  static constexpr int num_read = is_backward ? num_inputs + 2 : num_inputs, num_written = is_backward ? num_inputs : 1;
  static constexpr int64_t per_group = group / parts;
  static constexpr int last_stage = is_timed ? 2 : 1;
  using Values = A[is_split ? most_values : 1][most_lanes];

  MINGRU_INLINE void load(A* x, const A* const* from, int64_t lane) {
    for (int k = 0; k < count; ++k) x[k] = from[k / parts][k % parts * most_lanes + lane];
  }

  template <int64_t width, int stage = 0>
  MINGRU_INLINE void compute_ahead(Values& values, const A* const* from, const Time& time, int64_t size) {
    if constexpr (is_split && stage < last_stage) {
      for (int64_t first = 0; first < size; first += width) {
        MINGRU_LANES
        for (int64_t i = first; i < first + width; ++i) {
          A x[count];
          load(x, from, i);
          Memo<stage, is_backward, A> memo = {values, i};
          Cell::step(x, time, Number(), Number(), memo);
        }
      }
      compute_ahead<width, stage + 1>(values, from, time, size);
    }
  }

  template <int64_t width>
  MINGRU_INLINE void run_strip(const Lanes<A>& lanes, const Time& time, int64_t feature, int64_t size) {
    Strip<A, parts> read[num_read], written[num_written], state;
    const A* from[num_read];
    A* to[num_written];
    for (int k = 0; k < num_read; ++k) from[k] = read[k].template read<width>(lanes.read[k].data + feature, size);
    for (int k = 0; k < num_written; ++k) to[k] = written[k].place(lanes.written[k].data + feature);
    const A* carry = state.template read<width>(lanes.state + feature, size);
    A* next_carry = state.place(lanes.state + feature);
    A grads_of_dt[most_lanes];
    Values values;
    compute_ahead<width>(values, from, time, size);
    for (int64_t first = 0; first < size; first += width) {
      MINGRU_LANES
      for (int64_t i = first; i < first + width; ++i) {
        A x[count];
        load(x, from, i);
        Memo<last_stage, is_backward, A> memo = {values, i};
        const Number carried = number_at<Number, most_lanes>(carry + i);
        if constexpr (is_backward) {
          const Number grad_out = number_at<Number, most_lanes>(from[num_inputs] + i);
          const Number previous = number_at<Number, most_lanes>(from[num_inputs + 1] + i);
          const auto step = Cell::step(x, time, previous, grad_out + carried, memo);
          for (int k = 0; k < count; ++k) to[k / parts][k % parts * most_lanes + i] = step.grads[k];
          if constexpr (is_timed) grads_of_dt[i] = step.grads[count];
          set_number<most_lanes>(next_carry + i, previous_gradient(step.a, carried, grad_out));
        } else {
          const auto step = Cell::step(x, time, Number(), Number(), memo);
          const Number next = next_state(step.a, carried, step.b);
          set_number<most_lanes>(next_carry + i, next);
          set_number<most_lanes>(to[0] + i, next);
        }
      }
    }
    for (int k = 0; k < num_written; ++k) written[k].template write<width>(lanes.written[k].data + feature, size);
    state.template write<width>(lanes.state + feature, size);
    if (is_backward && is_timed && lanes.grads_of_dt.data) {
      A* sums = lanes.grads_of_dt.data + (lanes.feature + feature) / group;
      for (int64_t first = 0; first < size; first += per_group) {
        A sum = 0;
        for (int64_t i = first; i < first + per_group; ++i) sum += grads_of_dt[i];
        *sums++ = sum;
      }
    }
  }
};

// A strip consists of loops of constant width, so that none needs code for a rest of lanes. The rest has narrower loops.
template <class Pass, int64_t width, class A = typename Pass::A>
MINGRU_INLINE void run_strips(const Lanes<A>& lanes, const typename Pass::Time& time, int64_t lane, int64_t count) {
  constexpr int64_t most = is_split ? most_lanes / Pass::parts : width;
  while (lane + width <= count) {
    const int64_t size = least_of((count - lane) / width * width, most);
    Pass::template run_strip<width>(lanes, time, lane * Pass::parts, size);
    lane += size;
  }
  if constexpr (width > Pass::per_group) run_strips<Pass, width / 2>(lanes, time, lane, count);
}

template <class Pass, class A = typename Pass::A>
static void run_lanes(const Lanes<A>& given) {
  constexpr int64_t least = Pass::per_group < 8 ? 8 : Pass::per_group, width = is_split ? least : most_lanes;
  Lanes<A> lanes = given;  // a copy, to which nothing else points
  typename Pass::Time time{};
  if constexpr (std::is_same_v<typename Pass::Time, Bounded<A>>) {
    time.log_bound = static_cast<A>(lanes.scan->log_bound);
    time.log_range = static_cast<A>(lanes.scan->log_range);
  }
  for (int64_t step = 0; step < lanes.steps; ++step) {
    if constexpr (Pass::is_timed) {
      const A dt = lanes.dt.data[step * lanes.dt.stride];
      const bool is_endless = dt == Format<A>::infinity;  // see `rate_at`
      time.dt = is_endless ? A(1) : dt;
      time.endless_above = is_endless ? -Format<A>::infinity : Format<A>::infinity;
    }
    run_strips<Pass, width>(lanes, time, 0, lanes.groups * Pass::per_group);
    for (int k = 0; k < Pass::num_read; ++k) lanes.read[k].data += lanes.read[k].stride;
    for (int k = 0; k < Pass::num_written; ++k) lanes.written[k].data += lanes.written[k].stride;
    lanes.grads_of_dt.data += lanes.grads_of_dt.stride;
  }
}

// The loops of a cell, forward and backward.
template <class A>
struct Loops {
  int num_inputs;
  void (*run[2])(const Lanes<A>&);
};

template <class Cell, int num_inputs, class Time>
constexpr Loops<typename Time::Accumulation> loops_in_time = {
    num_inputs, {run_lanes<Pass<Cell, num_inputs, Time, false>>, run_lanes<Pass<Cell, num_inputs, Time, true>>}};

// In place of a cell whose features depend on each other; see recurrent_steps.h.
struct WithoutLanes {};
template <int num_inputs, class Time>
constexpr Loops<typename Time::Accumulation> loops_in_time<WithoutLanes, num_inputs, Time> = {};

template <class A, class Cell, int num_inputs, bool takes_time>
static Loops<A> loops_of(const Scan& scan) {
  if constexpr (takes_time) {
    if (scan.log_bound < 0) return loops_in_time<Cell, num_inputs, Bounded<A>>;
    if (scan.dt.data) return loops_in_time<Cell, num_inputs, Timed<A>>;
  }
  return loops_in_time<Cell, num_inputs, Untimed<A>>;
}

template <class A, template <class> class Cell, int num_inputs, bool takes_time>
static Loops<A> loops_of(const Scan& scan) {
  switch (scan.activation) {
    case Activation::positive: return loops_of<A, Cell<Positive>, num_inputs, takes_time>(scan);
    case Activation::linear: return loops_of<A, Cell<Linear>, num_inputs, takes_time>(scan);
    case Activation::tanh: return loops_of<A, Cell<Tanh>, num_inputs, takes_time>(scan);
    case Activation::count: break;
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
