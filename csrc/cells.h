// The cells: a and b of h_t = a_t h_{t-1} + b_t, and the gradients of the inputs. `x` is one feature of each input, with
// its bias if `has_bias`. If `is_complex`, a and b are complex numbers, given as pairs of features, and `x` is one pair
// of each input. MINGRU_CELLS in scan.h lists the cells; src/mingru/ops/cells.py is their Python version.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

struct LinearScan {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = false, is_complex = false;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A& a, A& b) {
    a = x[0];
    b = x[1];
  }

  // Computes a and the gradients of the inputs from delta = dL/dh_t and the previous state.
  template <class A>
  MINGRU_INLINE void gradients(const A* x, A delta, A previous, A& a, A* grad) {
    a = x[0];
    grad[0] = delta * previous;
    grad[1] = delta;
  }
};

// Inputs: a and b. The gradient of a is delta times the conjugate of the previous state.
struct ComplexLinearScan {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = false, is_complex = true;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A* a, A* b) {
    a[0] = x[0];
    a[1] = x[1];
    b[0] = x[2];
    b[1] = x[3];
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A* delta, const A* previous, A* a, A* grad) {
    a[0] = x[0];
    a[1] = x[1];
    grad[0] = delta[0] * previous[0] + delta[1] * previous[1];
    grad[1] = delta[1] * previous[0] - delta[0] * previous[1];
    grad[2] = delta[0];
    grad[3] = delta[1];
  }
};

struct Positive {
  // g(v) = max(v + 0.5, sigma(v)), because sigma(v) - 0.5 is between 0 and v. A branch would prevent vectorization.
  template <class A>
  MINGRU_INLINE A larger(A right, A left) {
    return right > left ? right : left;
  }

  template <class A>
  MINGRU_INLINE A value(A v) {
    // For v > 0 the maximum is v + 0.5, so sigma(0) can replace sigma(v). NaN is preserved.
    const A p = power(v > A(0) ? A(0) : v);
    return larger(v + A(0.5), p / (A(1) + p));
  }

  template <class A>
  MINGRU_INLINE A value(A v, A& derivative) {
    const A p = power(v > A(0) ? A(0) : v);
    const A inverse = A(1) / (A(1) + p);
    const A left = p * inverse;
    derivative = larger(v >= A(0) ? A(1) : A(0), left * inverse);
    return larger(v + A(0.5), left);
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
    A unused;
    return hyperbolic_tangent(v, unused);
  }

  template <class A>
  MINGRU_INLINE A value(A v, A& derivative) {
    return hyperbolic_tangent(v, derivative);
  }
};

// Inputs: gate and candidate.
template <class Activation>
struct MinGRU {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = true, is_complex = false;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A& a, A& b) {
    const Logistic<A> z = logistic(x[0]);
    a = z.minus;
    b = z.plus * Activation::value(x[1]);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, A delta, A previous, A& a, A* grad) {
    const Logistic<A> z = logistic(x[0]);
    A derivative;
    const A candidate = Activation::value(x[1], derivative);
    a = z.minus;
    grad[0] = delta * (candidate - previous) * z.plus * z.minus;
    grad[1] = delta * z.plus * derivative;
  }
};

// Inputs: gate and candidate. a = -tanh(gate / 2). Neither |a| nor 1 - |a| cancels.
template <class Activation>
struct SignedMinGRU {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = true, is_complex = false;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A& a, A& b) {
    const HalfTangent<A> gate = half_tangent(x[0]);
    a = x[0] < A(0) ? gate.size : -gate.size;
    b = gate.rest * Activation::value(x[1]);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, A delta, A previous, A& a, A* grad) {
    const HalfTangent<A> gate = half_tangent(x[0]);
    A derivative;
    const A candidate = Activation::value(x[1], derivative);
    a = x[0] < A(0) ? gate.size : -gate.size;
    // The derivative of |a| at 0 counts as 0, as that of torch.abs.
    const A signed_candidate = x[0] < A(0) ? -candidate : x[0] > A(0) ? candidate : A(0);
    grad[0] = delta * (signed_candidate + previous) * (A(-0.5) * gate.rest * (A(1) + gate.size));
    grad[1] = delta * gate.rest * derivative;
  }
};

