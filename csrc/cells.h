// The cells: a and b of h_t = a_t h_{t-1} + b_t, and the gradients of the inputs. `x` is one feature of each input, with
// its bias if `has_bias`. If `is_complex`, a and b are complex numbers, given as pairs of features, and `x` is one pair
// of each input. If `is_timed`, the functions take the `Time` of the step too, and return the gradient of dt.
// `prepare` computes the exponentials, `num_prepared` numbers `p` that the other functions use. Exponentials are long
// chains of operations that wait for each other, so a processor must work on those of many features at the same time,
// and it sees only some hundred instructions at once: kernels.h prepares many features in a loop of its own.
// The decay of timed cells has a second exponential, of `rates`, which have a loop of their own too.
// MINGRU_CELLS in scan.h lists the cells; src/mingru/ops/cells.py is their Python version.
#pragma once

#include "math.h"

namespace mingru::MINGRU_ISA {

struct LinearScan {
  static constexpr int num_inputs = 2, num_prepared = 0;
  static constexpr bool has_bias = false, is_complex = false, is_timed = false;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, const A*, A& a, A& b) {
    a = x[0];
    b = x[1];
  }

  // Computes a and the gradients of the inputs from delta = dL/dh_t and the previous state.
  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A*, A delta, A previous, A& a, A* grad) {
    a = x[0];
    grad[0] = delta * previous;
    grad[1] = delta;
  }
};

// Inputs: a and b. The gradient of a is delta times the conjugate of the previous state.
struct ComplexLinearScan {
  static constexpr int num_inputs = 2, num_prepared = 0;
  static constexpr bool has_bias = false, is_complex = true, is_timed = false;

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, const A*, A* a, A* b) {
    a[0] = x[0];
    a[1] = x[1];
    b[0] = x[2];
    b[1] = x[3];
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A*, const A* delta, const A* previous, A* a, A* grad) {
    a[0] = x[0];
    a[1] = x[1];
    grad[0] = delta[0] * previous[0] + delta[1] * previous[1];
    grad[1] = delta[1] * previous[0] - delta[0] * previous[1];
    grad[2] = delta[0];
    grad[3] = delta[1];
  }
};

struct Positive {
  static constexpr int num_prepared = 1;

  // g(v) = max(v + 0.5, sigma(v)), because sigma(v) - 0.5 is between 0 and v. A branch would prevent vectorization.
  template <class A>
  MINGRU_INLINE A larger(A right, A left) {
    return right > left ? right : left;
  }

  // For v > 0 the maximum is v + 0.5, so sigma(0) can replace sigma(v). NaN is preserved.
  template <class A>
  MINGRU_INLINE void prepare(A v, A* p) {
    p[0] = power(v > A(0) ? A(0) : v);
  }

  template <class A>
  MINGRU_INLINE A value(A v, const A* p) {
    return larger(v + A(0.5), p[0] / (A(1) + p[0]));
  }

  template <class A>
  MINGRU_INLINE A value(A v, const A* p, A& derivative) {
    const A inverse = A(1) / (A(1) + p[0]);
    const A left = p[0] * inverse;
    derivative = larger(v >= A(0) ? A(1) : A(0), left * inverse);
    return larger(v + A(0.5), left);
  }
};

struct Linear {
  static constexpr int num_prepared = 0;

  template <class A>
  MINGRU_INLINE void prepare(A, A*) {}

  template <class A>
  MINGRU_INLINE A value(A v, const A*) {
    return v;
  }

  template <class A>
  MINGRU_INLINE A value(A v, const A*, A& derivative) {
    derivative = A(1);
    return v;
  }
};

struct Tanh {
  static constexpr int num_prepared = 2;

  template <class A>
  MINGRU_INLINE void prepare(A v, A* p) {
    const Decay<A> e = decay(A(2) * minus_absolute(v));
    p[0] = e.size;
    p[1] = e.rest;
  }

  template <class A>
  MINGRU_INLINE A value(A v, const A* p) {
    A unused;
    return value(v, p, unused);
  }

  template <class A>
  MINGRU_INLINE A value(A v, const A* p, A& derivative) {
    return hyperbolic_tangent(v, Decay<A>{p[0], p[1]}, derivative);
  }
};

// Inputs: gate and candidate.
template <class Activation>
struct MinGRU {
  static constexpr int num_inputs = 2, num_prepared = 1 + Activation::num_prepared;
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

