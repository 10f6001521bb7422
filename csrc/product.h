// Products of a few rows with a matrix of weights, and sums of rows, compiled once for each instruction set. They read
// each value once, so their time is that of the memory, and a call of torch's operator would take about as long again.
#pragma once

#include "convert.h"

namespace mingru::MINGRU_ISA {

// Four columns share the loads of x. OpenMP's clause allows the compiler to sum in vectors.
template <class T>
static void multiply(const Product& product, int64_t begin, int64_t end) {
  const int64_t features = product.features, columns = product.columns;
  const T* weight = static_cast<const T*>(product.weight);
  const T* bias = static_cast<const T*>(product.bias);
  for (int64_t column = begin; column < end; column += 4) {
    const int64_t count = least_of(end - column, 4);
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
