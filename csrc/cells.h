// The recurrences, each as h_t = a_t h_{t-1} + b_t: what a and b are, and how their gradients reach the inputs.
//
// A cell has `num_inputs` sequences; `x` holds one lane of each, its bias added where `has_bias` allows one. A new recurrence (minLSTM, say) is one more cell.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

struct LinearScan {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = false;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A& a, A& b) {
    a = x[0];
    b = x[1];
  }

  // From delta = dL/dh_t and the state that the step met: the gradients of the inputs, and a.
  template <class A>
  MINGRU_INLINE void gradients(const A* x, A delta, A met, A& a, A* grad) {
    a = x[0];
    grad[0] = delta * met;
    grad[1] = delta;
  }
};

struct Positive {
  // g is the larger of its two halves everywhere, since sigma(v) - 0.5 lies between 0 and v. Written so, neither half can
  // become a branch, which would keep the loop from being vectorised.
  template <class A>
  MINGRU_INLINE A larger(A right, A left) {
    return right > left ? right : left;
  }

  template <class A>
  MINGRU_INLINE A value(A v) {
    return larger(v + A(0.5), logistic(v).plus);
  }

  template <class A>
  MINGRU_INLINE A value(A v, A& derivative) {
    const Logistic<A> s = logistic(v);
    derivative = larger(v >= A(0) ? A(1) : A(0), s.plus * s.minus);
    return larger(v + A(0.5), s.plus);
  }
};

struct Linear {
  template <class A>
  MINGRU_INLINE A value(A v) {
    return v;
  }

  template <class A>
  MINGRU_INLINE A value(A v, A& derivative) {
    derivative = A(1);
    return v;
  }
};

struct Tanh {
  template <class A>
  MINGRU_INLINE A value(A v) {
    return hyperbolic_tangent(v);
  }

  template <class A>
  MINGRU_INLINE A value(A v, A& derivative) {
    const A t = hyperbolic_tangent(v);
    derivative = A(1) - t * t;
    return t;
  }
};

// Inputs: the pre-activations of gate and candidate.
template <class Activation>
struct MinGRU {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = true;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A& a, A& b) {
    const Logistic<A> z = logistic(x[0]);
    a = z.minus;
    b = z.plus * Activation::value(x[1]);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, A delta, A met, A& a, A* grad) {
    const Logistic<A> z = logistic(x[0]);
    A derivative;
    const A candidate = Activation::value(x[1], derivative);
    a = z.minus;
    grad[0] = delta * (candidate - met) * z.plus * z.minus;
    grad[1] = delta * z.plus * derivative;
  }
};

}  // namespace mingru::MINGRU_ISA
