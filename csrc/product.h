// Products of a few rows with a matrix of weights, and sums of rows, compiled once for each instruction set. They read
// each value once, so their time is that of the memory, and a call of torch's operator would take about as long again.
#pragma once

#include "convert.h"

namespace mingru::MINGRU_ISA {

// Four columns share the loads of x, and two rows those of the weights. OpenMP's clause allows the compiler to sum in
// vectors.
template <class T, int rows>
static void multiply_columns(const Product& product, int64_t row, int64_t column, int64_t count) {
  const int64_t features = product.features;
  const T *weight = static_cast<const T*>(product.weight) + column * features, *bias = static_cast<const T*>(product.bias);
  const T *x = static_cast<const T*>(product.x) + row * features, *y = x + (rows - 1) * features;
  const T *w0 = weight, *w1 = w0 + (count > 1) * features, *w2 = w0 + (count > 2 ? 2 : 0) * features;
  const T* w3 = w0 + (count > 3 ? 3 : 0) * features;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, t0, t1, t2, t3)
  for (int64_t i = 0; i < features; ++i) {
    s0 += x[i] * w0[i];
    s1 += x[i] * w1[i];
    s2 += x[i] * w2[i];
    s3 += x[i] * w3[i];
    if (rows == 1) continue;
    t0 += y[i] * w0[i];
    t1 += y[i] * w1[i];
    t2 += y[i] * w2[i];
    t3 += y[i] * w3[i];
  }
  const T sums[2][4] = {{s0, s1, s2, s3}, {t0, t1, t2, t3}};
  for (int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(product.out) + (row + i) * product.columns + column;
    for (int64_t k = 0; k < count; ++k) out[k] = bias ? sums[i][k] + bias[column + k] : sums[i][k];
  }
}

template <class T>
static void multiply(const Product& product, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += 4) {
    const int64_t count = least_of(end - column, 4);
    int64_t row = 0;
    for (; row + 2 <= product.rows; row += 2) multiply_columns<T, 2>(product, row, column, count);
    if (row < product.rows) multiply_columns<T, 1>(product, row, column, count);
  }
}

template <class A>
static void add_rows(const RowSum& sum, int64_t begin, int64_t end) {
  with_type<A>(sum.storage, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t most = 8;  // rows summed before they are added, which rounds less
    for (int64_t row = 0; row < sum.num_rows; row += most) {
      const int64_t count = least_of(sum.num_rows - row, most);
      for (int64_t column = begin; column < end; column += group) {
        const int64_t width = least_of(end - column, group);
        const T* rows = static_cast<const T*>(sum.rows) + row * sum.columns + column;
        A values[most * group], part[group] = {}, *total = static_cast<A*>(sum.total) + column;
        load(values, Rows<const T>{rows, sum.columns}, count, width);
        for (int64_t k = 0; k < count; ++k) {
          for (int64_t i = 0; i < group; ++i) part[i] += values[k * group + i];
        }
        for (int64_t i = 0; i < width; ++i) total[i] += part[i];
      }
    }
  });
}

}  // namespace mingru::MINGRU_ISA
