// The loops over the steps, compiled once for each instruction set (kernels_*.cpp). `in_` and `out_` are the prefixes of
// pointers to features that are read and written.
#pragma once

#include <type_traits>

#include "cells.h"
#include "convert.h"
#include "scan.h"

namespace mingru::MINGRU_ISA {

template <class T>
struct Accumulation {
  using Type = float;
};
template <>
struct Accumulation<double> {
  using Type = double;
};

// The last features of a step if they are fewer than a group: padded with 0 when read, cropped when written.
template <class T>
struct Rest {
  T features[group];

  const T* in(const T* in_features, int64_t count) {
    std::memset(features, 0, sizeof(features));
    std::memcpy(features, in_features, count * sizeof(T));
    return features;
  }
};

template <class T>
MINGRU_INLINE T* features_at(const Sequence& sequence, int64_t batch, int64_t position, int64_t feature) {
  const int64_t first = sequence.batch_offsets ? sequence.batch_offsets[batch] : batch * sequence.batch_stride;
  const int64_t at = first + position * sequence.step_stride + feature;
  return static_cast<T*>(sequence.data) + (at - sequence.skipped);
}

// The index of a step in the dimension of time, or in packed data.
MINGRU_INLINE int64_t position_of(const Scan& scan, int64_t step) {
  return scan.step_offsets ? scan.step_offsets[step] : step;
}

MINGRU_INLINE bool is_reset(const Scan& scan, int64_t batch, int64_t position) {
  return scan.reset && scan.reset[batch * scan.reset_batch_stride + position * scan.reset_step_stride];
}

// The sums of the gradients of dt over each group of features, or null.
template <class A>
MINGRU_INLINE A* grads_of_dt_at(const Scan& scan, int64_t batch, int64_t position, int64_t feature) {
  if (!scan.grads_of_dt) return nullptr;
  const int64_t at = batch * scan.grads_of_dt_batch_stride + position * scan.grads_of_dt_step_stride;
  return static_cast<A*>(scan.grads_of_dt) + at + feature / group;
}

// Records the state. If `stop_at_match`, returns true if it equals the state that was recorded before.
template <class A>
static bool record(const Span& span, int64_t done, const A* state, int64_t padded) {
  A* recorded = static_cast<A*>(span.checkpoints) + (done / steps_per_checkpoint - 1) * padded;
  if (span.stop_at_match && std::memcmp(recorded, state, padded * sizeof(A)) == 0) return true;
  std::memcpy(recorded, state, padded * sizeof(A));
  return false;
}

// The time of a step, for timed cells.
template <bool is_bounded, class A>
MINGRU_INLINE Time<A, is_bounded> time_of(const Scan& scan, int64_t batch, int64_t position) {
  const A* dt = static_cast<const A*>(scan.dt);
  const A elapsed = dt ? dt[batch * scan.dt_batch_stride + position * scan.dt_step_stride] : A(1);
  return {elapsed, static_cast<A>(scan.log_bound), static_cast<A>(scan.log_range)};
}

template <class A>
MINGRU_INLINE A sum_of(const A* values, int64_t count) {
  A sum = A(0);
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

// The number of groups that are computed together: see `prepare` in cells.h. Processors with AVX-512 see enough
// instructions at once to compute group after group. Two groups of pairs fill a vector of 512 bits.
template <class Cell>
#ifdef MINGRU_AVX512
constexpr int64_t most_groups = Cell::is_complex ? 2 : 1;
#else
constexpr int64_t most_groups = 4;
#endif

// A lane is a feature, or a pair of features of complex cells.
template <class Cell>
constexpr int64_t lanes_per_group = Cell::is_complex ? group / 2 : group;

template <class Cell>
constexpr int64_t most_lanes = most_groups<Cell> * lanes_per_group<Cell>;

template <class Cell>
constexpr int values_per_lane = Cell::is_complex ? 2 * Cell::num_inputs : Cell::num_inputs;

// A loop over lanes, which are independent. If it is unrolled too early, it cannot be vectorized.
#if defined(__clang__)
#define MINGRU_LANES _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define MINGRU_LANES _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#else
#define MINGRU_LANES
#endif

// The inputs of a lane.
template <int count, bool biased, class Inputs, class Biases, class A>
MINGRU_INLINE void load(const Inputs& inputs, const Biases& biases, int64_t lane, A* x) {
  for (int k = 0; k < count; ++k) {
    x[k] = static_cast<A>(inputs[k][lane]);
    if constexpr (biased) x[k] += biases[k][lane];
  }
}

// Separates pairs, because compilers vectorize loops over adjacent values better.
template <bool biased, class T, class A>
MINGRU_INLINE void load_parts(const T* in_features, const A* in_bias, int64_t pairs, A* first, A* second) {
  MINGRU_LANES
  for (int64_t i = 0; i < pairs; ++i) {
    first[i] = static_cast<A>(in_features[2 * i]);
    second[i] = static_cast<A>(in_features[2 * i + 1]);
    if constexpr (biased) {
      first[i] += in_bias[2 * i];
      second[i] += in_bias[2 * i + 1];
    }
  }
}

template <class A, class T>
MINGRU_INLINE void store_parts(const A* first, const A* second, int64_t pairs, T* out_features) {
  MINGRU_LANES
  for (int64_t i = 0; i < pairs; ++i) {
    out_features[2 * i] = static_cast<T>(first[i]);
    out_features[2 * i + 1] = static_cast<T>(second[i]);
  }
}

// What a cell prepares for each lane.
template <class Cell, class A>
struct Prepared {
  A values[Cell::num_prepared > 0 ? Cell::num_prepared : 1][most_lanes<Cell>];
  A rates[most_lanes<Cell>], slopes[most_lanes<Cell>];
};

template <class Cell, class A>
MINGRU_INLINE void load(const Prepared<Cell, A>& prepared, int64_t lane, A* p) {
  for (int k = 0; k < Cell::num_prepared; ++k) p[k] = prepared.values[k][lane];
}

template <class Cell, bool biased, bool with_slopes, class Inputs, class Biases, class S, class A>
MINGRU_INLINE void prepare(
    const Inputs& inputs, const Biases& biases, int64_t lanes, const S& time, Prepared<Cell, A>& prepared) {
  constexpr int count = values_per_lane<Cell>;
  if constexpr (Cell::num_prepared > 0) {
    MINGRU_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      A x[count], p[Cell::num_prepared];
      load<count, biased>(inputs, biases, i, x);
      if constexpr (Cell::is_timed) {
        Cell::prepare(x, time, p);
      } else {
        Cell::prepare(x, p);
      }
      for (int k = 0; k < Cell::num_prepared; ++k) prepared.values[k][i] = p[k];
    }
  }
  if constexpr (Cell::is_timed) {
    MINGRU_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      A x[count], p[Cell::num_prepared];
      load<count, biased>(inputs, biases, i, x);
      load(prepared, i, p);
      const SoftPlus<A> rate = Cell::rates(x, p, time);
      prepared.rates[i] = rate.value;
      if constexpr (with_slopes) prepared.slopes[i] = rate.slope;
    }
  }
}

