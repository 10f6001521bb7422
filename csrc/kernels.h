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
  const int64_t at = batch * sequence.batch_stride + position * sequence.step_stride + feature;
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

template <class Cell, bool biased, class Inputs, class Biases, class A>
MINGRU_INLINE void load(const Inputs& inputs, const Biases& biases, int i, A* x) {
  for (int k = 0; k < Cell::num_inputs; ++k) {
    x[k] = static_cast<A>(inputs[k][i]);
    if constexpr (biased) x[k] += biases[k][i];
  }
}

// The time of a step, for timed cells.
template <bool is_bounded, class A>
MINGRU_INLINE Time<A, is_bounded> time_of(const Scan& scan, int64_t batch, int64_t position) {
  const A* dt = static_cast<const A*>(scan.dt);
  const A elapsed = dt ? dt[batch * scan.dt_batch_stride + position * scan.dt_step_stride] : A(1);
  return {elapsed, static_cast<A>(scan.log_bound), static_cast<A>(scan.log_range)};
}

template <class Cell, class A, class T, class Values>
MINGRU_INLINE void coefficients_of(const A* x, const T& time, Values& a, Values& b) {
  if constexpr (Cell::is_timed) {
    Cell::coefficients(x, time, a, b);
  } else {
    Cell::coefficients(x, a, b);
  }
}

template <class Cell, class A, class T, class Values>
MINGRU_INLINE void gradients_of(
    const A* x, const T& time, const Values& delta, const Values& previous, Values& a, A* grad, A& grad_dt) {
  if constexpr (Cell::is_timed) {
    Cell::gradients(x, time, delta, previous, a, grad, grad_dt);
  } else {
    Cell::gradients(x, delta, previous, a, grad);
  }
}

template <int count, class A>
MINGRU_INLINE A sum_of(const A* values) {
  A sum = A(0);
  for (int i = 0; i < count; ++i) sum += values[i];
  return sum;
}

// Two groups of complex features have as many pairs as one group has features.
constexpr int pair_of_groups = 2 * group;

// A loop that is unrolled too early cannot be vectorized with the loops beside it.
#if defined(__GNUC__) && !defined(__clang__)
#define MINGRU_KEEP_LOOP _Pragma("GCC unroll 1")
#else
#define MINGRU_KEEP_LOOP
#endif

// Separates the pairs of a group, because compilers vectorize loops over adjacent values better.
template <bool biased, int pairs, class T, class A>
MINGRU_INLINE void load_parts(const T* in_features, const A* in_bias, A* first, A* second) {
  MINGRU_KEEP_LOOP
  for (int i = 0; i < pairs; ++i) {
    first[i] = static_cast<A>(in_features[2 * i]);
    second[i] = static_cast<A>(in_features[2 * i + 1]);
    if constexpr (biased) {
      first[i] += in_bias[2 * i];
      second[i] += in_bias[2 * i + 1];
    }
  }
}

template <int pairs, class A>
MINGRU_INLINE void store_parts(const A* first, const A* second, A* out_features) {
  MINGRU_KEEP_LOOP
  for (int i = 0; i < pairs; ++i) {
    out_features[2 * i] = first[i];
    out_features[2 * i + 1] = second[i];
  }
}

// One step of a group, or of `count` features. Inputs and outputs must not overlap.
template <class Cell, bool biased, int count = group, class T, class A, class S>
MINGRU_INLINE void forward_group(
    const T* const* in_inputs, const A* const* in_biases, const S& time, A* __restrict h, T* __restrict out_state) {
  constexpr int num_inputs = Cell::num_inputs;
  const T* __restrict inputs[num_inputs];
  const A* __restrict biases[num_inputs];
  for (int k = 0; k < num_inputs; ++k) {
    inputs[k] = in_inputs[k];
    biases[k] = in_biases[k];
  }
  if constexpr (Cell::is_complex) {
    constexpr int pairs = count / 2;
    A values[2 * num_inputs][pairs], state[2][pairs], next[2][pairs];
    for (int k = 0; k < num_inputs; ++k) {
      load_parts<biased, pairs>(inputs[k], biases[k], values[2 * k], values[2 * k + 1]);
    }
    load_parts<false, pairs>(h, h, state[0], state[1]);
    MINGRU_KEEP_LOOP
    for (int i = 0; i < pairs; ++i) {
      A x[2 * num_inputs], a[2], b[2];
      for (int k = 0; k < 2 * num_inputs; ++k) x[k] = values[k][i];
      coefficients_of<Cell>(x, time, a, b);
      next[0][i] = a[0] * state[0][i] - a[1] * state[1][i] + b[0];
      next[1][i] = a[1] * state[0][i] + a[0] * state[1][i] + b[1];
    }
    store_parts<pairs>(next[0], next[1], h);
    MINGRU_KEEP_LOOP
    for (int i = 0; i < count; ++i) out_state[i] = static_cast<T>(h[i]);
  } else {
    for (int i = 0; i < count; ++i) {
      A x[num_inputs], a, b;
      load<Cell, biased>(inputs, biases, i, x);
      coefficients_of<Cell>(x, time, a, b);
      h[i] = a * h[i] + b;
      out_state[i] = static_cast<T>(h[i]);
    }
  }
}

