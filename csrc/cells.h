// The cells: `step` returns a and b of h_t = a_t h_{t-1} + b_t, and the gradients of its inputs. `x` is one feature of
// each input, or the features of one number of each input: two of complex cells, four of quaternions. `time` is the time of the step: see `decay`.
// `h` is h_{t-1}, and `delta` the gradient of h_t. `memo` marks what is computed ahead if a loop is split: see lanes.h.
// Gradients that are not used cost nothing, because all functions are inlined.
// MINGRU_CELLS in scan.h lists the cells; src/mingru/ops/cells.py is their Python version.
#pragma once

#include "numbers.h"

namespace mingru::MINGRU_ISA {

// The gradients are in the order of the inputs. That of the elapsed time is the last.
template <class OfA, class Number, class A, int count>
struct Step {
  OfA a;
  Number b;
  A grads[count];
};

template <class OfA, class Number, class A, class... Rest>
Step(OfA, Number, A, Rest...) -> Step<OfA, Number, A, 1 + sizeof...(Rest)>;

template <template <class> class Of>
struct CellOf {
  template <class A>
  using Number = Of<A>;
};

using RealCell = CellOf<Real>;

// Activations of the candidate.
struct Positive {
  // g(v) = max(v + 0.5, sigma(v)), because sigma(v) - 0.5 is between 0 and v. A branch would prevent vectorization. For
  // v > 0 the maximum is v + 0.5, so sigma(0) can replace sigma(v). NaN is preserved.
  template <class A, class Memo>
  MINGRU_INLINE Value<A> of(A v, Memo& memo) {
    const A p = memo(0, power(v > A(0) ? A(0) : v));
    const A inverse = A(1) / (A(1) + p);
    const Value<A> right = {v + A(0.5), v >= A(0) ? A(1) : A(0)}, left = {p * inverse, p * inverse * inverse};
    return {
        right.value > left.value ? right.value : left.value, right.slope > left.slope ? right.slope : left.slope};
  }
};

struct Linear {
  template <class A, class Memo>
  MINGRU_INLINE Value<A> of(A v, Memo&) {
    return {v, A(1)};
  }
};

struct Tanh {
  // If 1 - tanh(v)^2 would cancel, the derivative is computed as 4 exp(-2|v|) / (1 + exp(-2|v|))^2.
  template <class A, class Memo>
  MINGRU_INLINE Value<A> of(A v, Memo& memo) {
    const Fraction<A> e = memo(0, power_and_rest(A(2) * minus_absolute(v)));
    return by(v, e, A(1) / (A(1) + e.value));
  }