template <class Cell, class A, class S, class Values>
MINGRU_INLINE void coefficients_of(
    const A* x, const Prepared<Cell, A>& prepared, int64_t lane, const S& time, Values& a, Values& b) {
  A p[Cell::num_prepared + 1];
  load(prepared, lane, p);
  if constexpr (Cell::is_timed) {
    Cell::coefficients(x, p, SoftPlus<A>{prepared.rates[lane], A(0)}, time, a, b);
  } else {
    Cell::coefficients(x, p, a, b);
  }
}

template <class Cell, class A, class S, class Values>
MINGRU_INLINE void gradients_of(
    const A* x, const Prepared<Cell, A>& prepared, int64_t lane, const S& time, const Values& delta, const Values& previous,
    Values& a, A* grad, A& grad_dt) {
  A p[Cell::num_prepared + 1];
  load(prepared, lane, p);
  if constexpr (Cell::is_timed) {
    const SoftPlus<A> rate = {prepared.rates[lane], prepared.slopes[lane]};
    Cell::gradients(x, p, rate, time, delta, previous, a, grad, grad_dt);
  } else {
    Cell::gradients(x, p, delta, previous, a, grad);
  }
}

template <class Cell>
MINGRU_INLINE int64_t lanes_of(int64_t groups) {
  return (most_groups<Cell> == 1 ? 1 : groups) * lanes_per_group<Cell>;
}