// Inputs: pairs of a gate and an angle in units of pi / 4, and pairs of candidates.
template <class Activation>
struct RotationMinGRU {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = true, is_complex = true;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A* a, A* b) {
    const Logistic<A> z = logistic(x[0]);
    const Direction<A> e = direction(A(0.25) * x[1]);
    a[0] = z.minus * e.cosine;
    a[1] = z.minus * e.sine;
    b[0] = z.plus * Activation::value(x[2]);
    b[1] = z.plus * Activation::value(x[3]);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A* delta, const A* previous, A* a, A* grad) {
    const Logistic<A> z = logistic(x[0]);
    const Direction<A> e = direction(A(0.25) * x[1]);
    A derivatives[2];
    const A candidates[2] = {Activation::value(x[2], derivatives[0]), Activation::value(x[3], derivatives[1])};
    a[0] = z.minus * e.cosine;
    a[1] = z.minus * e.sine;
    // The previous state after the rotation.
    const A turned[2] = {e.cosine * previous[0] - e.sine * previous[1], e.sine * previous[0] + e.cosine * previous[1]};
    const A change = delta[0] * (candidates[0] - turned[0]) + delta[1] * (candidates[1] - turned[1]);
    grad[0] = z.plus * z.minus * change;
    grad[1] = A(0.785398163397448309616) * z.minus * (delta[1] * turned[0] - delta[0] * turned[1]);
    grad[2] = delta[0] * z.plus * derivatives[0];
    grad[3] = delta[1] * z.plus * derivatives[1];
  }
};

// Inputs: forget gate f, input gate i and candidate. The gates are normalized: a = sigma(f) / (sigma(f) + sigma(i)).
// With sigma(x) = exp(min(x, 0)) / (1 + exp(-|x|)) and the larger power divided out, nothing overflows or cancels. The
// sum of the gates is 1 even if both sigmoids underflow.
template <class Activation>
struct MinLSTM {
  static constexpr int num_inputs = 3;
  static constexpr bool has_bias = true, is_complex = false;

  template <class A>
  struct Gates {
    A forget, input;
    A forget_power, input_power;  // exp(-|f|), exp(-|i|)
  };

  template <class A>
  MINGRU_INLINE Gates<A> normalized(A forget, A input) {
    const A forget_power = power(minus_absolute(forget)), input_power = power(minus_absolute(input));
    const A ahead = (forget < A(0) ? forget : A(0)) - (input < A(0) ? input : A(0));
    const A behind = power(minus_absolute(ahead));
    const bool left = ahead < A(0);
    const A forget_weight = (left ? behind : A(1)) * (A(1) + input_power);
    const A input_weight = (left ? A(1) : behind) * (A(1) + forget_power);
    const A scale = A(1) / (forget_weight + input_weight);
    return {forget_weight * scale, input_weight * scale, forget_power, input_power};
  }

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A& a, A& b) {
    const Gates<A> s = normalized(x[0], x[1]);
    a = s.forget;
    b = s.input * Activation::value(x[2]);
  }

  template <class A>
  MINGRU_INLINE A logistic_of_minus(A x, A power) {
    return (x < A(0) ? A(1) : power) / (A(1) + power);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, A delta, A previous, A& a, A* grad) {
    const Gates<A> s = normalized(x[0], x[1]);
    A derivative;
    const A candidate = Activation::value(x[2], derivative);
    a = s.forget;
    const A shifted = delta * (candidate - previous) * s.forget * s.input;
    grad[0] = -shifted * logistic_of_minus(x[0], s.forget_power);
    grad[1] = shifted * logistic_of_minus(x[1], s.input_power);
    grad[2] = delta * s.input * derivative;
  }
};

// Inputs: forget gate f, input gate i and candidate. The gates are independent: a = sigma(f), b = sigma(i) candidate.
template <class Activation>
struct UnnormalizedMinLSTM {
  static constexpr int num_inputs = 3;
  static constexpr bool has_bias = true, is_complex = false;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, A& a, A& b) {
    a = logistic(x[0]).plus;
    b = logistic(x[1]).plus * Activation::value(x[2]);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, A delta, A previous, A& a, A* grad) {
    const Logistic<A> forget = logistic(x[0]), input = logistic(x[1]);
    A derivative;
    const A candidate = Activation::value(x[2], derivative);
    a = forget.plus;
    grad[0] = delta * previous * forget.plus * forget.minus;
    grad[1] = delta * candidate * input.plus * input.minus;
    grad[2] = delta * input.plus * derivative;
  }
};

}  // namespace mingru::MINGRU_ISA
