// The formula of the Adam family, once: the loops on the CPU and the kernels on a GPU call these functions.
//
//   g  <- gradient_scale g
//   m  <- momentum_kept m + beta_3 g - momentum_forgotten m
//   v  <- velocity_kept v + one_minus_beta_2 g^2 - velocity_forgotten v
//   d   = (momentum_coefficient m + gradient_coefficient g)
//         / (sqrt(velocity_coefficient v + squared_gradient_coefficient g^2) + epsilon)
//   u   = d + weight_decay w
//   w  <- w - u, or with a trust ratio r: w <- w - learning_rate r u
//
// step_scalars.h and tf_adam_variants/_step.py make the coefficients, with the same names. The arithmetic is that of S,
// the type of the moments: float for half, bfloat16 and float variables, double for double.

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

// The scalars of one step: class Step of _step.py, field by field.
struct Step {
  double gradient_scale;                     // for clipping by the global norm
  double momentum_kept, momentum_forgotten;  // 1 and 1 - beta_1; beta_1 and 0 for a small beta
  double beta_3;                             // 1 - beta_1, or 1 without gradient averaging (the name is apex's)
  double velocity_kept, velocity_forgotten;
  double one_minus_beta_2;
  double momentum_coefficient;  // The bias corrections are in these four and in epsilon;
  double gradient_coefficient;  // without a trust ratio the learning rate is too, and in weight_decay.
  double velocity_coefficient;
  double squared_gradient_coefficient;
  double epsilon;
  double weight_decay;
  double learning_rate;  // with a trust ratio
  double trust_ratio_min;
  double trust_ratio_max;
  double rounding_key;  // below 2^32, of the random numbers that round weights
};
constexpr int kStepFields = sizeof(Step) / sizeof(double);

// What one pass over the elements of a variable does.
enum class Pass {
  kAdam,   // new moments, new weights
  kNorms,  // LAMB 1: new moments; the squared norms of w and u, summed in float64
  kApply,  // LAMB 2: new weights from the moments, with the direction computed once more
};

struct Norms {
  double w, u;  // squared
};

// A random number for each element, from the step's key, the variable's stream and the element's index: no state is
// kept, and a step that is taken again rounds alike. The mixing was found by TheIronBorn for Chris Wellons'
// hash-prospector; its low bits are used.
TFAV_INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x21f0aaadu;
  x = (x ^ x >> 15) * 0x735a2d97u;
  return x ^ x >> 15;
}
TFAV_INLINE uint32_t stream_key(const Step& s, uint32_t stream) {
  return mixed(uint32_t(s.rounding_key) + stream * 0x9e3779b9u);
}
TFAV_INLINE uint32_t random_bits(uint32_t key, uint32_t element) { return mixed(key + element); }

TFAV_INLINE float root(float x) { return sqrtf(x); }
TFAV_INLINE double root(double x) { return sqrt(x); }

// decay w, and 0 for an infinite weight that does not decay.
template <typename S>
TFAV_INLINE S decayed(S w, S decay) {
  return decay != S(0) ? decay * w : S(0);
}

template <typename S>
TFAV_INLINE S updated(S w, S u, S step_size) {
  return w - step_size * u;
}

// The scalars in the type of the arithmetic, and the formula over them.
template <typename S>
struct Formula {
  S gradient_scale, momentum_kept, momentum_forgotten, beta_3, velocity_kept, velocity_forgotten, one_minus_beta_2;
  S momentum_coefficient, gradient_coefficient, velocity_coefficient, squared_gradient_coefficient, epsilon;

  TFAV_INLINE explicit Formula(const Step& s)
      : gradient_scale(S(s.gradient_scale)),
        momentum_kept(S(s.momentum_kept)),
        momentum_forgotten(S(s.momentum_forgotten)),
        beta_3(S(s.beta_3)),
        velocity_kept(S(s.velocity_kept)),
        velocity_forgotten(S(s.velocity_forgotten)),
        one_minus_beta_2(S(s.one_minus_beta_2)),
        momentum_coefficient(S(s.momentum_coefficient)),
        gradient_coefficient(S(s.gradient_coefficient)),
        velocity_coefficient(S(s.velocity_coefficient)),
        squared_gradient_coefficient(S(s.squared_gradient_coefficient)),
        epsilon(S(s.epsilon)) {}

  // Differences, so that a constant gradient is a fixed point whatever 1 - beta rounds to. Not so for a small beta,
  // where an old moment that is nearly forgotten would leave its rounding behind.
  TFAV_INLINE S new_momentum(S m, S g) const { return momentum_kept * m + (beta_3 * g - momentum_forgotten * m); }
  TFAV_INLINE S new_velocity(S v, S g) const {
    return velocity_kept * v + (one_minus_beta_2 * (g * g) - velocity_forgotten * v);
  }

  // kSquaredGradient: nu_2 is not 1. Otherwise g^2, which may overflow where v does not, stays out.
  template <bool kSquaredGradient>
  TFAV_INLINE S direction(S g, S m, S v) const {
    const S squared = kSquaredGradient ? velocity_coefficient * v + squared_gradient_coefficient * (g * g) : v;
    return (momentum_coefficient * m + gradient_coefficient * g) / (root(squared) + epsilon);
  }

  // One element: its new moments, unless an earlier pass has made them, and u.
  template <Pass kPass, bool kSquaredGradient, bool kAmsgrad>
  TFAV_INLINE S change(S w, S g, S decay, S* m, S* v, S* v_max) const {
    g *= gradient_scale;
    S m_new = *m, v_new = *v;
    if (kPass != Pass::kApply) {
      *m = m_new = new_momentum(m_new, g);
      *v = v_new = new_velocity(v_new, g);
    }
    if (kAmsgrad) *v_max = v_new = *v_max >= v_new ? *v_max : v_new;
    if (kPass != Pass::kAdam) g = 0;  // LAMB's direction is made of the moments alone
    return direction<kSquaredGradient>(g, m_new, v_new) + decayed(w, decay);
  }
};

// LAMB's factor of a variable, |w| / |u|, from the squared norms.
TFAV_INLINE double trust_ratio(const Norms& squared, const Step& s) {
  double ratio = squared.w > 0 && squared.u > 0 ? sqrt(squared.w) / sqrt(squared.u) : 1.0;
  ratio = ratio < s.trust_ratio_min ? s.trust_ratio_min : ratio;
  return ratio > s.trust_ratio_max ? s.trust_ratio_max : ratio;
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_ADAM_MATH_H_