// While a kernel runs, the state of a complex cell has the first number of each pair, and then, `half` values after it, the
// second numbers. The state of other cells is as given.
template <class Cell>
MINGRU_INLINE int64_t place_in_state(int64_t feature, int64_t half) {
  return Cell::is_complex ? feature / 2 + feature % 2 * half : feature;
}

// One step of some groups. Inputs and outputs must not overlap.
template <class Cell, bool biased, class T, class A, class S>
MINGRU_INLINE void forward_groups(
    int64_t groups, const T* const* in_inputs, const A* const* in_biases, const S& time, A* h, int64_t half,
    T* out_state) {
  constexpr int count = values_per_lane<Cell>;
  const int64_t lanes = lanes_of<Cell>(groups);
  const T* inputs[Cell::num_inputs];
  const A* biases[Cell::num_inputs];
  for (int k = 0; k < Cell::num_inputs; ++k) {
    inputs[k] = in_inputs[k];
    biases[k] = in_biases[k];
  }
  Prepared<Cell, A> prepared;
  if constexpr (Cell::is_complex) {
    A values[count][most_lanes<Cell>], *first = h, *second = h + half;
    for (int k = 0; k < Cell::num_inputs; ++k) {
      load_parts<biased>(inputs[k], biases[k], lanes, values[2 * k], values[2 * k + 1]);
    }
    prepare<Cell, false, false>(values, values, lanes, time, prepared);
    MINGRU_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      A x[count], a[2], b[2];
      load<count, false>(values, values, i, x);
      coefficients_of(x, prepared, i, time, a, b);
      const A previous[2] = {first[i], second[i]};
      first[i] = a[0] * previous[0] - a[1] * previous[1] + b[0];
      second[i] = a[1] * previous[0] + a[0] * previous[1] + b[1];
    }
    store_parts(first, second, lanes, out_state);
  } else {
    prepare<Cell, biased, false>(inputs, biases, lanes, time, prepared);
    MINGRU_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      A x[count], a, b;
      load<count, biased>(inputs, biases, i, x);
      coefficients_of(x, prepared, i, time, a, b);
      const A state = a * h[i] + b;
      h[i] = state;
      out_state[i] = static_cast<T>(state);
    }
  }
}

