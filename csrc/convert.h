// Conversions of a group of bfloat16 and float16 features, by vector instructions where these are faster than what compilers
// make of torch's conversions. They round to the nearest, ties to even, and keep subnormals and NaN.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "math.h"
#include "scan.h"

namespace mingru::MINGRU_ISA {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
constexpr bool has_conversion = false;

template <>
constexpr bool has_conversion<BFloat16> = true;
template <>
constexpr bool has_conversion<Half> = true;

#if !defined(MINGRU_AVX512) && !defined(MINGRU_AVX2)
// Called, because the code of a conversion is long.
template <class T>
MINGRU_NOT_INLINE void read(float* to, const T* from) {
  for (int64_t i = 0; i < group; ++i) to[i] = static_cast<float>(from[i]);
}

template <class T>
MINGRU_NOT_INLINE void write(T* to, const float* from) {
  for (int64_t i = 0; i < group; ++i) to[i] = static_cast<T>(from[i]);
}
#endif

#ifdef MINGRU_AVX512
// A bfloat16 is the upper half of a float.
MINGRU_INLINE void read(float* to, const BFloat16* from) {
  const __m512i at = _mm512_set_epi16(
      15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i bits = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, at, bits));
}

MINGRU_INLINE void write(BFloat16* to, const float* from) {
  const __m512i upper_halves = _mm512_set_epi16(
      0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512 x = _mm512_loadu_ps(from);
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  const __m512i words = _mm512_permutexvar_epi16(upper_halves, rounded);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(words));
}

MINGRU_INLINE void read(float* to, const Half* from) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

MINGRU_INLINE void write(Half* to, const float* from) {
  const __m256i words = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
}
#endif

#ifdef MINGRU_AVX2
MINGRU_INLINE void read(float* to, const BFloat16* from) {
  for (int i = 0; i < group; i += 8) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bits);
  }
}

MINGRU_INLINE __m256i rounded_upper_halves(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan);
  return _mm256_srli_epi32(_mm256_castps_si256(result), 16);
}

MINGRU_INLINE void write(BFloat16* to, const float* from) {
  const __m256i low = rounded_upper_halves(_mm256_loadu_ps(from));
  const __m256i high = rounded_upper_halves(_mm256_loadu_ps(from + 8));
  // The instruction packs the halves of both registers in turn.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0b11011000);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
}

MINGRU_INLINE void read(float* to, const Half* from) {
  for (int i = 0; i < group; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
}

MINGRU_INLINE void write(Half* to, const float* from) {
  for (int i = 0; i < group; i += 8) {
    const __m128i words = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), words);
  }
}
#endif

}  // namespace mingru::MINGRU_ISA
