// exp and the logistic function for one lane; loops over lanes turn them into vector code.
//
// No branch, no table, no errno, and nothing that would need -ffast-math: NaN and infinities come out as the formulas
// say, and results below the smallest normal number are rounded once, not flushed to 0.
#pragma once

#include <cstdint>
#include <cstring>

// A call left standing in a loop over lanes would keep it from being vectorised.
#if defined(_MSC_VER)
#define MINGRU_INLINE static __forceinline
#else
#define MINGRU_INLINE static inline __attribute__((always_inline))
#endif

namespace mingru::MINGRU_ISA {

template <class A>
struct Format;

template <>
struct Format<float> {
  using Int = int32_t;
  using UInt = uint32_t;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -104.0f;  // its exp is below half the smallest subnormal
  static constexpr int lift = 64;           // keeps powers of two that are multiplied with above the subnormals
  static constexpr float drop = 5.42101086242752217e-20f;  // 2^-lift
};

template <>
struct Format<double> {
  using Int = int64_t;
  using UInt = uint64_t;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -746.0;
  static constexpr int lift = 512;
  static constexpr double drop = 7.45834073120020674329e-155;
};

template <class To, class From>
MINGRU_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// (exp(r) - 1) / r for |r| <= ln(2) / 2. Coefficients that make the largest relative error of exp smallest, 4e-9; summed by
// pairs, as the steps of a plain Horner scheme would wait for one another.
MINGRU_INLINE float rise(float r) {
  const float r2 = r * r;
  const float first = 1.0f + 0.4999999403953552f * r;
  const float second = 0.1666651964187622f + 0.04166839271783829f * r;
  const float third = 0.008368780836462975f + 0.0013814468402415514f * r;
  return (first + second * r2) + third * (r2 * r2);
}

// By Taylor: what is left out, r^14 / 14!, is below 5e-18.
MINGRU_INLINE double rise(double r) {
  constexpr double inverse_factorial[] = {
      1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  double sum = inverse_factorial[12];
  for (int n = 11; n >= 0; --n) sum = sum * r + inverse_factorial[n];
  return sum;
}

// exp(x) = (1 + rest) * lifted * drop for x <= 0. A power of two alone could not reach the subnormals.
template <class A>
struct Exponential {
  A rest, lifted;
};

template <class A>
MINGRU_INLINE Exponential<A> exponential(A x) {
  using F = Format<A>;
  using UInt = typename F::UInt;
  x = F::lowest > x ? F::lowest : x;  // NaN stays
  const A shifted = x * A(1.44269504088896340736) + F::rounder;
  const A whole = shifted - F::rounder;
  const A r = (x - whole * F::ln2_high) - whole * F::ln2_low;
  // `whole` stands in the low bits of `shifted`.
  const UInt exponent = bit_cast<UInt>(shifted) - bit_cast<UInt>(A(F::rounder)) + UInt(F::lift + F::bias);
  return {rise(r) * r, bit_cast<A>(exponent << F::mantissa_bits)};
}

template <class A>
MINGRU_INLINE A power(A x) {
  const Exponential<A> e = exponential(x);
  return (A(1) + e.rest) * e.lifted * Format<A>::drop;
}

// -|x|, by its sign bit.
template <class A>
MINGRU_INLINE A minus_absolute(A x) {
  using UInt = typename Format<A>::UInt;
  return bit_cast<A>(bit_cast<UInt>(x) | UInt(1) << (sizeof(A) * 8 - 1));
}

// sigma(x) and sigma(-x), each to full relative precision: 1 - sigma(x) would cancel.
template <class A>
struct Logistic {
  A plus, minus;
};

template <class A>
MINGRU_INLINE Logistic<A> logistic(A x) {
  const A p = power(minus_absolute(x));
  const A large = A(1) / (A(1) + p);
  const A small = p * large;
  const bool left = x < A(0);
  return {left ? small : large, left ? large : small};
}

// The derivative where 1 - tanh(x)^2 would cancel: 4 p / (1 + p)^2 with p = exp(-2|x|).
template <class A>
MINGRU_INLINE A hyperbolic_tangent(A x, A& derivative) {
  // -expm1(-2|x|) / (2 + expm1(-2|x|)): no cancellation near 0.
  const Exponential<A> e = exponential(A(2) * minus_absolute(x));
  const A scale = e.lifted * Format<A>::drop;
  const A expm1 = e.rest * scale + (scale - A(1));
  const A inverse = A(1) / (A(2) + expm1);
  const A size = -expm1 * inverse;
  const A far = A(4) * ((A(1) + e.rest) * scale) * (inverse * inverse);
  derivative = size < A(0.5) ? A(1) - size * size : far;
  return x < A(0) ? -size : size;
}

}  // namespace mingru::MINGRU_ISA
