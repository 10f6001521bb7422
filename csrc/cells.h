// The cells: a and b of h_t = a_t h_{t-1} + b_t, and the gradients of the inputs. `x` is one feature of each input, with
// its bias if `has_bias`. If `is_complex`, a and b are complex numbers, given as pairs of features, and `x` is one pair
// of each input. If `is_timed`, the functions take the `Time` of the step too, and return the gradient of dt.
// MINGRU_CELLS in scan.h lists the cells; src/mingru/ops/cells.py is their Python version.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

struct LinearScan {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = false, is_complex = false, is_timed = false;

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
  static constexpr bool has_bias = false, is_complex = true, is_timed = false;

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
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

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
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

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
  static constexpr bool has_bias = true, is_complex = true, is_timed = false;

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
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

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
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

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

// The elapsed time of a step. If `is_bounded`, also log(m) and log(1 - m) of the lower bound m of the decay per unit of
// time.
template <class A, bool is_bounded>
struct Time {
  A dt, log_bound, log_range;
};

// The size of a, exp(-dt softplus(k)) for a gate k, and rest = 1 - size with its derivatives.
template <class A>
struct TimedGate {
  A size, rest, gate_slope, dt_slope;
};

template <class A>
MINGRU_INLINE TimedGate<A> timed_gate(A k, const Time<A, false>& time) {
  const SoftPlus<A> rate = softplus(k);
  const Decay<A> kept = decay(-time.dt * rate.value);
  return {kept.size, kept.rest, kept.size * time.dt * rate.slope, kept.size * rate.value};
}

// With a bound, k becomes the gate l with sigma(-l) = m + (1 - m) sigma(-k).
template <class A>
MINGRU_INLINE TimedGate<A> timed_gate(A k, const Time<A, true>& time) {
  const SoftPlus<A> excess = softplus(k + time.log_bound);
  // k - excess, without the infinity minus infinity of an infinite k.
  const A most = -time.log_bound;
  const A below = log1p_of_unit(power(minus_absolute(k + time.log_bound)));
  TimedGate<A> gate = timed_gate((most < k ? most : k) - below + time.log_range, Time<A, false>{time.dt, A(0), A(0)});
  gate.gate_slope *= A(1) - excess.slope;
  return gate;
}

template <class Activation>
struct TimedMinGRU {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = false, is_complex = false, is_timed = true;

  template <class A, class T>
  MINGRU_INLINE void coefficients(const A* x, const T& time, A& a, A& b) {
    const TimedGate<A> gate = timed_gate(x[0], time);
    a = gate.size;
    b = gate.rest * Activation::value(x[1]);
  }

  template <class A, class T>
  MINGRU_INLINE void gradients(const A* x, const T& time, A delta, A previous, A& a, A* grad, A& grad_dt) {
    const TimedGate<A> gate = timed_gate(x[0], time);
    A derivative;
    const A candidate = Activation::value(x[1], derivative);
    a = gate.size;
    const A change = delta * (candidate - previous);
    grad[0] = change * gate.gate_slope;
    grad[1] = delta * gate.rest * derivative;
    grad_dt = change * gate.dt_slope;
  }
};

// The elapsed time also multiplies the angle.
template <class Activation>
struct TimedRotationMinGRU {
  static constexpr int num_inputs = 2;
  static constexpr bool has_bias = false, is_complex = true, is_timed = true;

  template <class A, class T>
  MINGRU_INLINE void coefficients(const A* x, const T& time, A* a, A* b) {
    const TimedGate<A> gate = timed_gate(x[0], time);
    const Direction<A> e = direction(A(0.25) * time.dt * x[1]);
    a[0] = gate.size * e.cosine;
    a[1] = gate.size * e.sine;
    b[0] = gate.rest * Activation::value(x[2]);
    b[1] = gate.rest * Activation::value(x[3]);
  }

  template <class A, class T>
  MINGRU_INLINE void gradients(
      const A* x, const T& time, const A* delta, const A* previous, A* a, A* grad, A& grad_dt) {
    const TimedGate<A> gate = timed_gate(x[0], time);
    const Direction<A> e = direction(A(0.25) * time.dt * x[1]);
    A derivatives[2];
    const A candidates[2] = {Activation::value(x[2], derivatives[0]), Activation::value(x[3], derivatives[1])};
    a[0] = gate.size * e.cosine;
    a[1] = gate.size * e.sine;
    // The previous state after the rotation.
    const A turned[2] = {e.cosine * previous[0] - e.sine * previous[1], e.sine * previous[0] + e.cosine * previous[1]};
    const A change = delta[0] * (candidates[0] - turned[0]) + delta[1] * (candidates[1] - turned[1]);
    const A turn = A(0.785398163397448309616) * gate.size * (delta[1] * turned[0] - delta[0] * turned[1]);
    grad[0] = change * gate.gate_slope;
    grad[1] = turn * time.dt;
    grad[2] = delta[0] * gate.rest * derivatives[0];
    grad[3] = delta[1] * gate.rest * derivatives[1];
    grad_dt = change * gate.dt_slope + turn * x[1];
  }
};

// A minLSTM is a minGRU with the gate log sigma(i) - log sigma(f).
template <class Activation>
struct TimedMinLSTM {
  static constexpr int num_inputs = 3;
  static constexpr bool has_bias = false, is_complex = false, is_timed = true;

  template <class A, class T>
  MINGRU_INLINE void coefficients(const A* x, const T& time, A& a, A& b) {
    const A inputs[2] = {softplus(-x[0]).value - softplus(-x[1]).value, x[2]};
    TimedMinGRU<Activation>::coefficients(inputs, time, a, b);
  }

  template <class A, class T>
  MINGRU_INLINE void gradients(const A* x, const T& time, A delta, A previous, A& a, A* grad, A& grad_dt) {
    const SoftPlus<A> forget = softplus(-x[0]), input = softplus(-x[1]);
    const A inputs[2] = {forget.value - input.value, x[2]};
    A grads[2];
    TimedMinGRU<Activation>::gradients(inputs, time, delta, previous, a, grads, grad_dt);
    grad[0] = -grads[0] * forget.slope;
    grad[1] = grads[0] * input.slope;
    grad[2] = grads[1];
  }
};

}  // namespace mingru::MINGRU_ISA