  // From e = exp(-2|v|) and 1 / (1 + e).
  template <class A>
  MINGRU_INLINE Value<A> by(A v, const Fraction<A>& e, A inverse) {
    const A size = e.rest * inverse;
    const A far = A(4) * e.value * (inverse * inverse);
    return {v < A(0) ? -size : size, size < A(0.5) ? A(1) - size * size : far};
  }
};

// The time of a step, if the decay depends on it not at all, on the elapsed time, or also on a lower bound m per unit of
// time.
template <class A>
struct Untimed {
  using Accumulation = A;
  static constexpr A dt = 1;
};

template <class A>
struct Timed : Untimed<A> {
  A dt;
  A endless_above;  // see `rate_at`; infinity unless the elapsed time is infinite
};

template <class A>
struct Bounded : Timed<A> {
  A log_bound, log_range;  // log(m) and log(1 - m)
};

// The decay of the state by a gate z = sigma(k): 1 - z, or r^dt with r = m + (1 - m) (1 - z).
template <class A>
struct OneGate {
  A keep, update;
  A by_gate, by_dt;  // derivatives of `keep`
};

template <class A, class Memo>
MINGRU_INLINE OneGate<A> decay(A k, const Untimed<A>&, Memo& memo) {
  const Fraction<A> z = logistic(k, memo);
  return {z.rest, z.value, -(z.value * z.rest), A(0)};
}

// r is exp(-rate).
template <class A, class Memo>
MINGRU_INLINE Value<A> rate_of(A k, const Timed<A>&, Memo& memo) {
  return softplus(k, memo);
}

// k becomes the gate l with sigma(-l) = m + (1 - m) sigma(-k).
template <class A, class Memo>
MINGRU_INLINE Value<A> rate_of(A k, const Bounded<A>& time, Memo& memo) {
  const A above = k + time.log_bound, most = -time.log_bound;
  const A p = memo(0, power(minus_absolute(above)));
  // k - softplus(above) + log(1 - m), without the infinity minus infinity of an infinite k.
  const A bounded = (most < k ? most : k) - log1p_of_unit(p) + time.log_range;
  AtOnce at_once;
  const Value<A> rate = softplus(bounded, at_once);
  // sigma(-above)
  return {rate.value, rate.slope * ((above < A(0) ? A(1) : p) / (A(1) + p))};
}

// After an infinite time nothing is left, even if the rate of k underflows, unless k is -infinity, which forgets nothing.
// The elapsed time is then 1, so that the derivative by the gate, which is 0, is not 0 times infinity.
template <class Time, class Memo, class A = typename Time::Accumulation>
MINGRU_INLINE Value<A> rate_at(A k, const Time& time, Memo& memo) {
  const Value<A> rate = rate_of(k, time, memo);
  return {k > time.endless_above ? Format<A>::infinity : rate.value, rate.slope};
}

template <class Time, class A = typename Time::Accumulation>
MINGRU_INLINE OneGate<A> decay_at(const Value<A>& rate, const Time& time) {
  const Fraction<A> kept = power_and_rest(-time.dt * rate.value);
  const A by_dt = kept.value == A(0) ? A(0) : -(kept.value * rate.value);
  return {kept.value, kept.rest, -(kept.value * time.dt * rate.slope), by_dt};
}

template <class Time, class Memo, class A = typename Time::Accumulation>
MINGRU_INLINE OneGate<A> decay(A k, const Time& time, Memo& memo) {
  return decay_at(memo(1, rate_at(k, time, memo)), time);
}

// The same for the input and forget gates of a minLSTM, which are normalized: keep = sigma(f) / (sigma(f) + sigma(i)).
template <class A>
struct TwoGates {
  A keep, update;
  A by_forget, by_input, by_dt;  // derivatives of `keep`
};

// sigma(x) = exp(min(x, 0)) / (1 + exp(-|x|)). With the larger power divided out, nothing overflows or cancels. The sum
// of the gates is 1 even if both sigmoids underflow.
template <class A, class Memo>
MINGRU_INLINE TwoGates<A> two_gates(A f, A i, const Untimed<A>&, Memo& memo) {
  const A forget_power = memo(0, power(minus_absolute(f))), input_power = memo(0, power(minus_absolute(i)));
  // By how much log(exp(min(f, 0))) is above log(exp(min(i, 0))).
  const A ahead = (f < A(0) ? f : A(0)) - (i < A(0) ? i : A(0));
  const A ratio = memo(0, power(minus_absolute(ahead)));
  const bool left = ahead < A(0);
  const A forget_weight = (left ? ratio : A(1)) * (A(1) + input_power);
  const A input_weight = (left ? A(1) : ratio) * (A(1) + forget_power);
  const A scale = A(1) / (forget_weight + input_weight);
  const A keep = forget_weight * scale, update = input_weight * scale;
  const A change = keep * update;
  const A not_forget = (f < A(0) ? A(1) : forget_power) / (A(1) + forget_power);
  const A not_input = (i < A(0) ? A(1) : input_power) / (A(1) + input_power);
  return {keep, update, change * not_forget, -(change * not_input), A(0)};
}

// A minGRU with the gate log sigma(i) - log sigma(f).
template <class Time, class Memo, class A = typename Time::Accumulation>
MINGRU_INLINE TwoGates<A> two_gates(A f, A i, const Time& time, Memo& memo) {
  const Value<A> not_forget = softplus(-f, memo), not_input = softplus(-i, memo);
  AtOnce at_once;
  const OneGate<A> d = decay_at(memo(1, rate_at(not_forget.value - not_input.value, time, at_once)), time);
  return {d.keep, d.update, -(d.by_gate * not_forget.slope), d.by_gate * not_input.slope, d.by_dt};
}

template <class A>
constexpr A quarter_pi = A(0.785398163397448309616);

// How the angle u, in units of pi / 4, turns the state in the time of a step. Eight units are a whole turn. The
// remainder leaves what `direction` takes, also of large numbers: floats above 2^32 are multiples of 512.
template <class A>
MINGRU_INLINE Direction<A> turn_of(A u, const Untimed<A>&) {
  return direction(A(0.25) * remainder(u, A(1024)));
}

// The product is not rounded before whole turns are subtracted: `lost` is what its rounding leaves out.
template <class Time, class A = typename Time::Accumulation>
MINGRU_INLINE Direction<A> turn_of(A u, const Time& time) {
  const A product = time.dt * u, lost = std::fma(time.dt, u, -product);
  const A turned = remainder(remainder(product, A(1024)), A(8)) + remainder(remainder(lost, A(1024)), A(8));
  return direction(A(0.25) * turned);
}

// Inputs: a and b.
template <template <class> class Of>
struct ScanOf : CellOf<Of> {
  template <class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Untimed<A>&, Of<A> h, Of<A> delta, Memo&) {
    constexpr int parts = sizeof(Of<A>) / sizeof(A);
    Step<Of<A>, Of<A>, A, 2 * parts> step = {number_at<Of<A>, 1>(x), number_at<Of<A>, 1>(x + parts), {}};
    set_number<1>(step.grads, delta * conjugate(h));
    set_number<1>(step.grads + parts, delta);
    return step;
  }
};

