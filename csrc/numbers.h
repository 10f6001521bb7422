// Numbers of the recurrence besides A, which is float or double: complex numbers, and decays in full precision. Not
// std::complex, whose product has branches for NaN and infinity.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

template <class A>
struct Complex {
  A re, im;
};

// A decay and 1 - decay, both in full relative precision. A decay near 1, rounded to one number, would be wrong in its
// last digit in each of the many steps that the state lasts.
template <class A>
struct Decay {
  A keep, update;
};

// decay * direction, where |direction| is 1.
template <class A, class Number>
struct Turn {
  Decay<A> decay;
  Number direction;
};

template <class A>
MINGRU_INLINE Complex<A> operator+(Complex<A> x, Complex<A> y) {
  return {x.re + y.re, x.im + y.im};
}

template <class A>
MINGRU_INLINE Complex<A> operator-(Complex<A> x, Complex<A> y) {
  return {x.re - y.re, x.im - y.im};
}

template <class A>
MINGRU_INLINE Complex<A> operator*(Complex<A> x, Complex<A> y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}

template <class A>
MINGRU_INLINE Complex<A> operator*(A x, Complex<A> y) {
  return {x * y.re, x * y.im};
}

// i x
template <class A>
MINGRU_INLINE Complex<A> quarter_turn(Complex<A> x) {
  return {-x.im, x.re};
}

// Chooses what was computed with `update` if the decay is near 1, otherwise what was computed with `keep`. Infinity
// minus infinity would be NaN, so an infinite h, whose product with 0 is NaN, is the second case. With two conditions, GCC
// would not vectorize the loop.
template <class A>
MINGRU_INLINE A better(const Decay<A>& a, A h, A with_update, A with_keep) {
  return h * A(0) + a.keep > A(0.5) ? with_update : with_keep;
}

template <class A>
MINGRU_INLINE Complex<A> better(const Decay<A>& a, Complex<A> h, Complex<A> with_update, Complex<A> with_keep) {
  return {better(a, h.re, with_update.re, with_keep.re), better(a, h.im, with_update.im, with_keep.im)};
}

// a h + b
template <class Number>
MINGRU_INLINE Number next_state(Number a, Number h, Number b) {
  return h * a + b;
}

template <class A, class Number>
MINGRU_INLINE Number next_state(const Decay<A>& a, Number h, Number b) {
  return better(a, h, h + (b + -a.update * h), a.keep * h + b);
}

template <class A, class Number>
MINGRU_INLINE Number next_state(const Turn<A, Number>& a, Number h, Number b) {
  return next_state(a.decay, a.direction * h, b);
}

template <class A>
MINGRU_INLINE A conjugate(A x) {
  return x;
}

template <class A>
MINGRU_INLINE Complex<A> conjugate(Complex<A> x) {
  return {x.re, -x.im};
}

// conjugate(a) (carried + grad). The sum is rounded only where rounding does not last.
template <class Number>
MINGRU_INLINE Number previous_gradient(Number a, Number carried, Number grad) {
  return conjugate(a) * (carried + grad);
}

template <class A, class Number>
MINGRU_INLINE Number previous_gradient(const Decay<A>& a, Number carried, Number grad) {
  const Number sum = carried + grad;
  return better(a, sum, carried + (grad + -a.update * sum), a.keep * sum);
}

template <class A, class Number>
MINGRU_INLINE Number previous_gradient(const Turn<A, Number>& a, Number carried, Number grad) {
  const Number back = conjugate(a.direction);
  return previous_gradient(a.decay, back * carried, back * grad);
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

}  // namespace mingru::MINGRU_ISA
