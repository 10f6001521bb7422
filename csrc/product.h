// Products of a few rows with a matrix of weights, and sums of rows, compiled once for each instruction set. They read
// each value once, so their time is that of the memory, and a call of torch's operator would take about as long again.
#pragma once

#include "convert.h"
#include "scan.h"

namespace mingru::MINGRU_ISA {

// Four columns share the loads of x. OpenMP's clause allows the compiler to sum in vectors.
template <class T>
static void multiply_columns(const Product& product, int64_t begin, int64_t end) {
  const int64_t features = product.features, columns = product.columns;
  const T* weight = static_cast<const T*>(product.weight);
  const T* bias = static_cast<const T*>(product.bias);
  for (int64_t column = begin; column < end; column += 4) {
    const int64_t count = end - column < 4 ? end - column : 4;
    const T* w[4];
    for (int64_t k = 0; k < 4; ++k) w[k] = weight + (column + (k < count ? k : 0)) * features;
    for (int64_t row = 0; row < product.rows; ++row) {
      const T* x = static_cast<const T*>(product.x) + row * features;
      const T *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
      T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < features; ++i) {
        s0 += x[i] * w0[i];
        s1 += x[i] * w1[i];
        s2 += x[i] * w2[i];
        s3 += x[i] * w3[i];
      }
      const T sums[4] = {s0, s1, s2, s3};
      T* out = static_cast<T*>(product.out) + row * columns + column;
      for (int64_t k = 0; k < count; ++k) out[k] = bias ? sums[k] + bias[column + k] : sums[k];
    }
  }
}

template <class T>
static void sum_columns(const RowSum& sum, int64_t begin, int64_t end, void* to) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int64_t most = 8;  // rows summed before they are added, which rounds less
  A* total = static_cast<A*>(to);
  for (int64_t row = begin; row < end; row += most) {
    const int64_t count = end - row < most ? end - row : most;
    const T* rows = static_cast<const T*>(sum.rows) + row * sum.columns;
    int64_t column = 0;
    for (; column + group <= sum.columns; column += group) {
      A part[group] = {};
      for (int64_t k = 0; k < count; ++k) {
        const T* from = rows + k * sum.columns + column;
        if constexpr (has_conversion<T>) {
          A converted[group];
          read(converted, from);
          for (int i = 0; i < group; ++i) part[i] += converted[i];
        } else {
          for (int i = 0; i < group; ++i) part[i] += static_cast<A>(from[i]);
        }
      }
      for (int i = 0; i < group; ++i) total[column + i] += part[i];
    }
    for (; column < sum.columns; ++column) {
      A part = 0;
      for (int64_t k = 0; k < count; ++k) part += static_cast<A>(rows[k * sum.columns + column]);
      total[column] += part;
    }
  }
}

RowSumKernel row_sum_kernel(Storage storage) {
  switch (storage) {
    case Storage::float32: return sum_columns<float>;
    case Storage::float64: return sum_columns<double>;
    case Storage::bfloat16: return sum_columns<BFloat16>;
    case Storage::float16: return sum_columns<Half>;
  }
  return nullptr;
}

ProductKernel product_kernel(Storage storage) {
  return storage == Storage::float64 ? multiply_columns<double> : multiply_columns<float>;
}

}  // namespace mingru::MINGRU_ISA
