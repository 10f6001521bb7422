// One step of a GRU and of an LSTM, and its derivatives, for a group of features whose products with the recurrent weights
// are known. recurrent_steps.h has the loops over the steps.
#pragma once

#include "lanes.h"
#include "product.h"

namespace mingru::MINGRU_ISA {

// A gate as one number, for backward: the smaller of its value and its rest, negative if that is the rest. Of a float, both
// are in full relative precision; of a half, the smaller one.
template <class A>
MINGRU_INLINE A as_signed(Fraction<A> gate) {
  return gate.value > gate.rest ? -gate.rest : gate.value;
}

template <class A>
MINGRU_INLINE Fraction<A> from_signed(A x) {
  using UInt = typename Format<A>::UInt;
  const bool is_rest = (bit_cast<UInt>(x) & Format<A>::sign) != 0;
  const A small = is_rest ? -x : x, large = A(1) - small;
  return {is_rest ? large : small, is_rest ? small : large};
}

#ifdef __GNUC__
// Functions of vectors for steps whose products are bfloat16, of which they would take most of the time: with absolute
// errors of 1e-7, and relative ones of the logistic function and its rest. NaN stays NaN.
using Floats = Vector<float>;
typedef int32_t Ints __attribute__((vector_size(register_bytes)));

MINGRU_INLINE Floats get(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
MINGRU_INLINE void set(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

// The nearest number from -most to most. Larger powers would be subnormal, or their products.
MINGRU_INLINE Floats bounded(Floats x, float most) {
#ifdef MINGRU_AVX512
  return _mm512_max_ps(_mm512_set1_ps(-most), _mm512_min_ps(_mm512_set1_ps(most), x));
#else
  const Floats high = Floats{} + most;
  x = x > high ? high : x;
  return x < -high ? -high : x;
#endif
}

// exp(scale x)
MINGRU_INLINE Floats fast_power(Floats x, float scale) {
  using F = Format<float>;
  x = bounded(x, 60 / (scale < 0 ? -scale : scale));
  const float factor = 1.44269504f * scale;
  const Floats shifted = x * factor + F::rounder, f = x * factor - (shifted - F::rounder), f2 = f * f;
  const Floats low = 6.931472028550421e-1f * f + 1.0f, middle = 5.550332471162809e-2f * f + 2.402264791363012e-1f;
  const Floats high = (1.339887440266574e-3f * f + 9.618437357674640e-3f) + 1.535336188319500e-4f * f2;
  const Floats power = low + f2 * (middle + f2 * high);
  return (Floats)((Ints)power + ((Ints)shifted << F::mantissa_bits));
}

// 1 / x of a normal number above 0. A division takes as long as 16 other operations.
MINGRU_INLINE Floats fast_inverse(Floats x) {
#ifdef MINGRU_AVX512
  const Floats y = _mm512_rcp14_ps(x);
#else
  const Floats guess = (Floats)(0x7ef311c7 - (Ints)x), far = 1.0f - x * guess;  // up to 12 % off
  const Floats y = guess + guess * (far + far * far);
#endif
  return y + y * (1.0f - x * y);
}

// A logistic function, and its rest.
struct Gate {
  Floats value, rest;
};

MINGRU_INLINE Gate gate(Floats x) {
  const Floats power = fast_power(x, -1), value = fast_inverse(power + 1.0f);
  return {value, power * value};
}

MINGRU_INLINE Floats fast_tanh(Floats x) { return 2.0f * fast_inverse(fast_power(x, -2) + 1.0f) - 1.0f; }

MINGRU_INLINE Floats as_signed(const Gate& gate) { return gate.value > gate.rest ? -gate.rest : gate.value; }
#endif

// A group of values of a step: the inputs of the cell, and what backward needs in their place, and one value more.
template <class A, int num_gates>
struct StepValues {
  alignas(64) A copies[num_gates + 1][group];
  A *lanes[num_gates + 1], *kept[num_gates + 1];
};

// Inputs: reset gate r, update gate z and candidate c. Kept: the gates and the candidate, and the candidate's sum, which
// the reset gate multiplies.
struct GRUCell {
  static constexpr int num_gates = 3, num_states = 1;

  // Sets a group of the next state. `sums` are the products of the previous state, `padded` values from gate to gate.
  template <bool is_kept, bool is_rounded, class A>
  MINGRU_INLINE void activate(
      const StepValues<A, num_gates>& values, A* next, const A* state, A*, const A* sums, int64_t padded, const A* biases) {
    const A *r_sum = sums, *z_sum = r_sum + padded, *c_sum = z_sum + padded;
    const A *r = values.lanes[0], *z = values.lanes[1], *c = values.lanes[2];
    A *const* kept = values.kept;
    if constexpr (is_rounded) {
      for (int64_t i = 0; i < group; i += per_register<A>) {
        const Gate open = gate(get(r + i) + get(r_sum + i)), keep = gate(get(z + i) + get(z_sum + i));
        const Floats sum = get(c_sum + i) + get(biases + i), candidate = fast_tanh(get(c + i) + open.value * sum);
        set(next + i, keep.value * get(state + i) + keep.rest * candidate);
        if constexpr (is_kept) {
          set(kept[0] + i, as_signed(open)), set(kept[1] + i, as_signed(keep));
          set(kept[2] + i, candidate), set(kept[3] + i, sum);
        }
      }
      return;
    }
    MINGRU_LANES
    for (int64_t i = 0; i < group; ++i) {
      AtOnce at_once;
      const Fraction<A> open = logistic(r[i] + r_sum[i], at_once), keep = logistic(z[i] + z_sum[i], at_once);
      const A sum = c_sum[i] + biases[i], candidate = Tanh().of(c[i] + open.value * sum, at_once).value;
      next[i] = next_state(keep, state[i], keep.rest * candidate);
      if constexpr (is_kept) kept[0][i] = as_signed(open), kept[1][i] = as_signed(keep), kept[2][i] = candidate, kept[3][i] = sum;
    }
  }

  // Sets the gradients of a group of the inputs and of the products. That of the state, `carried`, becomes the part of the
  // previous state's gradient that does not pass the weights.
  template <class A>
  MINGRU_INLINE void differentiate(
      const StepValues<A, num_gates>& values, A* const* grads, A* sums, int64_t padded, const A* before, const A* grad,
      A* carried, A*) {
    const A *r = values.lanes[0], *z = values.lanes[1], *c = values.lanes[2], *sum = values.lanes[3];
    A *r_sum = sums, *z_sum = r_sum + padded, *c_sum = z_sum + padded;
    MINGRU_LANES
    for (int64_t i = 0; i < group; ++i) {
      const Fraction<A> open = from_signed(r[i]), keep = from_signed(z[i]);
      const A of_state = grad[i] + carried[i];
      const A of_candidate = of_state * keep.rest * (A(1) - c[i] * c[i]);
      grads[0][i] = r_sum[i] = of_candidate * sum[i] * open.value * open.rest;
      grads[1][i] = z_sum[i] = of_state * (before[i] - c[i]) * keep.value * keep.rest;
      grads[2][i] = of_candidate;
      c_sum[i] = of_candidate * open.value;
      carried[i] = of_state * keep.value;
    }
  }
};

// Inputs: input gate i, forget gate f, candidate g and output gate o. The second state, `cell`, is changed in place. Kept:
// the gates and the candidate, and the cell before the step.
struct LSTMCell {
  static constexpr int num_gates = 4, num_states = 2;

  template <bool is_kept, bool is_rounded, class A>
  MINGRU_INLINE void activate(
      const StepValues<A, num_gates>& values, A* next, const A*, A* cell, const A* sums, int64_t padded, const A*) {
    const A *i_sum = sums, *f_sum = i_sum + padded, *g_sum = f_sum + padded, *o_sum = g_sum + padded;
    const A *i = values.lanes[0], *f = values.lanes[1], *g = values.lanes[2], *o = values.lanes[3];
    A *const* kept = values.kept;
    if constexpr (is_rounded) {
      for (int64_t k = 0; k < group; k += per_register<A>) {
        const Gate in = gate(get(i + k) + get(i_sum + k)), keep = gate(get(f + k) + get(f_sum + k));
        const Gate out = gate(get(o + k) + get(o_sum + k));
        const Floats candidate = fast_tanh(get(g + k) + get(g_sum + k)), before = get(cell + k);
        const Floats after = keep.value * before + in.value * candidate;
        set(next + k, out.value * fast_tanh(after));
        set(cell + k, after);
        if constexpr (is_kept) {
          set(kept[0] + k, as_signed(in)), set(kept[1] + k, as_signed(keep)), set(kept[2] + k, candidate);
          set(kept[3] + k, as_signed(out)), set(kept[4] + k, before);
        }
      }
      return;
    }
    MINGRU_LANES
    for (int64_t k = 0; k < group; ++k) {
      const A i_x = i[k] + i_sum[k], f_x = f[k] + f_sum[k], g_x = g[k] + g_sum[k], o_x = o[k] + o_sum[k];
      const A i_p = power(minus_absolute(i_x)), f_p = power(minus_absolute(f_x)), o_p = power(minus_absolute(o_x));
      const Fraction<A> g_p = power_and_rest(A(2) * minus_absolute(g_x));
      A of_i = A(1) + i_p, of_f = A(1) + f_p, of_g = A(1) + g_p.value;
      invert(of_i, of_f, of_g);
      const Fraction<A> in = logistic_by(i_x, i_p, of_i), keep = logistic_by(f_x, f_p, of_f);
      const A candidate = Tanh::by(g_x, g_p, of_g).value;
      const A before = cell[k], after = keep.value * before + in.value * candidate;
      const Fraction<A> c_p = power_and_rest(A(2) * minus_absolute(after));
      A of_o = A(1) + o_p, of_c = A(1) + c_p.value;
      invert(of_o, of_c);
      const Fraction<A> out = logistic_by(o_x, o_p, of_o);
      next[k] = out.value * Tanh::by(after, c_p, of_c).value;
      cell[k] = after;
      if constexpr (is_kept) {
        kept[0][k] = as_signed(in), kept[1][k] = as_signed(keep), kept[2][k] = candidate, kept[3][k] = as_signed(out);
        kept[4][k] = before;
      }
    }
  }

  template <class A>
  MINGRU_INLINE void differentiate(
      const StepValues<A, num_gates>& values, A* const* grads, A* sums, int64_t padded, const A*, const A* grad, A* carried,
      A* of_cell) {
    const A *i = values.lanes[0], *f = values.lanes[1], *g = values.lanes[2], *o = values.lanes[3];
    const A* before = values.lanes[4];
    A *i_sum = sums, *f_sum = i_sum + padded, *g_sum = f_sum + padded, *o_sum = g_sum + padded;
    MINGRU_LANES
    for (int64_t k = 0; k < group; ++k) {
      AtOnce at_once;
      const Fraction<A> in = from_signed(i[k]), keep = from_signed(f[k]), out = from_signed(o[k]);
      const Value<A> shown = Tanh().of(keep.value * before[k] + in.value * g[k], at_once);
      const A of_state = grad[k] + carried[k];
      const A of_sum = of_cell[k] + of_state * out.value * shown.slope;
      grads[0][k] = i_sum[k] = of_sum * g[k] * in.value * in.rest;
      grads[1][k] = f_sum[k] = of_sum * before[k] * keep.value * keep.rest;
      grads[2][k] = g_sum[k] = of_sum * in.value * (A(1) - g[k] * g[k]);
      grads[3][k] = o_sum[k] = of_state * shown.value * out.value * out.rest;
      carried[k] = 0;
      of_cell[k] = of_sum * keep.value;
    }
  }
};

}  // namespace mingru::MINGRU_ISA