// `out_dt` is the sum of the gradients of dt; it may be null.
template <class Cell, bool biased, int count = group, class T, class A, class M, class S>
MINGRU_INLINE void backward_group(
    const T* const* in_inputs, const A* const* in_biases, const S& time, const T* __restrict in_grad,
    const M* __restrict in_previous, A* __restrict carry, T* const* out_grads, A* out_dt) {
  constexpr int num_inputs = Cell::num_inputs;
  const T* __restrict inputs[num_inputs];
  const A* __restrict biases[num_inputs];
  for (int k = 0; k < num_inputs; ++k) {
    inputs[k] = in_inputs[k];
    biases[k] = in_biases[k];
  }
  // Copied to `out_grads` at the end, because compilers do not know that its pointers do not overlap.
  A grads[num_inputs][count], dt_grads[count] = {};
  if constexpr (Cell::is_complex) {
    constexpr int pairs = count / 2;
    A values[2 * num_inputs][pairs], grad_parts[2 * num_inputs][pairs];
    A grad_out[2][pairs], next[2][pairs], before[2][pairs];
    for (int k = 0; k < num_inputs; ++k) {
      load_parts<biased, pairs>(inputs[k], biases[k], values[2 * k], values[2 * k + 1]);
    }
    load_parts<false, pairs>(in_grad, carry, grad_out[0], grad_out[1]);
    load_parts<false, pairs>(carry, carry, next[0], next[1]);
    load_parts<false, pairs>(in_previous, carry, before[0], before[1]);
    MINGRU_KEEP_LOOP
    for (int i = 0; i < pairs; ++i) {
      A x[2 * num_inputs], grad[2 * num_inputs], a[2];
      for (int k = 0; k < 2 * num_inputs; ++k) x[k] = values[k][i];
      const A delta[2] = {grad_out[0][i] + next[0][i], grad_out[1][i] + next[1][i]};
      const A previous[2] = {before[0][i], before[1][i]};
      gradients_of<Cell>(x, time, delta, previous, a, grad, dt_grads[i]);
      for (int k = 0; k < 2 * num_inputs; ++k) grad_parts[k][i] = grad[k];
      // The conjugate of a, times delta.
      next[0][i] = a[0] * delta[0] + a[1] * delta[1];
      next[1][i] = a[0] * delta[1] - a[1] * delta[0];
    }
    store_parts<pairs>(next[0], next[1], carry);
    for (int k = 0; k < num_inputs; ++k) store_parts<pairs>(grad_parts[2 * k], grad_parts[2 * k + 1], grads[k]);
  } else {
    for (int i = 0; i < count; ++i) {
      A x[num_inputs], grad[num_inputs], a;
      load<Cell, biased>(inputs, biases, i, x);
      const A delta = static_cast<A>(in_grad[i]) + carry[i];
      gradients_of<Cell>(x, time, delta, static_cast<A>(in_previous[i]), a, grad, dt_grads[i]);
      for (int k = 0; k < num_inputs; ++k) grads[k][i] = grad[k];
      carry[i] = a * delta;
    }
  }
  for (int k = 0; k < num_inputs; ++k) {
    for (int i = 0; i < count; ++i) out_grads[k][i] = static_cast<T>(grads[k][i]);
  }
  if constexpr (Cell::is_timed) {
    if (out_dt) *out_dt = sum_of<count>(dt_grads);
  }
}

