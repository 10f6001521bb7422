// Copies and conversions of groups of features. bfloat16 and float16 are rounded to the nearest, ties to even, and keep
// subnormals and NaN.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "math.h"
#include "scan.h"

namespace mingru::MINGRU_ISA {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The accumulation dtype.
template <class T>
using Accumulated = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a number of the type, whose accumulation dtype is A.
template <class A, class F>
MINGRU_INLINE auto with_type(Storage storage, const F& f) {
  if constexpr (std::is_same_v<A, float>) {
    if (storage == Storage::bfloat16) return f(BFloat16());
    if (storage == Storage::float16) return f(Half());
  }
  return f(A());
}

template <class A>
MINGRU_INLINE void convert(A* to, const A* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(A));
}

// A bfloat16 is the upper half of a float. All counts are multiples of `group`.
#ifdef MINGRU_AVX512
// Whole vectors, because a load waits for what two stores wrote.
MINGRU_INLINE void convert(float* to, const BFloat16* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_si512(to + i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
}

MINGRU_INLINE void convert(BFloat16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 x = _mm512_loadu_ps(from + i);
    const __m512i bits = _mm512_castps_si512(x), is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), is_odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i found = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(found, 16)));
  }
}
#else
// Compilers vectorize these loops, but not torch's conversions.
MINGRU_INLINE void convert(float* to, const BFloat16* from, int64_t count) {
  MINGRU_LANES
  for (int64_t i = 0; i < count; ++i) to[i] = bit_cast<float>(uint32_t(from[i].x) << 16);
}

MINGRU_INLINE void convert(BFloat16* to, const float* from, int64_t count) {
  MINGRU_LANES
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(from[i]);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i].x = static_cast<uint16_t>(from[i] == from[i] ? rounded : 0x7fc0);
  }
}
#endif

#if defined(MINGRU_AVX512) || defined(MINGRU_AVX2)
MINGRU_INLINE void convert(float* to, const Half* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
}

MINGRU_INLINE void convert(Half* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const __m128i words = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), words);
  }
}
#else
// Called, because the code of a conversion is long.
MINGRU_NOT_INLINE void convert(float* to, const Half* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

MINGRU_NOT_INLINE void convert(Half* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Half>(from[i]);
}
#endif

// Values of some steps: those of the first step, and how far those of the next step are from them.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

MINGRU_INLINE int64_t padded_size(int64_t features) { return ceil_div(features, group) * group; }

// Copies at most a group of values, without the call that memcpy is for a variable number.
template <int64_t size = group, class T>
MINGRU_INLINE void copy_few(T* to, const T* from, int64_t count) {
  const int64_t copied = count & size;
  if (copied) std::memcpy(to, from, size * sizeof(T));
  if constexpr (size > 1) copy_few<size / 2>(to + copied, from + copied, count);
}

// The values of a step in a tile: at most a group of features, which are padded with 0, or whole groups that need a
// conversion.
template <class A, class T>
MINGRU_NOT_INLINE void load(A* to, Rows<const T> from, int64_t steps, int64_t count) {
  for (int64_t step = 0; step < steps; ++step, from.data += from.stride, to += padded_size(count)) {
    if constexpr (std::is_same_v<T, A>) {
      std::memset(to, 0, group * sizeof(T));
      copy_few(to, from.data, count);
    } else {
      T rest[group] = {};
      if (count < group) copy_few(rest, from.data, count);
      convert(to, count < group ? rest : from.data, padded_size(count));
    }
  }
}

template <class A, class T>
MINGRU_NOT_INLINE void store(Rows<T> to, const A* from, int64_t steps, int64_t count) {
  for (int64_t step = 0; step < steps; ++step, to.data += to.stride, from += padded_size(count)) {
    if constexpr (std::is_same_v<T, A>) {
      copy_few(to.data, from, count);
    } else {
      T rest[group];
      convert(count < group ? rest : to.data, from, padded_size(count));
      if (count < group) copy_few(to.data, rest, count);
    }
  }
}

}  // namespace mingru::MINGRU_ISA