  template <class A>
  MINGRU_INLINE void prepare(const A* x, A* p) {
    p[0] = power(minus_absolute(x[0]));
    Activation::prepare(x[1], p + 1);
  }

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, const A* p, A& a, A& b) {
    const Logistic<A> z = logistic(x[0], p[0]);
    a = z.minus;
    b = z.plus * Activation::value(x[1], p + 1);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A* p, A delta, A previous, A& a, A* grad) {
    const Logistic<A> z = logistic(x[0], p[0]);
    A derivative;
    const A candidate = Activation::value(x[1], p + 1, derivative);
    a = z.minus;
    grad[0] = delta * (candidate - previous) * z.plus * z.minus;
    grad[1] = delta * z.plus * derivative;
  }
};

// Inputs: gate and candidate. a = -tanh(gate / 2) = -+(1 - e) / (1 + e) and 1 - |a| = 2 e / (1 + e), with
// e = exp(-|gate|). Neither cancels.
template <class Activation>
struct SignedMinGRU {
  static constexpr int num_inputs = 2, num_prepared = 2 + Activation::num_prepared;
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

  template <class A>
  MINGRU_INLINE void prepare(const A* x, A* p) {
    const Decay<A> e = decay(minus_absolute(x[0]));
    p[0] = e.size;
    p[1] = e.rest;
    Activation::prepare(x[1], p + 2);
  }

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, const A* p, A& a, A& b) {
    const A inverse = A(1) / (A(1) + p[0]);
    const A size = p[1] * inverse;
    a = x[0] < A(0) ? size : -size;
    b = A(2) * p[0] * inverse * Activation::value(x[1], p + 2);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A* p, A delta, A previous, A& a, A* grad) {
    const A inverse = A(1) / (A(1) + p[0]);
    const A size = p[1] * inverse, rest = A(2) * p[0] * inverse;
    A derivative;
    const A candidate = Activation::value(x[1], p + 2, derivative);
    a = x[0] < A(0) ? size : -size;
    // The derivative of |a| at 0 counts as 0, as that of torch.abs.
    const A signed_candidate = x[0] < A(0) ? -candidate : x[0] > A(0) ? candidate : A(0);
    grad[0] = delta * (signed_candidate + previous) * (A(-0.5) * rest * (A(1) + size));
    grad[1] = delta * rest * derivative;
  }
};

// Inputs: pairs of a gate and an angle in units of pi / 4, and pairs of candidates.
template <class Activation>
struct RotationMinGRU {
  static constexpr int num_inputs = 2, num_prepared = 3 + 2 * Activation::num_prepared;
  static constexpr bool has_bias = true, is_complex = true, is_timed = false;

  template <class A>
  MINGRU_INLINE void prepare(const A* x, A* p) {
    const Direction<A> e = direction(A(0.25) * x[1]);
    p[0] = power(minus_absolute(x[0]));
    p[1] = e.cosine;
    p[2] = e.sine;
    Activation::prepare(x[2], p + 3);
    Activation::prepare(x[3], p + 3 + Activation::num_prepared);
  }

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, const A* p, A* a, A* b) {
    const Logistic<A> z = logistic(x[0], p[0]);
    a[0] = z.minus * p[1];
    a[1] = z.minus * p[2];
    b[0] = z.plus * Activation::value(x[2], p + 3);
    b[1] = z.plus * Activation::value(x[3], p + 3 + Activation::num_prepared);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A* p, const A* delta, const A* previous, A* a, A* grad) {
    const Logistic<A> z = logistic(x[0], p[0]);
    const Direction<A> e = {p[1], p[2]};
    A derivatives[2];
    const A candidates[2] = {
        Activation::value(x[2], p + 3, derivatives[0]),
        Activation::value(x[3], p + 3 + Activation::num_prepared, derivatives[1])};
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
  static constexpr int num_inputs = 3, num_prepared = 3 + Activation::num_prepared;
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

  // By how much log(exp(min(f, 0))) is above log(exp(min(i, 0))).
  template <class A>
  MINGRU_INLINE A ahead_of(const A* x) {
    return (x[0] < A(0) ? x[0] : A(0)) - (x[1] < A(0) ? x[1] : A(0));
  }

  template <class A>
  MINGRU_INLINE void prepare(const A* x, A* p) {
    p[0] = power(minus_absolute(x[0]));
    p[1] = power(minus_absolute(x[1]));
    p[2] = power(minus_absolute(ahead_of(x)));
    Activation::prepare(x[2], p + 3);
  }

  template <class A>
  struct Gates {
    A forget, input;
  };

  template <class A>
  MINGRU_INLINE Gates<A> normalized(const A* x, const A* p) {
    const bool left = ahead_of(x) < A(0);
    const A forget_weight = (left ? p[2] : A(1)) * (A(1) + p[1]);
    const A input_weight = (left ? A(1) : p[2]) * (A(1) + p[0]);
    const A scale = A(1) / (forget_weight + input_weight);
    return {forget_weight * scale, input_weight * scale};
  }

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, const A* p, A& a, A& b) {
    const Gates<A> s = normalized(x, p);
    a = s.forget;
    b = s.input * Activation::value(x[2], p + 3);
  }

  template <class A>
  MINGRU_INLINE A logistic_of_minus(A x, A p) {
    return (x < A(0) ? A(1) : p) / (A(1) + p);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A* p, A delta, A previous, A& a, A* grad) {
    const Gates<A> s = normalized(x, p);
    A derivative;
    const A candidate = Activation::value(x[2], p + 3, derivative);
    a = s.forget;
    const A shifted = delta * (candidate - previous) * s.forget * s.input;
    grad[0] = -shifted * logistic_of_minus(x[0], p[0]);
    grad[1] = shifted * logistic_of_minus(x[1], p[1]);
    grad[2] = delta * s.input * derivative;
  }
};

