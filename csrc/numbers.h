// Numbers of the recurrence besides A, which is float or double: complex numbers, quaternions, and decays. Not
// std::complex, whose product has branches for NaN and infinity.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

template <class A>
using Real = A;

// Two numbers are one number, as Cayley and Dickson construct it: of two real numbers a complex number, and of two
// complex numbers the quaternion re + im j.
template <class Half>
struct Pair {
  Half re, im;
};

template <class A>
using Complex = Pair<A>;
template <class A>
using Quaternion = Pair<Pair<A>>;

// decay * direction, where |direction| is 1. The decay is a fraction, because a decay near 1, rounded to one number,
// would be wrong in its last digit in each of the many steps that the state lasts.
template <class A, class Number>
struct Turn {
  Fraction<A> decay;
  Number direction;
};

// The number whose parts, `stride` apart, begin at `parts`; and the reverse.
template <class Number, int64_t stride, class A>
MINGRU_INLINE Number number_at(const A* parts) {
  if constexpr (std::is_same_v<Number, A>) {
    return *parts;
  } else {
    using Half = decltype(Number::re);
    constexpr int64_t half = static_cast<int64_t>(sizeof(Half) / sizeof(A)) * stride;
    return {number_at<Half, stride>(parts), number_at<Half, stride>(parts + half)};
  }
}

template <int64_t stride, class A, class Number>
MINGRU_INLINE void set_number(A* parts, Number x) {
  if constexpr (std::is_same_v<Number, A>) {
    *parts = x;
  } else {
    set_number<stride>(parts, x.re);
    set_number<stride>(parts + static_cast<int64_t>(sizeof(x.re) / sizeof(A)) * stride, x.im);
  }
}

template <class Number>
MINGRU_INLINE Number conjugate(Number x) {
  if constexpr (std::is_floating_point_v<Number>) return x;
  else return {conjugate(x.re), -x.im};
}

template <class Half>
MINGRU_INLINE Pair<Half> operator-(Pair<Half> x) {
  return {-x.re, -x.im};
}

template <class Half>
MINGRU_INLINE Pair<Half> operator+(Pair<Half> x, Pair<Half> y) {
  return {x.re + y.re, x.im + y.im};
}

template <class Half>
MINGRU_INLINE Pair<Half> operator-(Pair<Half> x, Pair<Half> y) {
  return {x.re - y.re, x.im - y.im};
}

// Of quaternions, the order matters.
template <class Half>
MINGRU_INLINE Pair<Half> operator*(Pair<Half> x, Pair<Half> y) {
  return {x.re * y.re - x.im * conjugate(y.im), x.re * y.im + x.im * conjugate(y.re)};
}

template <class A, class Half, class = std::enable_if_t<std::is_floating_point_v<A>>>
MINGRU_INLINE Pair<Half> operator*(A x, Pair<Half> y) {
  return {x * y.re, x * y.im};
}

// Chooses what was computed with `rest` if the decay is near 1, otherwise what was computed with `value`. Infinity minus
// infinity would be NaN, so an infinite h, whose product with 0 is NaN, is the second case. With two conditions, GCC
// would not vectorize the loop.
template <class A, class Number>
MINGRU_INLINE Number better(const Fraction<A>& a, Number h, Number with_rest, Number with_value) {
  if constexpr (std::is_same_v<Number, A>) return h * A(0) + a.value > A(0.5) ? with_rest : with_value;
  else return {better(a, h.re, with_rest.re, with_value.re), better(a, h.im, with_rest.im, with_value.im)};
}

// a h + b
template <class Number>
MINGRU_INLINE Number next_state(Number a, Number h, Number b) {
  return a * h + b;
}

template <class A, class Number>
MINGRU_INLINE Number next_state(const Fraction<A>& a, Number h, Number b) {
  return better(a, h, h + (b + -a.rest * h), a.value * h + b);
}

template <class A, class Number>
MINGRU_INLINE Number next_state(const Turn<A, Number>& a, Number h, Number b) {
  return next_state(a.decay, a.direction * h, b);
}

// conjugate(a) (carried + grad). The sum is rounded only where rounding does not last.
template <class Number>
MINGRU_INLINE Number previous_gradient(Number a, Number carried, Number grad) {
  return conjugate(a) * (carried + grad);
}

template <class A, class Number>
MINGRU_INLINE Number previous_gradient(const Fraction<A>& a, Number carried, Number grad) {
  const Number sum = carried + grad;
  return better(a, sum, carried + (grad + -a.rest * sum), a.value * sum);
}

template <class A, class Number>
MINGRU_INLINE Number previous_gradient(const Turn<A, Number>& a, Number carried, Number grad) {
  const Number back = conjugate(a.direction);
  return previous_gradient(a.decay, back * carried, back * grad);
}

// Of a quaternion, whose products round more than the sum, one product.
template <class A>
MINGRU_INLINE Quaternion<A> previous_gradient(
    const Turn<A, Quaternion<A>>& a, Quaternion<A> carried, Quaternion<A> grad) {
  return conjugate(a.direction) * previous_gradient(a.decay, carried, grad);
}

// The scalar product of two numbers as vectors, which is the real part of conjugate(x) y.
template <class Number>
MINGRU_INLINE auto dot(Number x, Number y) {
  if constexpr (std::is_floating_point_v<Number>) return x * y;
  else return dot(x.re, y.re) + dot(x.im, y.im);
}

}  // namespace mingru::MINGRU_ISA
