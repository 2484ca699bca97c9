// float16 and bfloat16 in memory, and their conversion to and from float.
//
// The conversions use integer arithmetic, because compilers vectorise it everywhere, and no float denormals, because
// TensorFlow's threads flush them to zero.

#ifndef TF_ADAM_VARIANTS_HALF_PRECISION_H_
#define TF_ADAM_VARIANTS_HALF_PRECISION_H_

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

TFAV_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

TFAV_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The value in the type of the arithmetic: double stays double.
TFAV_INLINE float to_float(float x) { return x; }
TFAV_INLINE double to_float(double x) { return x; }
TFAV_INLINE float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
TFAV_INLINE float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + 0x38000000u;   // the biases of the exponents differ by 112
  const uint32_t special = magnitude + 0x70000000u;  // inf and NaN: twice that
  const float small = bits_to_float(magnitude + 0x38800000u) - bits_to_float(0x38800000u);  // a denormal of half
  const uint32_t bits = exponent == 0x0f800000u ? special : exponent == 0 ? float_to_bits(small) : normal;
  return bits_to_float(sign | bits);
}

// Ties to even. Full precision is not rounded.
TFAV_INLINE void round_to_nearest(float x, float* to) { *to = x; }
TFAV_INLINE void round_to_nearest(double x, double* to) { *to = x; }
TFAV_INLINE void round_to_nearest(float x, BFloat16* to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
TFAV_INLINE void round_to_nearest(float x, Half* to) {
  const uint32_t sign = float_to_bits(x) >> 16 & 0x8000u, magnitude = float_to_bits(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t bits = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : normal;
  to->bits = uint16_t(sign | bits);
}

// Rounds to one of the two neighbours, with a probability in proportion to how near it is: the bits that are cut off,
// plus random bits of the same number, carry into the bits that stay.
TFAV_INLINE void round_stochastically(float x, uint32_t random, BFloat16* to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + (random & 0xffffu)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
TFAV_INLINE void round_stochastically(float x, uint32_t random, Half* to) {
  const uint32_t sign = float_to_bits(x) >> 16 & 0x8000u, magnitude = float_to_bits(x) & 0x7fffffffu,
                 cut = random & 0x1fffu;
  const uint32_t normal = (magnitude - 0x38000000u + cut) >> 13;
  const float units =
      magnitude < 0x38800000u ? bits_to_float(magnitude) * 0x1p24f : 0.0f;  // a denormal in units of its last place
  const uint32_t small = uint32_t(int32_t(units + float(int32_t(cut)) * 0x1p-13f));
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t bits = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : normal;
  to->bits = uint16_t(sign | bits);
}
// Full precision is not rounded.
TFAV_INLINE void round_stochastically(float x, uint32_t, float* to) { *to = x; }
TFAV_INLINE void round_stochastically(double x, uint32_t, double* to) { *to = x; }

// The weight before a step: the master weight, unless the variable is not its rounding. Then the variable was assigned
// since the last step, and its own value counts.
template <typename T>
TFAV_INLINE float effective_weight(T w, float master) {
  T rounded;
  round_to_nearest(master, &rounded);
  const bool zeros = ((rounded.bits | w.bits) & 0x7fffu) == 0;  // both zero, of either sign
  return rounded.bits == w.bits || zeros ? master : to_float(w);
}

// The type of the slots and of the arithmetic for variables of type T.
template <typename T>
struct SlotType {
  using type = float;
};
template <>
struct SlotType<double> {
  using type = double;
};

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_HALF_PRECISION_H_
