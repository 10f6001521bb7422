// exp, log1p, tanh, sine, cosine and the logistic function of one SIMD lane, without branches, tables and errno, so that
// compilers vectorize loops over lanes. NaN and infinities follow the formulas. Subnormal results are rounded once and not
// flushed to 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// Always inlined, because a function call would prevent the vectorization of the loop.
#if defined(_MSC_VER)
#define MINGRU_INLINE static __forceinline
#define MINGRU_INLINE_MEMBER __forceinline
#define MINGRU_NOT_INLINE static __declspec(noinline)
#else
#define MINGRU_INLINE static inline __attribute__((always_inline))
#define MINGRU_INLINE_MEMBER inline __attribute__((always_inline))
#define MINGRU_NOT_INLINE static __attribute__((noinline))
#endif

// A loop over lanes, which are independent. If it is unrolled too early, it cannot be vectorized.
#if defined(__clang__)
#define MINGRU_LANES _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define MINGRU_LANES _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#else
#define MINGRU_LANES
#endif

#ifdef __GNUC__
#define MINGRU_PREFETCH(place) __builtin_prefetch(place)
#else
#define MINGRU_PREFETCH(place)
#endif

namespace mingru::MINGRU_ISA {

// float or double.
template <class A>
struct Format {
  using Limits = std::numeric_limits<A>;
  static constexpr bool is_double = std::is_same_v<A, double>;
  using UInt = std::conditional_t<is_double, uint64_t, uint32_t>;
  static constexpr int mantissa_bits = Limits::digits - 1, bias = Limits::max_exponent - 1;
  static constexpr UInt sign = UInt(1) << (sizeof(A) * 8 - 1);
  static constexpr A rounder = A(UInt(3) << (mantissa_bits - 1));  // 1.5 * 2^mantissa_bits; adding it rounds
  static constexpr A ln2_high = is_double ? A(6.93147180369123816490e-01) : A(0.693359375f);
  static constexpr A ln2_low = is_double ? A(1.90821492927058770002e-10) : A(-2.12194440e-4f);
  static constexpr A lowest = is_double ? -746 : -104;  // exp(lowest) is below half of the smallest subnormal
  static constexpr int lift = is_double ? 512 : 64;     // keeps `lifted` above the subnormals
  static constexpr A drop = is_double ? A(7.45834073120020674329e-155) : A(5.42101086242752217e-20f);  // 2^-lift
  static constexpr A infinity = Limits::infinity();
};

template <class To, class From>
MINGRU_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// exp(r) - 1 for |r| <= ln(2) / 2. The coefficients minimize the maximum relative error of exp, which is 4e-9. Terms are
// summed in pairs, because each step of Horner's scheme waits for the step before it.
MINGRU_INLINE float rise(float r) {
  const float r2 = r * r;
  const float first = 0.4999999403953552f + 0.1666651964187622f * r;
  const float second = 0.04166839271783829f + 0.008368780836462975f * r;
  return r + r2 * (first + r2 * (second + 0.0013814468402415514f * r2));
}

// terms[0] + terms[1] x + terms[2] x^2 + ...
template <class A, int count>
MINGRU_INLINE A polynomial(const A (&terms)[count], A x) {
  A sum = terms[count - 1];
  for (int n = count - 2; n >= 0; --n) sum = sum * x + terms[n];
  return sum;
}

// A Taylor series. The omitted part of exp(r), r^14 / 14!, is below 5e-18.
MINGRU_INLINE double rise(double r) {
  constexpr double inverse_factorial[] = {
      1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  return polynomial(inverse_factorial, r) * r;
}

// A number from 0 to 1, and 1 minus it, both in full relative precision.
template <class A>
struct Fraction {
  A value, rest;
};

// exp(x) for x <= 0. It is (1 + rise) * lifted * drop, with two powers of two, because exponent bits cannot make a subnormal.
template <class A>
MINGRU_INLINE Fraction<A> power_and_rest(A x) {
  using F = Format<A>;
  using UInt = typename F::UInt;
  x = F::lowest > x ? F::lowest : x;  // preserves NaN
  const A shifted = x * A(1.44269504088896340736) + F::rounder;
  const A whole = shifted - F::rounder;
  const A r = rise((x - whole * F::ln2_high) - whole * F::ln2_low);
  // The low bits of `shifted` are those of the integer `whole`.
  const UInt exponent = bit_cast<UInt>(shifted) - bit_cast<UInt>(A(F::rounder)) + UInt(F::lift + F::bias);
  const A lifted = bit_cast<A>(exponent << F::mantissa_bits), scale = lifted * F::drop;
  return {(lifted + lifted * r) * F::drop, (A(1) - scale) - scale * r};
}

template <class A>
MINGRU_INLINE A power(A x) {
  return power_and_rest(x).value;
}

template <class A>
MINGRU_INLINE A minus_absolute(A x) {
  return bit_cast<A>(bit_cast<typename Format<A>::UInt>(x) | Format<A>::sign);
}

// A `memo` marks what is computed ahead if a loop is split: see lanes.h. This one computes all at once.
struct AtOnce {
  template <class T>
  MINGRU_INLINE_MEMBER T operator()(int, T value) const {
    return value;
  }
};

// sigma(x), and sigma(-x), because 1 - sigma(x) would cancel, from p = exp(-|x|) and 1 / (1 + p).
template <class A>
MINGRU_INLINE Fraction<A> logistic_by(A x, A p, A large) {
  const A small = p * large;
  const bool left = x < A(0);
  return {left ? small : large, left ? large : small};
}

template <class A, class Memo>
MINGRU_INLINE Fraction<A> logistic(A x, Memo& memo) {
  const A p = memo(0, power(minus_absolute(x)));
  return logistic_by(x, p, A(1) / (A(1) + p));
}

// Replaces numbers from 1 to 2 by their inverses. A division takes as long as several products.
template <class A>
MINGRU_INLINE void invert(A& a, A& b) {
  const A inverse = A(1) / (a * b), of_a = b * inverse;
  b = a * inverse;
  a = of_a;
}

template <class A>
MINGRU_INLINE void invert(A& a, A& b, A& c) {
  A both = a * b;
  const A first = a;
  invert(both, c);
  a = b * both;
  b = first * both;
}

// log(1 + q) for 0 <= q <= 1. The coefficients minimize the maximum relative error, which is 4e-8.
MINGRU_INLINE float log1p_of_unit(float q) {
  const float q2 = q * q;
  const float first = -0.4999964833259583f + 0.3332132399082184f * q;
  const float second = -0.2485716342926025f + 0.191536545753479f * q;
  const float third = -0.1375380158424377f + 0.07920452207326889f * q;
  const float fourth = -0.03006578609347343f + 0.005364822689443827f * q;
  return q + q2 * ((first + second * q2) + (third + fourth * q2) * (q2 * q2));
}

// A series of s = r / (2 + r), with r = q, or (q - 1) / 2 and log(2) beside it. The omitted part is below 2e-17.
MINGRU_INLINE double log1p_of_unit(double q) {
  constexpr double inverse_odd[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9, 1.0 / 11,
                                    1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  const bool is_large = q > 0.41421356237309505;
  const double r = is_large ? 0.5 * (q - 1.0) : q;
  const double s = r / (2.0 + r);
  return (is_large ? 0.69314718055994530942 : 0.0) + 2.0 * s * polynomial(inverse_odd, s * s);
}

// The value of a function, and its derivative.
template <class A>
struct Value {
  A value, slope;
};

// x sigma(x)
template <class A>
MINGRU_INLINE Value<A> silu(A x) {
  AtOnce at_once;
  const Fraction<A> z = logistic(x, at_once);
  return {x * z.value, z.value * (A(1) + x * z.rest)};
}

// log(1 + exp(x))
template <class A, class Memo>
MINGRU_INLINE Value<A> softplus(A x, Memo& memo) {
  const A p = memo(0, power(minus_absolute(x)));
  const bool left = x < A(0);
  return {(left ? A(0) : x) + log1p_of_unit(p), (left ? p : A(1)) / (A(1) + p)};
}

// sin(pi r) / r and cos(pi r) for |r| <= 1/4, as polynomials of r^2. In float32 the maximum relative error is 4e-8; in
// float64 they are Taylor series, whose omitted parts are below 3e-18.
template <class A>
struct Circle {
  static constexpr A sine[] = {3.1415927410125732f, -5.167707920074463f, 2.549767017364502f, -0.5890750885009766f};
  static constexpr A cosine[] = {
      1.0f, -4.934802055358887f, 4.058707237243652f, -1.335044503211975f, 0.2313287854194641f};
};

template <>
struct Circle<double> {
  static constexpr double sine[] = {
      3.1415926535897932385,     -5.1677127800499700292,      2.5501640398773454439,
      -0.59926452932079207689,   0.082145886611128228799,     -0.0073704309457143507773,
      0.00046630280576761256442, -0.000021915353447830215827, 7.9520540014755127848e-7};
  static constexpr double cosine[] = {
      1.0,                      -4.9348022005446793094,    4.0587121264167682182,
      -1.3352627688545894959,   0.23533063035889320454,    -0.025806891390014060013,
      0.0019295743094039230479, -0.00010463810492484570712, 4.3030695870329470073e-6};
};

// x minus a multiple of `unit`, a power of two, without rounding. The multiple is next to x if |x / unit| is at most 2^22
// (float32) or 2^51 (float64). Otherwise it is some multiple of unit / 2 that is near.
template <class A>
MINGRU_INLINE A remainder(A x, A unit) {
  const A shifted = x * (A(1) / unit) + Format<A>::rounder;
  return x - (shifted - Format<A>::rounder) * unit;
}

MINGRU_INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

// cos(pi x) and sin(pi x). An angle in half turns is reduced to a quarter of a turn without rounding, for |x| < 2^21
// (float32) or 2^50 (float64).
template <class A>
struct Direction {
  A cosine, sine;
};

template <class A>
MINGRU_INLINE Direction<A> direction(A x) {
  using F = Format<A>;
  using UInt = typename F::UInt;
  const A shifted = A(2) * x + F::rounder;
  const A r = x - A(0.5) * (shifted - F::rounder);
  const A r2 = r * r;
  const A s = polynomial(Circle<A>::sine, r2) * r, c = polynomial(Circle<A>::cosine, r2);
  // The low bits of `shifted` are those of the number of quarter turns.
  const UInt quarters = bit_cast<UInt>(shifted);
  const bool swap = (quarters & UInt(1)) != 0;
  const UInt cosine_sign = ((quarters + UInt(1)) << (sizeof(A) * 8 - 2)) & F::sign;
  const UInt sine_sign = (quarters << (sizeof(A) * 8 - 2)) & F::sign;
  return {
      bit_cast<A>(bit_cast<UInt>(swap ? s : c) ^ cosine_sign), bit_cast<A>(bit_cast<UInt>(swap ? c : s) ^ sine_sign)};
}

}  // namespace mingru::MINGRU_ISA