// Inputs: forget gate f, input gate i and candidate. The gates are independent: a = sigma(f), b = sigma(i) candidate.
template <class Activation>
struct UnnormalizedMinLSTM {
  static constexpr int num_inputs = 3, num_prepared = 2 + Activation::num_prepared;
  static constexpr bool has_bias = true, is_complex = false, is_timed = false;

  template <class A>
  MINGRU_INLINE void prepare(const A* x, A* p) {
    p[0] = power(minus_absolute(x[0]));
    p[1] = power(minus_absolute(x[1]));
    Activation::prepare(x[2], p + 2);
  }

  template <class A>
  MINGRU_INLINE void coefficients(const A* x, const A* p, A& a, A& b) {
    a = logistic(x[0], p[0]).plus;
    b = logistic(x[1], p[1]).plus * Activation::value(x[2], p + 2);
  }

  template <class A>
  MINGRU_INLINE void gradients(const A* x, const A* p, A delta, A previous, A& a, A* grad) {
    const Logistic<A> forget = logistic(x[0], p[0]), input = logistic(x[1], p[1]);
    A derivative;
    const A candidate = Activation::value(x[2], p + 2, derivative);
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

// The size of a is exp(-dt rate). The rate of a gate k is softplus(k), with the derivative `slope`. `p` is the power that
// `prepare_rate` returns.
template <class A>
MINGRU_INLINE A prepare_rate(A k, const Time<A, false>&) {
  return power(minus_absolute(k));
}

template <class A>
MINGRU_INLINE SoftPlus<A> rate_of(A k, A p, const Time<A, false>&) {
  return softplus(k, p);
}

// With a bound, k becomes the gate l with sigma(-l) = m + (1 - m) sigma(-k).
template <class A>
MINGRU_INLINE A prepare_rate(A k, const Time<A, true>& time) {
  return power(minus_absolute(k + time.log_bound));
}

template <class A>
MINGRU_INLINE SoftPlus<A> rate_of(A k, A p, const Time<A, true>& time) {
  const SoftPlus<A> excess = softplus(k + time.log_bound, p);
  // k - excess, without the infinity minus infinity of an infinite k.
  const A most = -time.log_bound;
  const A bounded = (most < k ? most : k) - log1p_of_unit(p) + time.log_range;
  const SoftPlus<A> rate = softplus(bounded, power(minus_absolute(bounded)));
  return {rate.value, rate.slope * (A(1) - excess.slope)};
}

// The rate and its slope are `r`.
template <class Activation>
struct TimedMinGRU {
  static constexpr int num_inputs = 2, num_prepared = 1 + Activation::num_prepared;
  static constexpr bool has_bias = false, is_complex = false, is_timed = true;

  template <class A, class T>
  MINGRU_INLINE void prepare(const A* x, const T& time, A* p) {
    p[0] = prepare_rate(x[0], time);
    Activation::prepare(x[1], p + 1);
  }

  template <class A, class T>
  MINGRU_INLINE SoftPlus<A> rates(const A* x, const A* p, const T& time) {
    return rate_of(x[0], p[0], time);
  }

  template <class A, class T>
  MINGRU_INLINE void coefficients(const A* x, const A* p, const SoftPlus<A>& rate, const T& time, A& a, A& b) {
    const Decay<A> kept = decay(-time.dt * rate.value);
    a = kept.size;
    b = kept.rest * Activation::value(x[1], p + 1);
  }

  template <class A, class T>
  MINGRU_INLINE void gradients(
      const A* x, const A* p, const SoftPlus<A>& rate, const T& time, A delta, A previous, A& a, A* grad, A& grad_dt) {
    const Decay<A> kept = decay(-time.dt * rate.value);
    A derivative;
    const A candidate = Activation::value(x[1], p + 1, derivative);
    a = kept.size;
    const A change = delta * (candidate - previous) * kept.size;
    grad[0] = change * time.dt * rate.slope;
    grad[1] = delta * kept.rest * derivative;
    grad_dt = change * rate.value;
  }
};

// The elapsed time also multiplies the angle.
template <class Activation>
struct TimedRotationMinGRU {
  static constexpr int num_inputs = 2, num_prepared = 3 + 2 * Activation::num_prepared;
  static constexpr bool has_bias = false, is_complex = true, is_timed = true;

  template <class A, class T>
  MINGRU_INLINE void prepare(const A* x, const T& time, A* p) {
    const Direction<A> e = direction(A(0.25) * time.dt * x[1]);
    p[0] = prepare_rate(x[0], time);
    p[1] = e.cosine;
    p[2] = e.sine;
    Activation::prepare(x[2], p + 3);
    Activation::prepare(x[3], p + 3 + Activation::num_prepared);
  }

  template <class A, class T>
  MINGRU_INLINE SoftPlus<A> rates(const A* x, const A* p, const T& time) {
    return rate_of(x[0], p[0], time);
  }

  template <class A, class T>
  MINGRU_INLINE void coefficients(const A* x, const A* p, const SoftPlus<A>& rate, const T& time, A* a, A* b) {
    const Decay<A> kept = decay(-time.dt * rate.value);
    a[0] = kept.size * p[1];
    a[1] = kept.size * p[2];
    b[0] = kept.rest * Activation::value(x[2], p + 3);
    b[1] = kept.rest * Activation::value(x[3], p + 3 + Activation::num_prepared);
  }

  template <class A, class T>
  MINGRU_INLINE void gradients(
      const A* x, const A* p, const SoftPlus<A>& rate, const T& time, const A* delta, const A* previous, A* a, A* grad,
      A& grad_dt) {
    const Decay<A> kept = decay(-time.dt * rate.value);
    const Direction<A> e = {p[1], p[2]};
    A derivatives[2];
    const A candidates[2] = {
        Activation::value(x[2], p + 3, derivatives[0]),
        Activation::value(x[3], p + 3 + Activation::num_prepared, derivatives[1])};
    a[0] = kept.size * e.cosine;
    a[1] = kept.size * e.sine;
    // The previous state after the rotation.
    const A turned[2] = {e.cosine * previous[0] - e.sine * previous[1], e.sine * previous[0] + e.cosine * previous[1]};
    const A change =
        (delta[0] * (candidates[0] - turned[0]) + delta[1] * (candidates[1] - turned[1])) * kept.size;
    const A turn = A(0.785398163397448309616) * kept.size * (delta[1] * turned[0] - delta[0] * turned[1]);
    grad[0] = change * time.dt * rate.slope;
    grad[1] = turn * time.dt;
    grad[2] = delta[0] * kept.rest * derivatives[0];
    grad[3] = delta[1] * kept.rest * derivatives[1];
    grad_dt = change * rate.value + turn * x[1];
  }
};

// A minLSTM is a minGRU with the gate log sigma(i) - log sigma(f).
template <class Activation>
struct TimedMinLSTM {
  static constexpr int num_inputs = 3, num_prepared = 2 + Activation::num_prepared;
  static constexpr bool has_bias = false, is_complex = false, is_timed = true;

  template <class A, class T>
  MINGRU_INLINE void prepare(const A* x, const T&, A* p) {
    p[0] = power(minus_absolute(x[0]));
    p[1] = power(minus_absolute(x[1]));
    Activation::prepare(x[2], p + 2);
  }

  template <class A, class T>
  MINGRU_INLINE SoftPlus<A> rates(const A* x, const A* p, const T& time) {
    const A gate = softplus(-x[0], p[0]).value - softplus(-x[1], p[1]).value;
    return rate_of(gate, prepare_rate(gate, time), time);
  }

  template <class A, class T>
  MINGRU_INLINE void coefficients(const A* x, const A* p, const SoftPlus<A>& rate, const T& time, A& a, A& b) {
    const A inputs[2] = {A(0), x[2]};
    TimedMinGRU<Activation>::coefficients(inputs, p + 1, rate, time, a, b);
  }

  template <class A, class T>
  MINGRU_INLINE void gradients(
      const A* x, const A* p, const SoftPlus<A>& rate, const T& time, A delta, A previous, A& a, A* grad, A& grad_dt) {
    const A inputs[2] = {A(0), x[2]};
    A grads[2];
    TimedMinGRU<Activation>::gradients(inputs, p + 1, rate, time, delta, previous, a, grads, grad_dt);
    grad[0] = -grads[0] * softplus(-x[0], p[0]).slope;
    grad[1] = grads[0] * softplus(-x[1], p[1]).slope;
    grad[2] = grads[1];
  }
};

}  // namespace mingru::MINGRU_ISA