// `out_dt` are the sums of the gradients of dt over each group; it may be null.
template <class Cell, bool biased, class T, class A, class M, class S>
MINGRU_INLINE void backward_groups(
    int64_t groups, const T* const* in_inputs, const A* const* in_biases, const S& time, const T* in_grad,
    const M* in_previous, A* carry, int64_t half, T* const* out_grads, A* out_dt) {
  constexpr int count = values_per_lane<Cell>;
  const int64_t lanes = lanes_of<Cell>(groups);
  const T* inputs[Cell::num_inputs];
  const A* biases[Cell::num_inputs];
  for (int k = 0; k < Cell::num_inputs; ++k) {
    inputs[k] = in_inputs[k];
    biases[k] = in_biases[k];
  }
  Prepared<Cell, A> prepared;
  A dt_grads[most_lanes<Cell>];
  if constexpr (Cell::is_complex) {
    A values[count][most_lanes<Cell>], *first = carry, *second = carry + half;
    A grad_out[2][most_lanes<Cell>], before[2][most_lanes<Cell>];
    for (int k = 0; k < Cell::num_inputs; ++k) {
      load_parts<biased>(inputs[k], biases[k], lanes, values[2 * k], values[2 * k + 1]);
    }
    load_parts<false>(in_grad, carry, lanes, grad_out[0], grad_out[1]);
    load_parts<false>(in_previous, carry, lanes, before[0], before[1]);
    prepare<Cell, false, true>(values, values, lanes, time, prepared);
    MINGRU_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      A x[count], grad[count], a[2], grad_dt = A(0);
      load<count, false>(values, values, i, x);
      const A delta[2] = {grad_out[0][i] + first[i], grad_out[1][i] + second[i]};
      const A previous[2] = {before[0][i], before[1][i]};
      gradients_of(x, prepared, i, time, delta, previous, a, grad, grad_dt);
      for (int k = 0; k < count; ++k) values[k][i] = grad[k];
      if constexpr (Cell::is_timed) dt_grads[i] = grad_dt;
      // The conjugate of a, times delta.
      first[i] = a[0] * delta[0] + a[1] * delta[1];
      second[i] = a[0] * delta[1] - a[1] * delta[0];
    }
    for (int k = 0; k < Cell::num_inputs; ++k) store_parts(values[2 * k], values[2 * k + 1], lanes, out_grads[k]);
  } else {
    prepare<Cell, biased, true>(inputs, biases, lanes, time, prepared);
    MINGRU_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      A x[count], grad[count], a, grad_dt = A(0);
      load<count, biased>(inputs, biases, i, x);
      const A delta = static_cast<A>(in_grad[i]) + carry[i], previous = static_cast<A>(in_previous[i]);
      gradients_of(x, prepared, i, time, delta, previous, a, grad, grad_dt);
      for (int k = 0; k < count; ++k) out_grads[k][i] = static_cast<T>(grad[k]);
      if constexpr (Cell::is_timed) dt_grads[i] = grad_dt;
      carry[i] = a * delta;
    }
  }
  if constexpr (Cell::is_timed) {
    if (out_dt) {
      constexpr int part = lanes_per_group<Cell>;
      for (int64_t i = 0; i < lanes; i += part) *out_dt++ = sum_of(dt_grads + i, part);
    }
  }
}

// Groups are called, not inlined at each place of use, because the compiler would take far longer. A single group is
// inlined, because the call would take long.
template <class Cell, bool biased, class... Args>
MINGRU_NOT_INLINE void call_forward_groups(Args... args) {
  forward_groups<Cell, biased>(args...);
}

template <class Cell, bool biased, class... Args>
MINGRU_NOT_INLINE void call_backward_groups(Args... args) {
  backward_groups<Cell, biased>(args...);
}

template <class Cell, bool biased, class... Args>
MINGRU_INLINE void run_forward_groups(Args... args) {
  if constexpr (most_groups<Cell> == 1 && !Cell::is_timed) {
    forward_groups<Cell, biased>(args...);
  } else {
    call_forward_groups<Cell, biased>(args...);
  }
}

template <class Cell, bool biased, class... Args>
MINGRU_INLINE void run_backward_groups(Args... args) {
  if constexpr (most_groups<Cell> == 1 && !Cell::is_timed) {
    backward_groups<Cell, biased>(args...);
  } else {
    call_backward_groups<Cell, biased>(args...);
  }
}

// Converts groups of features.
template <class T, class A>
MINGRU_INLINE void read_groups(A* to, const T* from, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) read(to + g * group, from + g * group);
}

template <class T, class A>
MINGRU_INLINE void write_groups(T* to, const A* from, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) write(to + g * group, from + g * group);
}

// The same for features that are converted by `read` and `write`.
template <class Cell, bool biased, class T, class A, class S>
MINGRU_INLINE void converted_forward_groups(
    int64_t groups, const T* const* in_inputs, const A* const* biases, const S& time, A* h, int64_t half,
    T* out_state) {
  if constexpr (has_conversion<T>) {
    constexpr int most = most_groups<Cell> * group;
    A converted[Cell::num_inputs][most], state[most];
    const A* inputs[Cell::num_inputs];
    for (int k = 0; k < Cell::num_inputs; ++k) {
      read_groups(converted[k], in_inputs[k], groups);
      inputs[k] = converted[k];
    }
    run_forward_groups<Cell, biased>(groups, inputs, biases, time, h, half, state);
    write_groups(out_state, state, groups);
  } else {
    run_forward_groups<Cell, biased>(groups, in_inputs, biases, time, h, half, out_state);
  }
}

