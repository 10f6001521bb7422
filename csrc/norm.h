// The norm of the features of one time step.
#pragma once

#include <array>
#include <cmath>

#include "call.h"

HIDDEN_NAMESPACE_BEGIN(mingru)

// In double and in a fixed order, so that the result depends neither on threads nor on the processor.
template <class F>
double sum(int64_t count, const F& term) {
  constexpr int64_t width = 8;
  std::array<double, width> sums{};
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    for (int64_t k = 0; k < width; ++k) sums[k] += term(i + k);
  }
  for (; i < count; ++i) sums[i % width] += term(i);
  double total = 0;
  for (double part : sums) total += part;
  return total;
}

template <class T>
void norm_row(T* out, const T* x, const T* weight, const T* bias, int64_t features, double eps) {
  double mean = 0;
  if (bias) mean = sum(features, [&](int64_t i) { return static_cast<double>(x[i]); }) / features;
  const double squares = sum(features, [&](int64_t i) {
    const double centered = x[i] - mean;
    return centered * centered;
  });
  const double scale = 1 / std::sqrt(squares / features + eps);
  for (int64_t i = 0; i < features; ++i) {
    out[i] = static_cast<T>((x[i] - mean) * scale) * weight[i] + (bias ? bias[i] : T(0));
  }
}

HIDDEN_NAMESPACE_END(mingru)
