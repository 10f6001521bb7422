// Products of a few rows with a matrix of weights, sums of rows, and small products whose sums stay in registers, compiled
// once for each instruction set.
#pragma once

#include "convert.h"

namespace mingru::MINGRU_ISA {

// The first two read each value once, so their time is that of the memory, and a call of torch's operator would take about
// as long again.

// Four columns share the loads of x, and two rows those of the weights. OpenMP's clause allows the compiler to sum in
// vectors.
template <class T, int rows>
static void multiply_columns(const Product& product, int64_t row, int64_t column, int64_t count) {
  const int64_t features = product.features;
  const T *weight = static_cast<const T*>(product.weight) + column * features, *bias = static_cast<const T*>(product.bias);
  const T *x = static_cast<const T*>(product.x) + row * product.x_stride, *y = x + (rows - 1) * product.x_stride;
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
static void multiply_few_rows(const Product& product, int64_t begin, int64_t end) {
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

// Compilers keep longer vectors than registers in memory. A product sums so many rows and vectors in registers.
#ifdef MINGRU_AVX512
constexpr int64_t register_bytes = 64;
constexpr int most_rows = 8;
#elif defined(MINGRU_AVX2)
constexpr int64_t register_bytes = 32;
constexpr int most_rows = 4;
#else
constexpr int64_t register_bytes = 16;
constexpr int most_rows = 4;
#endif
constexpr int most_vectors = 3;
template <class A>
constexpr int64_t per_register = register_bytes / sizeof(A);
#ifdef __GNUC__
template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(register_bytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
#else
template <class A>
struct Vector {
  A values[per_register<A>];
  void operator+=(Vector x) {
    for (int64_t i = 0; i < per_register<A>; ++i) values[i] += x.values[i];
  }
  Vector operator*(A x) const {
    Vector product;
    for (int64_t i = 0; i < per_register<A>; ++i) product.values[i] = values[i] * x;
    return product;
  }
};
#endif

// out = left right, or added to it. Both are divided into `parts` along the depth, and the vectors of a row of `right` are
// next to each other. Strides count values.
template <class A>
struct RegisterProduct {
  const A* left;
  int64_t row_stride, left_stride, left_part_stride;
  const A* right;
  int64_t right_stride, right_part_stride, depth;
  A* out;
  int64_t out_stride, vector_stride;
  bool is_added;
};

// Of the rows from `first` on.
template <class A, int parts, int vectors, int rows>
static void multiply_part(const RegisterProduct<A>& product, int64_t first) {
  // Few sums are divided, so that the processor does not wait for the addition before.
  constexpr int chains = rows * vectors * parts <= most_rows * most_vectors ? parts : 1;
  Vector<A> sums[chains][rows][vectors] = {};
  for (int part = 0; part < parts; part += chains) {
    const A* left = product.left + part * product.left_part_stride + first * product.row_stride;
    const A* right = product.right + part * product.right_part_stride;
    for (int64_t k = 0; k < product.depth; ++k, left += product.left_stride, right += product.right_stride) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
        // One by one, because GCC keeps an array that is copied as a whole in memory.
        Vector<A> values[vectors];
#pragma GCC unroll 3
        for (int i = 0; i < vectors; ++i) {
          std::memcpy(&values[i], right + chain * product.right_part_stride + i * per_register<A>, sizeof(values[i]));
        }
#pragma GCC unroll 8
        for (int row = 0; row < rows; ++row) {
          const A factor = left[chain * product.left_part_stride + row * product.row_stride];
#pragma GCC unroll 3
          for (int i = 0; i < vectors; ++i) sums[chain][row][i] += values[i] * factor;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 3
    for (int i = 0; i < vectors; ++i) {
      A* out = product.out + (first + row) * product.out_stride + i * product.vector_stride;
      Vector<A> sum = sums[0][row][i], before;
      for (int chain = 1; chain < chains; ++chain) sum += sums[chain][row][i];
      if (product.is_added) {
        std::memcpy(&before, out, sizeof(before));
        sum += before;
      }
      std::memcpy(out, &sum, sizeof(sum));
    }
  }
}

template <class A, int parts, int vectors, int rows = most_rows>
static void multiply_parts(const RegisterProduct<A>& product, int64_t first, int64_t count) {
  if (count == rows) return multiply_part<A, parts, vectors, rows>(product, first);
  if constexpr (rows > 1) multiply_parts<A, parts, vectors, rows - 1>(product, first, count);
}

// Of any number of rows, in equal parts, and of at most `most_vectors`. The product is not copied, because a copy of what
// was just written waits until it is in the cache.
template <class A, int parts, int vectors = most_vectors>
static void multiply_in_registers(const RegisterProduct<A>& product, int64_t rows, int64_t num_vectors) {
  if constexpr (vectors > 1) {
    if (num_vectors < vectors) return multiply_in_registers<A, parts, vectors - 1>(product, rows, num_vectors);
  }
  for (int64_t tiles = ceil_div(rows, most_rows), first = 0, count; tiles > 0; --tiles, first += count) {
    count = ceil_div(rows - first, tiles);
    multiply_parts<A, parts, vectors>(product, first, count);
  }
}

}  // namespace mingru::MINGRU_ISA