template <class Cell, bool biased, class T, class A, class M, class S>
MINGRU_INLINE void converted_backward_groups(
    int64_t groups, const T* const* in_inputs, const A* const* biases, const S& time, const T* in_grad,
    const M* in_previous, A* carry, int64_t half, T* const* out_grads, A* out_dt) {
  if constexpr (has_conversion<T>) {
    constexpr int most = most_groups<Cell> * group;
    A converted[Cell::num_inputs][most], grad[most], previous[most], grads[Cell::num_inputs][most];
    const A* inputs[Cell::num_inputs];
    A* to[Cell::num_inputs];
    for (int k = 0; k < Cell::num_inputs; ++k) {
      read_groups(converted[k], in_inputs[k], groups);
      inputs[k] = converted[k];
      to[k] = grads[k];
    }
    read_groups(grad, in_grad, groups);
    const A* from = nullptr;
    if constexpr (has_conversion<M>) {
      read_groups(previous, in_previous, groups);
      from = previous;
    } else {
      from = in_previous;
    }
    run_backward_groups<Cell, biased>(groups, inputs, biases, time, grad, from, carry, half, to, out_dt);
    for (int k = 0; k < Cell::num_inputs; ++k) write_groups(out_grads[k], grads[k], groups);
  } else {
    run_backward_groups<Cell, biased>(
        groups, in_inputs, biases, time, in_grad, in_previous, carry, half, out_grads, out_dt);
  }
}

// Calls `run` with a pointer to the previous state, which is in `out` or has the accumulation dtype. If both have the same
// type, `run` is compiled once.
template <class T, class A, class F>
MINGRU_INLINE void with_previous(bool is_in_out, const T* in_out, const A* in_state, const F& run) {
  if constexpr (std::is_same_v<T, A>) {
    run(is_in_out ? in_out : in_state);
  } else if (is_in_out) {
    run(in_out);
  } else {
    run(in_state);
  }
}

template <class Cell, bool biased, class A>
MINGRU_INLINE void biases_at(const Scan& scan, int64_t feature, const A** biases) {
  for (int k = 0; k < Cell::num_inputs; ++k) {
    biases[k] = biased ? static_cast<const A*>(scan.biases[k]) + feature : nullptr;
  }
}

// The number of whole groups from a feature on that are computed together.
template <class Cell>
MINGRU_INLINE int64_t groups_at(const Span& span, int64_t feature) {
  if constexpr (most_groups<Cell> == 1) return 1;
  const int64_t groups = (span.num_features - feature) / group;
  return groups < most_groups<Cell> ? groups : most_groups<Cell>;
}