// Inputs: gate and candidate.
template <class Activation>
struct MinGRU : RealCell {
  template <class Time, class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Time& time, A h, A delta, Memo& memo) {
    const auto d = decay(x[0], time, memo);
    const Value<A> c = Activation::of(x[1], memo);
    const A by_keep = delta * (h - c.value);
    return Step{
        Fraction<A>{d.keep, d.update}, d.update * c.value, d.by_gate * by_keep, d.update * c.slope * delta,
        d.by_dt * by_keep};
  }
};

// Inputs: gate and candidate. a = -tanh(gate / 2) = -+(1 - e) / (1 + e) and 1 - |a| = 2 e / (1 + e), with
// e = exp(-|gate|). Neither cancels.
template <class Activation>
struct SignedMinGRU : RealCell {
  template <class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Untimed<A>&, A h, A delta, Memo& memo) {
    const Fraction<A> e = memo(0, power_and_rest(minus_absolute(x[0])));
    const Value<A> c = Activation::of(x[1], memo);
    const A inverse = A(1) / (A(1) + e.value);
    const A size = e.rest * inverse, rest = A(2) * e.value * inverse;
    const A by_gate = A(-0.5) * rest * (A(1) + size);
    // The derivative of |a| at 0 counts as 0, as that of torch.abs.
    const A signed_candidate = x[0] < A(0) ? -c.value : x[0] > A(0) ? c.value : A(0);
    return Step{
        Turn<A, A>{{size, rest}, x[0] < A(0) ? A(1) : A(-1)}, rest * c.value,
        by_gate * (delta * (h + signed_candidate)), rest * c.slope * delta};
  }
};

// Inputs: pairs of a gate and an angle in units of pi / 4, and pairs of candidates.
template <class Activation>
struct RotationMinGRU : CellOf<Complex> {
  template <class Time, class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Time& time, Complex<A> h, Complex<A> delta, Memo& memo) {
    const auto d = decay(x[0], time, memo);
    const Direction<A> toward = memo(0, turn_of(x[1], time));
    const Value<A> first = Activation::of(x[2], memo), second = Activation::of(x[3], memo);
    const Complex<A> c{first.value, second.value}, e{toward.cosine, toward.sine}, turned = h * e;
    const A by_keep = dot(delta, turned - c), by_turn = dot(delta, Complex<A>{-turned.im, turned.re});  // i turned
    return Step{
        Turn<A, Complex<A>>{{d.keep, d.update}, e}, d.update * c, d.by_gate * by_keep,
        d.keep * (quarter_pi<A> * time.dt) * by_turn, d.update * first.slope * delta.re,
        d.update * second.slope * delta.im, d.by_dt * by_keep + d.keep * (quarter_pi<A> * x[1]) * by_turn};
  }
};

