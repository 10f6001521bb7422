// The loops, compiled once for each instruction set (kernels_*.cpp).
//
// Prefixes: `in_` a row of an input, `out_` a row that is written; a row is the lanes of one step.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cells.h"
#include "scan.h"

namespace mingru::MINGRU_ISA {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
struct Computed {
  using Type = float;
};
template <>
struct Computed<double> {
  using Type = double;
};

// A row's last lanes, where they are fewer than a group: filled up with 0 on the way in, cut off on the way out.
template <class T>
struct Rest {
  T lanes[group];

  const T* in(const T* in_row, int64_t count) {
    std::memset(lanes, 0, sizeof(lanes));
    std::memcpy(lanes, in_row, count * sizeof(T));
    return lanes;
  }
};

template <class T>
MINGRU_INLINE T* row(const Sequence& sequence, int64_t batch, int64_t place, int64_t lane) {
  const int64_t at = batch * sequence.batch_stride + place * sequence.step_stride + lane;
  return static_cast<T*>(sequence.data) + (at - sequence.skipped);
}

// The place of a step along the dimension of time.
MINGRU_INLINE int64_t place_of(const Scan& scan, int64_t step) { return scan.step_rows ? scan.step_rows[step] : step; }

MINGRU_INLINE bool is_reset(const Scan& scan, int64_t batch, int64_t place) {
  return scan.reset && scan.reset[batch * scan.reset_batch_stride + place * scan.reset_step_stride];
}

// Note the state, or compare it with what was noted; true where it is met.
template <class A>
static bool note(const Span& span, int64_t done, const A* state, int64_t padded) {
  A* noted = static_cast<A*>(span.notes) + (done / steps_per_note - 1) * padded;
  if (span.until_met && std::memcmp(noted, state, padded * sizeof(A)) == 0) return true;
  std::memcpy(noted, state, padded * sizeof(A));
  return false;
}

// One lane of all inputs.
template <class Cell, bool biased, class Rows, class Biases, class A>
MINGRU_INLINE void gather(const Rows& rows, const Biases& biases, int i, A* x) {
  for (int k = 0; k < Cell::num_inputs; ++k) {
    x[k] = static_cast<A>(rows[k][i]);
    if constexpr (biased) x[k] += biases[k][i];
  }
}

// One step of one group of lanes. The rows must not overlap what is written.
template <class Cell, bool biased, class T, class A>
MINGRU_INLINE void forward_group(
    const T* const* in_rows, const A* const* in_biases, A* __restrict h, T* __restrict out_row) {
  constexpr int num_inputs = Cell::num_inputs;
  const T* __restrict rows[num_inputs];
  const A* __restrict biases[num_inputs];
  for (int k = 0; k < num_inputs; ++k) {
    rows[k] = in_rows[k];
    biases[k] = in_biases[k];
  }
  for (int i = 0; i < group; ++i) {
    A x[num_inputs], a, b;
    gather<Cell, biased>(rows, biases, i, x);
    Cell::coefficients(x, a, b);
    h[i] = a * h[i] + b;
    out_row[i] = static_cast<T>(h[i]);
  }
}

template <class Cell, bool biased, class T, class A, class M>
MINGRU_INLINE void backward_group(
    const T* const* in_rows, const A* const* in_biases, const T* __restrict in_grad, const M* __restrict in_met,
    A* __restrict carry, T* const* out_rows) {
  constexpr int num_inputs = Cell::num_inputs;
  const T* __restrict rows[num_inputs];
  const A* __restrict biases[num_inputs];
  for (int k = 0; k < num_inputs; ++k) {
    rows[k] = in_rows[k];
    biases[k] = in_biases[k];
  }
  // Written to the rows at the end only: compilers don't see that those don't overlap.
  A grads[num_inputs][group];
  for (int i = 0; i < group; ++i) {
    A x[num_inputs], grad[num_inputs], a;
    gather<Cell, biased>(rows, biases, i, x);
    const A delta = static_cast<A>(in_grad[i]) + carry[i];
    Cell::gradients(x, delta, static_cast<A>(in_met[i]), a, grad);
    for (int k = 0; k < num_inputs; ++k) grads[k][i] = grad[k];
    carry[i] = a * delta;
  }
  for (int k = 0; k < num_inputs; ++k) {
    for (int i = 0; i < group; ++i) out_rows[k][i] = static_cast<T>(grads[k][i]);
  }
}

// The biases of a group; where there are none, pointers that are not read.
template <class Cell, class A>
MINGRU_INLINE void biases_at(const Scan& scan, int64_t lane, const A** biases) {
  for (int k = 0; k < Cell::num_inputs; ++k) {
    biases[k] = scan.biases[k] ? static_cast<const A*>(scan.biases[k]) + lane : nullptr;
  }
}

template <class Cell, class T, bool biased>
static bool forward(const Scan& scan, const Span& span, typename Computed<T>::Type* state) {
  using A = typename Computed<T>::Type;
  constexpr int num_inputs = Cell::num_inputs;
  const int64_t padded = (span.num_lanes + group - 1) / group * group;
  const A* initial = static_cast<const A*>(scan.initial);
  for (int64_t done = 0; done < span.end - span.begin; ++done) {
    const int64_t place = place_of(scan, scan.reverse ? span.end - 1 - done : span.begin + done);
    if (is_reset(scan, span.batch, place)) {
      for (int64_t i = 0; i < span.num_lanes; ++i) {
        state[i] = initial ? initial[span.batch * scan.num_lanes + span.lane + i] : A(0);
      }
    }
    const T* in_rows[num_inputs];
    for (int k = 0; k < num_inputs; ++k) in_rows[k] = row<const T>(scan.inputs[k], span.batch, place, span.lane);
    T* out_row = row<T>(scan.out, span.batch, place, span.lane);
    const A* biases[num_inputs];
    int64_t lane = 0;
    for (; lane + group <= span.num_lanes; lane += group) {
      const T* rows[num_inputs];
      for (int k = 0; k < num_inputs; ++k) rows[k] = in_rows[k] + lane;
      biases_at<Cell>(scan, span.lane + lane, biases);
      forward_group<Cell, biased>(rows, biases, state + lane, out_row + lane);
    }
    if (lane < span.num_lanes) {
      const int64_t count = span.num_lanes - lane;
      Rest<T> rest[num_inputs], rest_out;
      const T* rows[num_inputs];
      for (int k = 0; k < num_inputs; ++k) rows[k] = rest[k].in(in_rows[k] + lane, count);
      biases_at<Cell>(scan, span.lane + lane, biases);
      forward_group<Cell, biased>(rows, biases, state + lane, rest_out.lanes);
      std::memcpy(out_row + lane, rest_out.lanes, count * sizeof(T));
    }
    if (span.notes && (done + 1) % steps_per_note == 0 && note(span, done + 1, state, padded)) return true;
  }
  return false;
}

// `state` is what reaches a step from the one after it: a_{t+1} delta_{t+1}.
template <class Cell, class T, bool biased>
static bool backward(const Scan& scan, const Span& span, typename Computed<T>::Type* state) {
  using A = typename Computed<T>::Type;
  constexpr int num_inputs = Cell::num_inputs;
  const int64_t padded = (span.num_lanes + group - 1) / group * group;
  const int64_t at = span.batch * scan.num_lanes + span.lane;
  const A* initial = scan.initial ? static_cast<const A*>(scan.initial) + at : nullptr;
  const A* first = static_cast<const A*>(scan.h) + at;
  A* grad_initial = scan.grad_initial ? static_cast<A*>(scan.grad_initial) + at : nullptr;
  const int64_t num_steps = scan.lengths ? scan.lengths[span.batch] : scan.num_steps;
  for (int64_t done = 0; done < span.end - span.begin; ++done) {
    const int64_t step = scan.reverse ? span.begin + done : span.end - 1 - done;
    const int64_t place = place_of(scan, step);
    const bool reset = is_reset(scan, span.batch, place);
    const bool is_first = step == (scan.reverse ? num_steps - 1 : 0);
    const T* in_rows[num_inputs];
    T* out_rows[num_inputs];
    for (int k = 0; k < num_inputs; ++k) {
      in_rows[k] = row<const T>(scan.inputs[k], span.batch, place, span.lane);
      out_rows[k] = row<T>(scan.grad_inputs[k], span.batch, place, span.lane);
    }
    const T* in_grad = row<const T>(scan.grad_out, span.batch, place, span.lane);
    const int64_t before = is_first ? place : place_of(scan, scan.reverse ? step + 1 : step - 1);
    const T* in_met = row<const T>(scan.out, span.batch, before, span.lane);
    // The state that this step met: a row of `out`, but for the first step and for resets.
    const bool from_out = !reset && !is_first;
    const A* met = reset ? initial : first;
    A no_state[group] = {};
    for (int64_t lane = 0; lane < span.num_lanes; lane += group) {
      const int64_t count = group < span.num_lanes - lane ? group : span.num_lanes - lane;
      const bool whole = count == group;
      Rest<T> rest[num_inputs], rest_grad, rest_out[num_inputs], rest_met_out;
      Rest<A> rest_met;
      const T* rows[num_inputs];
      T* grads[num_inputs];
      for (int k = 0; k < num_inputs; ++k) {
        rows[k] = whole ? in_rows[k] + lane : rest[k].in(in_rows[k] + lane, count);
        grads[k] = whole ? out_rows[k] + lane : rest_out[k].lanes;
      }
      const A* biases[num_inputs];
      biases_at<Cell>(scan, span.lane + lane, biases);
      const T* grad = whole ? in_grad + lane : rest_grad.in(in_grad + lane, count);
      if (from_out) {
        const T* met_row = whole ? in_met + lane : rest_met_out.in(in_met + lane, count);
        backward_group<Cell, biased>(rows, biases, grad, met_row, state + lane, grads);
      } else {
        const A* met_row = met == nullptr ? no_state : whole ? met + lane : rest_met.in(met + lane, count);
        backward_group<Cell, biased>(rows, biases, grad, met_row, state + lane, grads);
      }
      if (!whole) {
        for (int k = 0; k < num_inputs; ++k) std::memcpy(out_rows[k] + lane, grads[k], count * sizeof(T));
      }
    }
    if (reset) {
      for (int64_t i = 0; i < span.num_lanes; ++i) {
        if (grad_initial) grad_initial[i] += state[i];
        state[i] = A(0);
      }
    }
    if (span.notes && (done + 1) % steps_per_note == 0 && note(span, done + 1, state, padded)) return true;
  }
  return false;
}

template <class Cell, class T>
static bool run(const Scan& scan, const Span& span, void* state, bool is_backward) {
  auto* lanes = static_cast<typename Computed<T>::Type*>(state);
  if constexpr (Cell::has_bias && sizeof(T) >= sizeof(float)) {
    if (scan.biases[0]) {
      return is_backward ? backward<Cell, T, true>(scan, span, lanes) : forward<Cell, T, true>(scan, span, lanes);
    }
  }
  return is_backward ? backward<Cell, T, false>(scan, span, lanes) : forward<Cell, T, false>(scan, span, lanes);
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
  switch (cell) {
    case CellKind::linear_scan: return of_storage<LinearScan>(storage);
    case CellKind::mingru_positive: return of_storage<MinGRU<Positive>>(storage);
    case CellKind::mingru_linear: return of_storage<MinGRU<Linear>>(storage);
    case CellKind::mingru_tanh: return of_storage<MinGRU<Tanh>>(storage);
    case CellKind::minlstm_positive: return of_storage<MinLSTM<Positive>>(storage);
    case CellKind::minlstm_linear: return of_storage<MinLSTM<Linear>>(storage);
    case CellKind::minlstm_tanh: return of_storage<MinLSTM<Tanh>>(storage);
  }
  return nullptr;
}

}  // namespace mingru::MINGRU_ISA
