// float16 and bfloat16 as they lie in memory, and their conversion to and from float.
//
// By integer arithmetic, which compilers vectorise everywhere, and without float denormals, which
// TensorFlow's threads flush to zero.

#ifndef TF_ADAM_VARIANTS_HALF_TYPES_H_
#define TF_ADAM_VARIANTS_HALF_TYPES_H_

#include <stdint.h>
#include <string.h>

#include "adam_math.h"

namespace tfav {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

TFAV_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

TFAV_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

TFAV_INLINE float widened(float x) { return x; }
TFAV_INLINE double widened(double x) { return x; }
TFAV_INLINE float widened(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
TFAV_INLINE float widened(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + 0x38000000u;                                // the exponents' biases differ by 112
  const uint32_t special = magnitude + 0x70000000u;                               // inf and NaN: twice that
  const float small = float_of(magnitude + 0x38800000u) - float_of(0x38800000u);  // a denormal of half
  const uint32_t bits = exponent == 0x0f800000u ? special : exponent == 0 ? bits_of(small) : normal;
  return float_of(sign | bits);
}

// To nearest, ties to even.
TFAV_INLINE void narrow(float x, float* to) { *to = x; }
TFAV_INLINE void narrow(double x, double* to) { *to = x; }
TFAV_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
TFAV_INLINE void narrow(float x, Half* to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t bits = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : normal;
  to->bits = uint16_t(sign | bits);
}

// To one of the two neighbours, the nearer one more often: the bits that are cut off, plus as many random ones, carry.
TFAV_INLINE void narrow_randomly(float x, uint32_t random, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + (random & 0xffffu)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
TFAV_INLINE void narrow_randomly(float x, uint32_t random, Half* to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu, cut = random & 0x1fffu;
  const uint32_t normal = (magnitude - 0x38000000u + cut) >> 13;
  const float units =
      magnitude < 0x38800000u ? float_of(magnitude) * 0x1p24f : 0.0f;  // a denormal in units of its last
  const uint32_t small = uint32_t(int32_t(units + float(int32_t(cut)) * 0x1p-13f));
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t bits = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : normal;
  to->bits = uint16_t(sign | bits);
}
// Types of full precision are not rounded.
TFAV_INLINE void narrow_randomly(float x, uint32_t, float* to) { *to = x; }
TFAV_INLINE void narrow_randomly(double x, uint32_t, double* to) { *to = x; }

// The weight that a step begins with: the master weight, or the variable's where it is not the master's rounding,
// because it was assigned.
template <typename T>
TFAV_INLINE float followed(T w, float master) {
  T rounded;
  narrow(master, &rounded);
  const bool zeros = ((rounded.bits | w.bits) & 0x7fffu) == 0;  // of either sign
  return rounded.bits == w.bits || zeros ? master : widened(w);
}

// The type of a variable's moments and arithmetic.
template <typename T>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_HALF_TYPES_H_