template <class Cell, class T, bool biased, bool is_bounded>
static bool forward(const Scan& scan, const Span& span, typename Accumulation<T>::Type* state) {
  using A = typename Accumulation<T>::Type;
  constexpr int num_inputs = Cell::num_inputs;
  const int64_t padded = (span.num_features + group - 1) / group * group;
  const int64_t half = padded / 2;
  const A* initial_state = static_cast<const A*>(scan.initial_state);
  for (int64_t done = 0; done < span.end - span.begin; ++done) {
    const int64_t position = position_of(scan, scan.reverse ? span.end - 1 - done : span.begin + done);
    if (is_reset(scan, span.batch, position)) {
      for (int64_t i = 0; i < span.num_features; ++i) {
        state[place_in_state<Cell>(i, half)] =
            initial_state ? initial_state[span.batch * scan.num_features + span.feature + i] : A(0);
      }
    }
    const T* in_inputs[num_inputs];
    for (int k = 0; k < num_inputs; ++k) {
      in_inputs[k] = features_at<const T>(scan.inputs[k], span.batch, position, span.feature);
    }
    T* out_state = features_at<T>(scan.out, span.batch, position, span.feature);
    const auto time = time_of<is_bounded, A>(scan, span.batch, position);
    const A* biases[num_inputs];
    int64_t feature = 0;
    while (feature + group <= span.num_features) {
      const int64_t groups = groups_at<Cell>(span, feature);
      const T* inputs[num_inputs];
      for (int k = 0; k < num_inputs; ++k) inputs[k] = in_inputs[k] + feature;
      biases_at<Cell, biased>(scan, span.feature + feature, biases);
      converted_forward_groups<Cell, biased>(
          groups, inputs, biases, time, state + place_in_state<Cell>(feature, half), half, out_state + feature);
      feature += groups * group;
    }
    if (feature < span.num_features) {
      const int64_t count = span.num_features - feature;
      Rest<T> rest[num_inputs], rest_out;
      const T* inputs[num_inputs];
      for (int k = 0; k < num_inputs; ++k) inputs[k] = rest[k].in(in_inputs[k] + feature, count);
      biases_at<Cell, biased>(scan, span.feature + feature, biases);
      converted_forward_groups<Cell, biased>(
          int64_t(1), inputs, biases, time, state + place_in_state<Cell>(feature, half), half, rest_out.features);
      std::memcpy(out_state + feature, rest_out.features, count * sizeof(T));
    }
    if (span.checkpoints && (done + 1) % steps_per_checkpoint == 0 && record(span, done + 1, state, padded)) return true;
  }
  return false;
}

// `state` is a_{t+1} delta_{t+1}, the part of delta_t that the following step contributes.
template <class Cell, class T, bool biased, bool is_bounded>
static bool backward(const Scan& scan, const Span& span, typename Accumulation<T>::Type* state) {
  using A = typename Accumulation<T>::Type;
  constexpr int num_inputs = Cell::num_inputs;
  const int64_t padded = (span.num_features + group - 1) / group * group;
  const int64_t half = padded / 2;
  const int64_t at = span.batch * scan.num_features + span.feature;
  const A* initial_state = scan.initial_state ? static_cast<const A*>(scan.initial_state) + at : nullptr;
  const A* first = static_cast<const A*>(scan.h) + at;
  A* grad_initial_state = scan.grad_initial_state ? static_cast<A*>(scan.grad_initial_state) + at : nullptr;
  const int64_t num_steps = scan.lengths ? scan.lengths[span.batch] : scan.num_steps;
  for (int64_t done = 0; done < span.end - span.begin; ++done) {
    const int64_t step = scan.reverse ? span.begin + done : span.end - 1 - done;
    const int64_t position = position_of(scan, step);
    const bool reset = is_reset(scan, span.batch, position);
    const bool is_first = step == (scan.reverse ? num_steps - 1 : 0);
    const T* in_inputs[num_inputs];
    T* out_grads[num_inputs];
    for (int k = 0; k < num_inputs; ++k) {
      in_inputs[k] = features_at<const T>(scan.inputs[k], span.batch, position, span.feature);
      out_grads[k] = features_at<T>(scan.grad_inputs[k], span.batch, position, span.feature);
    }
    const T* in_grad = features_at<const T>(scan.grad_out, span.batch, position, span.feature);
    const int64_t before = is_first ? position : position_of(scan, scan.reverse ? step + 1 : step - 1);
    const T* in_previous = features_at<const T>(scan.out, span.batch, before, span.feature);
    const auto time = time_of<is_bounded, A>(scan, span.batch, position);
    A* out_dt = nullptr;
    if constexpr (Cell::is_timed) out_dt = grads_of_dt_at<A>(scan, span.batch, position, span.feature);
    // The previous state is in `out`, except at the first step and at resets.
    const bool from_out = !reset && !is_first;
    const A* previous = reset ? initial_state : first;
    static constexpr A no_state[most_groups<Cell> * group] = {};
    int64_t feature = 0;
    while (feature < span.num_features) {
      const int64_t count = span.num_features - feature;
      const bool whole = count >= group;
      const int64_t groups = whole ? groups_at<Cell>(span, feature) : 1;
      Rest<T> rest[num_inputs], rest_grad, rest_out[num_inputs], rest_previous_out;
      Rest<A> rest_previous;
      const T* inputs[num_inputs];
      T* grads[num_inputs];
      for (int k = 0; k < num_inputs; ++k) {
        inputs[k] = whole ? in_inputs[k] + feature : rest[k].in(in_inputs[k] + feature, count);
        grads[k] = whole ? out_grads[k] + feature : rest_out[k].features;
      }
      const A* biases[num_inputs];
      biases_at<Cell, biased>(scan, span.feature + feature, biases);
      const T* grad = whole ? in_grad + feature : rest_grad.in(in_grad + feature, count);
      const T* out_group = nullptr;
      const A* state_group = nullptr;
      if (from_out) {
        out_group = whole ? in_previous + feature : rest_previous_out.in(in_previous + feature, count);
      } else {
        state_group = previous == nullptr ? no_state
                      : whole             ? previous + feature
                                          : rest_previous.in(previous + feature, count);
      }
      with_previous(from_out, out_group, state_group, [&](const auto* in_group) {
        converted_backward_groups<Cell, biased>(
            groups, inputs, biases, time, grad, in_group, state + place_in_state<Cell>(feature, half), half, grads,
            out_dt);
      });
      if (!whole) {
        for (int k = 0; k < num_inputs; ++k) std::memcpy(out_grads[k] + feature, grads[k], count * sizeof(T));
      }
      if (out_dt) out_dt += groups;
      feature += groups * group;
    }
    if (reset) {
      for (int64_t i = 0; i < span.num_features; ++i) {
        A& of_feature = state[place_in_state<Cell>(i, half)];
        if (grad_initial_state) grad_initial_state[i] += of_feature;
        of_feature = A(0);
      }
    }
    if (span.checkpoints && (done + 1) % steps_per_checkpoint == 0 && record(span, done + 1, state, padded)) return true;
  }
  return false;
}