// Inputs: groups of a gate and a vector v of three numbers, in units of pi / 4, and groups of candidates. The state turns
// by cos(phi) + sin(phi) v / |v|, with the angle phi of |v|.
template <class Activation>
struct QuaternionMinGRU : CellOf<Quaternion> {
  template <class Time, class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Time& time, Quaternion<A> h, Quaternion<A> delta, Memo& memo) {
    const auto d = decay(x[0], time, memo);
    // A vector whose square overflows counts as 0, because nothing is known about its angle. Infinity becomes NaN.
    const A sum = x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
    const bool is_known = sum < Format<A>::infinity;
    const A square = (is_known ? sum : A(0)) + A(1e-30), factor = is_known ? A(1) : A(0);  // not 0, to divide by it
    const A size = memo(0, std::sqrt(square)), inverse = A(1) / size;
    const Direction<A> toward = memo(0, turn_of(size, time));
    const A unit = quarter_pi<A> * time.dt, sine = toward.sine * inverse;
    const A v1 = factor * x[1], v2 = factor * x[2], v3 = factor * x[3];
    const Quaternion<A> q{{toward.cosine, sine * v1}, {sine * v2, sine * v3}}, turned = q * h;
    const Value<A> c0 = Activation::of(x[4], memo), c1 = Activation::of(x[5], memo);
    const Value<A> c2 = Activation::of(x[6], memo), c3 = Activation::of(x[7], memo);
    const Quaternion<A> c{{c0.value, c1.value}, {c2.value, c3.value}};
    const A by_keep = dot(delta, turned - c);
    // The gradient of q, its part along v, and what each component of v adds to its gradient in the direction of v.
    const Quaternion<A> by_q = d.keep * (delta * conjugate(h));
    const A part = v1 * by_q.re.im + v2 * by_q.im.re + v3 * by_q.im.im;
    const A lengthwise = (unit * toward.cosine - sine) * (inverse * inverse) * part - unit * sine * by_q.re.re;
    return Step{
        Turn<A, Quaternion<A>>{{d.keep, d.update}, q}, d.update * c, d.by_gate * by_keep,
        sine * by_q.re.im + lengthwise * v1, sine * by_q.im.re + lengthwise * v2, sine * by_q.im.im + lengthwise * v3,
        d.update * c0.slope * delta.re.re, d.update * c1.slope * delta.re.im, d.update * c2.slope * delta.im.re,
        d.update * c3.slope * delta.im.im,
        d.by_dt * by_keep + quarter_pi<A> * (toward.cosine * part - sine * square * by_q.re.re)};
  }
};

// Inputs: forget gate, input gate and candidate.
template <class Activation>
struct MinLSTM : RealCell {
  template <class Time, class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Time& time, A h, A delta, Memo& memo) {
    const auto d = two_gates(x[0], x[1], time, memo);
    const Value<A> c = Activation::of(x[2], memo);
    const A by_keep = delta * (h - c.value);
    return Step{
        Fraction<A>{d.keep, d.update}, d.update * c.value, d.by_forget * by_keep, d.by_input * by_keep,
        d.update * c.slope * delta, d.by_dt * by_keep};
  }
};

// Inputs: forget gate f, input gate i and candidate. The gates are independent: a = sigma(f), b = sigma(i) candidate.
template <class Activation>
struct UnnormalizedMinLSTM : RealCell {
  template <class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Untimed<A>&, A h, A delta, Memo& memo) {
    const Fraction<A> forget = logistic(x[0], memo), input = logistic(x[1], memo);
    const Value<A> c = Activation::of(x[2], memo);
    // Not `forget`: GCC does not vectorize the loop if a pair is copied as a whole.
    return Step{
        Fraction<A>{forget.value, forget.rest}, input.value * c.value, forget.value * forget.rest * (delta * h),
        c.value * (input.value * input.rest) * delta, input.value * c.slope * delta};
  }
};

}  // namespace mingru::MINGRU_ISA
