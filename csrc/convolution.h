// The causal depthwise convolution and its gradients, compiled once for each instruction set. A row is a step of a batch
// element. The K - 1 rows before its first step are those of the state.
#pragma once

#include <vector>

#include "convert.h"

namespace mingru::MINGRU_ISA {

// out = first + second + sum_k weight_k row_k. Backward, the rows are gradients of outputs, and those of the weights are
// added to `sums`. Several rows at once, because otherwise most of the time is that of `out`.
template <class A, bool is_backward, int taps>
static void add_taps(
    A* out, const A* first, const A* second, const A* const* rows, const A* weight, int64_t count, const A* x, A* sums) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A total = first[i] + second[i];
    for (int k = 0; k < taps; ++k) {
      total += weight[k * count + i] * rows[k][i];
      if (is_backward) sums[k * count + i] += x[i] * rows[k][i];
    }
    out[i] = total;
  }
}

template <class A>
static void convolve(const Convolution& of, int64_t task, bool is_backward) {
  static constexpr decltype(&add_taps<A, false, 0>) adding[2][5] = {
      {add_taps<A, false, 0>, add_taps<A, false, 1>, add_taps<A, false, 2>, add_taps<A, false, 3>, add_taps<A, false, 4>},
      {add_taps<A, true, 0>, add_taps<A, true, 1>, add_taps<A, true, 2>, add_taps<A, true, 3>, add_taps<A, true, 4>}};
  const Scan& scan = of.scan;
  const int64_t count = scan.num_features, size = of.kernel_size, num_past = size - 1, begin = task * of.task_rows;
  const A *weight = static_cast<const A*>(of.weight), *zeros = static_cast<const A*>(of.zeros);
  A* sums = is_backward ? static_cast<A*>(of.sums) + task * (size + 1) * count : nullptr;
  if (is_backward) std::memset(sums, 0, (size + 1) * count * sizeof(A));
  std::vector<const A*> rows(size);
  for (int64_t row = begin; row < least_of(begin + of.task_rows, of.num_rows()); ++row) {
    const int64_t batch = row / (scan.num_steps + num_past), step = row % (scan.num_steps + num_past) - num_past;
    const int64_t length = scan.lengths ? scan.lengths[batch] : scan.num_steps;
    // The features of a step, which is in the state if it is negative.
    const auto at = [&](const Sequence& x, const void* state, int64_t step) {
      if (step >= 0) return static_cast<A*>(x.data) + x.index(batch, step);
      return static_cast<A*>(const_cast<void*>(state)) + ((batch + 1) * num_past + step) * count;
    };
    const auto is_reset = [&](int64_t step) { return step >= 0 && scan.is_reset(batch, step); };
    const A *x = at(scan.inputs[0], scan.h, step), *first = static_cast<const A*>(of.bias), *second = zeros;
    A* out = is_backward ? at(scan.grad_inputs[0], scan.grad_h, step) : at(scan.out, scan.last, step);
    if (step < 0 && !is_backward) {
      int64_t later = length + step + 1;
      while (later < length && !is_reset(later)) ++later;
      std::memcpy(out, later < length ? zeros : at(scan.inputs[0], scan.h, length + step), count * sizeof(A));
      continue;
    }
    // The lags from `lag` on, below `most`, at which an input has an effect on this step, or this input on another one.
    int64_t lag = step < 0 ? -step : 0, most = 1;
    const auto other = [&](int64_t k) { return is_backward ? step + k : step - k; };
    while (most < size && other(most) < scan.num_steps && !is_reset(is_backward ? step + most : step + 1 - most)) ++most;
    for (int64_t k = lag; k < most; ++k) rows[k] = at(is_backward ? scan.grad_out : scan.inputs[0], scan.h, other(k));
    if (step >= 0 && of.adds_x) second = rows[0];
    if (is_backward) {
      const int64_t until_end = length - 1 - step;
      if (0 <= until_end && until_end < least_of(num_past, most)) first = at({}, scan.grad_last, step - length);
      for (int64_t i = 0; step >= 0 && i < count; ++i) sums[size * count + i] += rows[0][i];
    }
    do {
      const int64_t taps = least_of(most - lag, 4), from = lag * count;
      A* const of_taps = is_backward ? sums + from : nullptr;
      adding[is_backward][taps](out, first, second, rows.data() + lag, weight + from, count, x, of_taps);
      first = out, second = zeros, lag += taps;
    } while (lag < most);
  }
}

}  // namespace mingru::MINGRU_ISA