// The groups of timed cells are called, not inlined at each place of use, because the compiler would take far longer.
template <class Cell, bool biased, int count, class... Args>
MINGRU_NOT_INLINE void call_forward_group(Args... args) {
  forward_group<Cell, biased, count>(args...);
}

template <class Cell, bool biased, int count, class... Args>
MINGRU_NOT_INLINE void call_backward_group(Args... args) {
  backward_group<Cell, biased, count>(args...);
}

template <class Cell, bool biased, int count = group, class... Args>
MINGRU_INLINE void run_forward_group(Args... args) {
  if constexpr (Cell::is_timed) {
    call_forward_group<Cell, biased, count>(args...);
  } else {
    forward_group<Cell, biased, count>(args...);
  }
}

template <class Cell, bool biased, int count = group, class... Args>
MINGRU_INLINE void run_backward_group(Args... args) {
  if constexpr (Cell::is_timed) {
    call_backward_group<Cell, biased, count>(args...);
  } else {
    backward_group<Cell, biased, count>(args...);
  }
}

// The same for features that are converted by `read` and `write`.
template <class Cell, bool biased, class T, class A, class S>
MINGRU_INLINE void converted_forward_group(
    const T* const* in_inputs, const A* const* biases, const S& time, A* h, T* out_state) {
  if constexpr (has_conversion<T>) {
    A converted[Cell::num_inputs][group], state[group];
    const A* inputs[Cell::num_inputs];
    for (int k = 0; k < Cell::num_inputs; ++k) {
      read(converted[k], in_inputs[k]);
      inputs[k] = converted[k];
    }
    run_forward_group<Cell, biased>(inputs, biases, time, h, state);
    write(out_state, state);
  } else {
    run_forward_group<Cell, biased>(in_inputs, biases, time, h, out_state);
  }
}