template <class Cell, class T, bool biased, bool is_bounded>
static bool run(const Scan& scan, const Span& span, void* state, bool is_backward) {
  using A = typename Accumulation<T>::Type;
  A* at = static_cast<A*>(state);
  const auto steps = is_backward ? backward<Cell, T, biased, is_bounded> : forward<Cell, T, biased, is_bounded>;
  if constexpr (Cell::is_complex) {
    const int64_t half = (span.num_features + group - 1) / group * group / 2;
    A parts[most_features];
    load_parts<false>(at, at, half, parts, parts + half);
    const bool matches = steps(scan, span, parts);
    store_parts(parts, parts + half, half, at);
    return matches;
  } else {
    return steps(scan, span, at);
  }
}

template <class Cell, class T>
static bool run(const Scan& scan, const Span& span, void* state, bool is_backward) {
  if constexpr (Cell::has_bias && sizeof(T) >= sizeof(float)) {
    if (scan.biases[0]) return run<Cell, T, true, false>(scan, span, state, is_backward);
  }
  if constexpr (Cell::is_timed) {
    if (scan.is_bounded) return run<Cell, T, false, true>(scan, span, state, is_backward);
  }
  return run<Cell, T, false, false>(scan, span, state, is_backward);
}

template <class Cell>
static Kernel of_storage(Storage storage) {
  switch (storage) {
    case Storage::float32: return run<Cell, float>;
    case Storage::float64: return run<Cell, double>;
    case Storage::bfloat16: return run<Cell, BFloat16>;
    case Storage::float16: return run<Cell, Half>;
  }
  return nullptr;
}

Kernel kernel(CellKind cell, Storage storage) {
#define MINGRU_CASE(name, num_inputs, type) \
  case CellKind::name: return of_storage<type>(storage);
  switch (cell) { MINGRU_CELLS(MINGRU_CASE) }
#undef MINGRU_CASE
  return nullptr;
}

}  // namespace mingru::MINGRU_ISA
