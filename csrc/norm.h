// Normalization of the features of time steps and its gradient, compiled once for each instruction set. OpenMP's clause
// allows the compiler to sum in vectors.
#pragma once

#include <vector>

#include "convert.h"

namespace mingru::MINGRU_ISA {

// Calls f with a part of whole groups and the rest, which are converted apart.
template <class F>
MINGRU_INLINE void in_two_parts(int64_t count, const F& f) {
  const int64_t whole = count / group * group;
  if (whole > 0) f(int64_t(0), whole);
  if (whole < count) f(whole, count - whole);
}

// Returns the row in the accumulation type, in `memory` if it is converted.
template <class A, class T>
MINGRU_INLINE const A* read_row(A* memory, const T* row, int64_t count) {
  if constexpr (std::is_same_v<T, A>) {
    return row;
  } else {
    in_two_parts(count, [&](int64_t at, int64_t size) { load(memory + at, Rows<const T>{row + at, 0}, 1, size); });
    return memory;
  }
}

// Writes x, (x - mean) / sqrt(variance + eps) of it, or the same with a mean of 0, and returns the factor.
template <class A>
static A normalize_row(A* out, const A* x, int64_t count, bool is_centered, A eps) {
  A sum = 0, squares = 0;
  if (is_centered) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i];
  }
  const A mean = sum / count;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const A scale = 1 / std::sqrt(squares / count + eps);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = (x[i] - mean) * scale;
  return scale;
}

// Replaces the gradient of a normalized row by that of the row.
template <class A>
static void normalize_row_backward(A* grad, const A* normalized, int64_t count, bool is_centered, A scale) {
  A sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < count; ++i) {
    sum += grad[i];
    product += grad[i] * normalized[i];
  }
  const A mean = is_centered ? sum / count : 0, slope = product / count;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) grad[i] = scale * (grad[i] - mean - normalized[i] * slope);
}

template <class A>
static void normalize(const Normalization& of, int64_t begin, int64_t end, bool is_backward) {
  with_type<A>(of.storage, [&](auto type) {
    using T = decltype(type);
    const int64_t count = of.features, padded = padded_size(count);
    std::vector<A> memory(std::is_same_v<T, A> ? 0 : 2 * padded);
    for (int64_t row = begin; row < end; ++row) {
      const A* x = read_row<A>(memory.data(), static_cast<const T*>(of.x) + row * count, count);
      T* const out = static_cast<T*>(of.out) + row * count;
      A *result, &scale = static_cast<A*>(of.scales)[row];
      if constexpr (std::is_same_v<T, A>) {
        result = out;
      } else {
        result = memory.data() + padded;
        if (is_backward) read_row<A>(result, out, count);
      }
      if (is_backward) {
        normalize_row_backward(result, x, count, of.is_centered, scale);
      } else {
        scale = normalize_row(result, x, count, of.is_centered, static_cast<A>(of.eps));
      }
      if constexpr (!std::is_same_v<T, A>) {
        in_two_parts(count, [&](int64_t at, int64_t size) { store(Rows<T>{out + at, 0}, result + at, 1, size); });
      }
    }
  });
}

}  // namespace mingru::MINGRU_ISA