template <class Cell, bool biased, class T, class A, class M, class S>
MINGRU_INLINE void converted_backward_group(
    const T* const* in_inputs, const A* const* biases, const S& time, const T* in_grad, const M* in_previous, A* carry,
    T* const* out_grads, A* out_dt) {
  if constexpr (has_conversion<T>) {
    A converted[Cell::num_inputs][group], grad[group], previous[group], grads[Cell::num_inputs][group];
    const A* inputs[Cell::num_inputs];
    A* to[Cell::num_inputs];
    for (int k = 0; k < Cell::num_inputs; ++k) {
      read(converted[k], in_inputs[k]);
      inputs[k] = converted[k];
      to[k] = grads[k];
    }
    read(grad, in_grad);
    const A* from = nullptr;
    if constexpr (has_conversion<M>) {
      read(previous, in_previous);
      from = previous;
    } else {
      from = in_previous;
    }
    run_backward_group<Cell, biased>(inputs, biases, time, grad, from, carry, to, out_dt);
    for (int k = 0; k < Cell::num_inputs; ++k) write(out_grads[k], grads[k]);
  } else {
    run_backward_group<Cell, biased>(in_inputs, biases, time, in_grad, in_previous, carry, out_grads, out_dt);
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

template <class Cell, class A>
MINGRU_INLINE void biases_at(const Scan& scan, int64_t feature, const A** biases) {
  for (int k = 0; k < Cell::num_inputs; ++k) {
    biases[k] = scan.biases[k] ? static_cast<const A*>(scan.biases[k]) + feature : nullptr;
  }
}

template <class Cell, class T, bool biased, bool is_bounded>
static bool forward(const Scan& scan, const Span& span, typename Accumulation<T>::Type* state) {
  using A = typename Accumulation<T>::Type;
  constexpr int num_inputs = Cell::num_inputs;
  const int64_t padded = (span.num_features + group - 1) / group * group;
  const A* initial_state = static_cast<const A*>(scan.initial_state);
  for (int64_t done = 0; done < span.end - span.begin; ++done) {
    const int64_t position = position_of(scan, scan.reverse ? span.end - 1 - done : span.begin + done);
    if (is_reset(scan, span.batch, position)) {
      for (int64_t i = 0; i < span.num_features; ++i) {
        state[i] = initial_state ? initial_state[span.batch * scan.num_features + span.feature + i] : A(0);
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
    if constexpr (Cell::is_complex && !has_conversion<T>) {
      for (; feature + pair_of_groups <= span.num_features; feature += pair_of_groups) {
        const T* inputs[num_inputs];
        for (int k = 0; k < num_inputs; ++k) inputs[k] = in_inputs[k] + feature;
        biases_at<Cell>(scan, span.feature + feature, biases);
        run_forward_group<Cell, biased, pair_of_groups>(inputs, biases, time, state + feature, out_state + feature);
      }
    }
    for (; feature + group <= span.num_features; feature += group) {
      const T* inputs[num_inputs];
      for (int k = 0; k < num_inputs; ++k) inputs[k] = in_inputs[k] + feature;
      biases_at<Cell>(scan, span.feature + feature, biases);
      converted_forward_group<Cell, biased>(inputs, biases, time, state + feature, out_state + feature);
    }
    if (feature < span.num_features) {
      const int64_t count = span.num_features - feature;
      Rest<T> rest[num_inputs], rest_out;
      const T* inputs[num_inputs];
      for (int k = 0; k < num_inputs; ++k) inputs[k] = rest[k].in(in_inputs[k] + feature, count);
      biases_at<Cell>(scan, span.feature + feature, biases);
      converted_forward_group<Cell, biased>(inputs, biases, time, state + feature, rest_out.features);
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
    A no_state[Cell::is_complex ? pair_of_groups : group] = {};
    int64_t begin = 0;
    if constexpr (Cell::is_complex && !has_conversion<T>) {
      for (; begin + pair_of_groups <= span.num_features; begin += pair_of_groups) {
        const T* inputs[num_inputs];
        T* grads[num_inputs];
        for (int k = 0; k < num_inputs; ++k) {
          inputs[k] = in_inputs[k] + begin;
          grads[k] = out_grads[k] + begin;
        }
        const A* biases[num_inputs];
        biases_at<Cell>(scan, span.feature + begin, biases);
        const A* other = previous == nullptr ? no_state : previous + begin;
        with_previous(from_out, in_previous + begin, other, [&](const auto* in_group) {
          run_backward_group<Cell, biased, pair_of_groups>(
              inputs, biases, time, in_grad + begin, in_group, state + begin, grads, out_dt);
        });
        if (out_dt) out_dt += 2;
      }
    }
    for (int64_t feature = begin; feature < span.num_features; feature += group) {
      const int64_t count = group < span.num_features - feature ? group : span.num_features - feature;
      const bool whole = count == group;
      Rest<T> rest[num_inputs], rest_grad, rest_out[num_inputs], rest_previous_out;
      Rest<A> rest_previous;
      const T* inputs[num_inputs];
      T* grads[num_inputs];
      for (int k = 0; k < num_inputs; ++k) {
        inputs[k] = whole ? in_inputs[k] + feature : rest[k].in(in_inputs[k] + feature, count);
        grads[k] = whole ? out_grads[k] + feature : rest_out[k].features;
      }
      const A* biases[num_inputs];
      biases_at<Cell>(scan, span.feature + feature, biases);
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
        converted_backward_group<Cell, biased>(inputs, biases, time, grad, in_group, state + feature, grads, out_dt);
      });
      if (!whole) {
        for (int k = 0; k < num_inputs; ++k) std::memcpy(out_grads[k] + feature, grads[k], count * sizeof(T));
      }
      if (out_dt) ++out_dt;
    }
    if (reset) {
      for (int64_t i = 0; i < span.num_features; ++i) {
        if (grad_initial_state) grad_initial_state[i] += state[i];
        state[i] = A(0);
      }
    }
    if (span.checkpoints && (done + 1) % steps_per_checkpoint == 0 && record(span, done + 1, state, padded)) return true;
  }
  return false;
}

template <class Cell, class T, bool biased, bool is_bounded>
static bool run(const Scan& scan, const Span& span, void* state, bool is_backward) {
  auto* at = static_cast<typename Accumulation<T>::Type*>(state);
  return is_backward ? backward<Cell, T, biased, is_bounded>(scan, span, at)
                     : forward<Cell, T, biased, is_bounded>(scan, span, at);
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
