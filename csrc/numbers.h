// Numbers of the recurrence besides A, which is float or double: complex numbers, and those whose parts are known to be 0,
// with which nothing is computed. Compilers may not leave out a multiplication by 0, because of NaN and infinity.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

template <class A>
struct Complex {
  A re, im;
};

template <class A>
struct Imaginary {
  A im;
};

struct Zero {};

template <class A>
MINGRU_INLINE Complex<A> operator+(Complex<A> x, Complex<A> y) {
  return {x.re + y.re, x.im + y.im};
}

template <class A>
MINGRU_INLINE Complex<A> operator-(Complex<A> x) {
  return {-x.re, -x.im};
}

template <class A>
MINGRU_INLINE Complex<A> operator*(Complex<A> x, Complex<A> y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}

template <class A>
MINGRU_INLINE Complex<A> operator*(Complex<A> x, Imaginary<A> y) {
  return {-(x.im * y.im), x.re * y.im};
}

template <class A>
MINGRU_INLINE Complex<A> operator*(A x, Complex<A> y) {
  return {x * y.re, x * y.im};
}

template <class A>
MINGRU_INLINE Complex<A> operator*(Complex<A> x, A y) {
  return y * x;
}

// a h + b
template <class Number, class OfA, class OfB>
MINGRU_INLINE auto next_state(OfA a, Number h, OfB b) {
  if constexpr (std::is_same_v<OfA, Zero>) {
    return b;
  } else if constexpr (std::is_same_v<OfB, Zero>) {
    return h * a;
  } else {
    return h * a + b;
  }
}

template <class A>
MINGRU_INLINE A conjugate(A x) {
  return x;
}

template <class A>
MINGRU_INLINE Complex<A> conjugate(Complex<A> x) {
  return {x.re, -x.im};
}

// The scalar product of two numbers as vectors, which is the real part of conjugate(x) y.
template <class A>
MINGRU_INLINE A dot(A x, A y) {
  return x * y;
}

template <class A>
MINGRU_INLINE A dot(Complex<A> x, Complex<A> y) {
  return x.re * y.re + x.im * y.im;
}

template <class A>
MINGRU_INLINE A dot(Complex<A> x, A y) {
  return x.re * y;
}

template <class A>
MINGRU_INLINE A dot(Complex<A> x, Imaginary<A> y) {
  return x.im * y.im;
}

}  // namespace mingru::MINGRU_ISA
