// The formula of the Adam family, once: the loops on the CPU and the kernels on a GPU call these functions.
//
//   g  <- gradient_scale g
//   m  <- m_scale m + m_weight g - m_decay m
//   v  <- v_scale v + v_weight g^2 - v_decay v
//   d   = (c_m m + c_g g) / (sqrt(c_v v + c_g2 g^2) + epsilon)
//   u   = d + weight_decay w
//   w  <- w - u, or with a trust ratio r: w <- w - learning_rate r u
//
// coefficients.h and tf_adam_variants/engines/coefficients.py compute the coefficients and use the same names. S is the
// type of the slots (m, v, v_max) and of the arithmetic: float for half, bfloat16 and float variables, double for
// double.

#ifndef TF_ADAM_VARIANTS_ADAM_MATH_H_
#define TF_ADAM_VARIANTS_ADAM_MATH_H_

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define TFAV_INLINE __host__ __device__ __forceinline__
#else
#define TFAV_INLINE inline __attribute__((always_inline))
#endif

namespace tfav {

// The scalars of one step: class Coefficients of engines/coefficients.py, field by field.
struct Coefficients {
  double gradient_scale;    // for clipping by the global norm
  double m_scale, m_decay;  // 1 and 1 - beta_1; for a small beta_1: beta_1 and 0
  double m_weight;          // 1 - beta_1, or 1 without gradient averaging
  double v_scale, v_decay;
  double v_weight;
  double
      c_m;  // The bias corrections are in c_m, c_g, c_v, c_g2 and epsilon. Without a trust ratio the learning rate is
  double c_g;  // in c_m, c_g and weight_decay.
  double c_v;
  double c_g2;
  double epsilon;
  double weight_decay;
  double learning_rate;  // with a trust ratio
  double trust_ratio_min;
  double trust_ratio_max;
  double rng_key;  // below 2^32; key of the random numbers that round weights
};
constexpr int kNumCoefficients = sizeof(Coefficients) / sizeof(double);

// What one pass over the elements of a variable does.
enum class Pass {
  kAdam,   // new moments, new weights
  kNorms,  // LAMB 1: new moments; the squared norms of w and u, summed in float64
  kApply,  // LAMB 2: new weights from the moments; the direction is computed a second time
};

struct Norms {
  double w, u;  // squared
};

// Random numbers are hashes of the step's key, the variable's stream and the element's index: no state is kept, and a
// repeated step rounds alike. TheIronBorn found this hash for Chris Wellons's hash-prospector; its low bits are used.
TFAV_INLINE uint32_t hash32(uint32_t x) {
  x = (x ^ x >> 16) * 0x21f0aaadu;
  x = (x ^ x >> 15) * 0x735a2d97u;
  return x ^ x >> 15;
}
TFAV_INLINE uint32_t rng_stream_key(const Coefficients& c, uint32_t rng_stream) {
  return hash32(uint32_t(c.rng_key) + rng_stream * 0x9e3779b9u);
}
TFAV_INLINE uint32_t random_bits(uint32_t stream_key, uint32_t element) { return hash32(stream_key + element); }

TFAV_INLINE float square_root(float x) { return sqrtf(x); }
TFAV_INLINE double square_root(double x) { return sqrt(x); }

// decay w; 0 for an infinite weight without decay, which 0 w would turn into NaN.
template <typename S>
TFAV_INLINE S decay_term(S w, S decay) {
  return decay != S(0) ? decay * w : S(0);
}

template <typename S>
TFAV_INLINE S new_weight(S w, S u, S step_size) {
  return w - step_size * u;
}

// The coefficients in the type of the arithmetic, and the formula over them.
template <typename S>
struct Formula {
  S gradient_scale, m_scale, m_decay, m_weight, v_scale, v_decay, v_weight;
  S c_m, c_g, c_v, c_g2, epsilon;

  TFAV_INLINE explicit Formula(const Coefficients& c)
      : gradient_scale(S(c.gradient_scale)),
        m_scale(S(c.m_scale)),
        m_decay(S(c.m_decay)),
        m_weight(S(c.m_weight)),
        v_scale(S(c.v_scale)),
        v_decay(S(c.v_decay)),
        v_weight(S(c.v_weight)),
        c_m(S(c.c_m)),
        c_g(S(c.c_g)),
        c_v(S(c.c_v)),
        c_g2(S(c.c_g2)),
        epsilon(S(c.epsilon)) {}

  // As differences, so that a constant gradient is a fixed point whatever 1 - beta rounds to. A small beta is the
  // exception (see `is_small` in coefficients.py): the rounding error of the old moment would stay.
  TFAV_INLINE S new_m(S m, S g) const { return m_scale * m + (m_weight * g - m_decay * m); }
  TFAV_INLINE S new_v(S v, S g) const { return v_scale * v + (v_weight * (g * g) - v_decay * v); }

  // kSquaredGradient: nu_2 is not 1. Otherwise g^2 is left out, since it may overflow where v does not.
  template <bool kSquaredGradient>
  TFAV_INLINE S direction(S g, S m, S v) const {
    const S squared = kSquaredGradient ? c_v * v + c_g2 * (g * g) : v;
    return (c_m * m + c_g * g) / (square_root(squared) + epsilon);
  }

  // One element: updates its moments, unless an earlier pass did, and returns u.
  template <Pass kPass, bool kSquaredGradient, bool kAmsgrad>
  TFAV_INLINE S update_moments(S w, S g, S decay, S* m, S* v, S* v_max) const {
    g *= gradient_scale;
    S m_new = *m, v_new = *v;
    if (kPass != Pass::kApply) {
      *m = m_new = new_m(m_new, g);
      *v = v_new = new_v(v_new, g);
    }
    if (kAmsgrad) *v_max = v_new = *v_max >= v_new ? *v_max : v_new;
    if (kPass != Pass::kAdam) g = 0;  // the direction of LAMB has the moments alone
    return direction<kSquaredGradient>(g, m_new, v_new) + decay_term(w, decay);
  }
};

// The trust ratio of a variable for LAMB, |w| / |u|, from the squared norms.
TFAV_INLINE double trust_ratio(const Norms& squared, const Coefficients& c) {
  double ratio = squared.w > 0 && squared.u > 0 ? sqrt(squared.w) / sqrt(squared.u) : 1.0;
  ratio = ratio < c.trust_ratio_min ? c.trust_ratio_min : ratio;
  return ratio > c.trust_ratio_max ? c.trust_ratio_max : ratio;
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_ADAM_MATH_H_
