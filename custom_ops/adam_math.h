// The formula of the Adam family, once: the loops on the CPU and the kernels on a GPU call these functions.
//
//   m  <- b1 m + (1 - b1) g            v  <- b2 v + (1 - b2) g^2
//   d   = ((1 - nu1) g + nu1 m^) / (sqrt((1 - nu2) g^2 + nu2 v^) + eps)
//   w  <- w - step u,  u = d + decay w
//
// tf_adam_variants/_formula.py states the same in Python and makes the coefficients. The arithmetic is that of S,
// the type of the moments: float for half, bfloat16 and float variables, double for double.

#ifndef TF_ADAM_VARIANTS_ADAM_MATH_H_
#define TF_ADAM_VARIANTS_ADAM_MATH_H_

#include <math.h>

#ifdef __CUDACC__
#define TFAV_INLINE __host__ __device__ __forceinline__
#else
#define TFAV_INLINE inline __attribute__((always_inline))
#endif

namespace tfav {

// What a step knows before it sees a variable. Python gives these numbers, in this order, in float64.
struct Scalars {
  double gradient;   // rate d = (momentum m + gradient g) / (sqrt(velocity v + square g^2) + epsilon),
  double momentum;   // with the bias corrections in these five. LAMB's d comes without the rate.
  double square;
  double velocity;
  double epsilon;
  double fading_1;   // of the old first moment: 1 - beta_1
  double share_1;    // of the gradient in the first moment: 1 - beta_1, or 1 without averaging
  double share_2;    // of the gradient's square in the second moment: 1 - beta_2
  double decay;      // Adam: the share of w that a step takes. LAMB: of w in u
  double scale;      // of the gradients, for clipping by their global norm
  double rate;       // LAMB: the learning rate, which the trust ratio multiplies
  double ratio_min;  // LAMB: the bounds of the trust ratio
  double ratio_max;
};
constexpr int kScalars = sizeof(Scalars) / sizeof(double);

// What one pass over the elements of a variable does.
enum class Pass {
  kAdam,   // new moments, new weights
  kNorms,  // LAMB 1: new moments; the squares of w and u, added up in float64
  kApply,  // LAMB 2: new weights from the moments, where the direction is made once more
};

struct Norms {
  double w, u;  // squared
};

TFAV_INLINE float root(float x) { return sqrtf(x); }
TFAV_INLINE double root(double x) { return sqrt(x); }

// The share of w that a step takes. None of an infinite weight, too, where nothing decays.
template <typename S>
TFAV_INLINE S decayed(S w, S decay) {
  return decay != S(0) ? decay * w : S(0);
}

template <typename S>
TFAV_INLINE S updated(S w, S u, S step) {
  return w - step * u;
}

// Scalars in the type of the arithmetic, and the formula over them.
template <typename S>
struct Formula {
  S gradient, momentum, square, velocity, epsilon, fading_1, share_1, share_2, scale;

  TFAV_INLINE explicit Formula(const Scalars& s)
      : gradient(S(s.gradient)), momentum(S(s.momentum)), square(S(s.square)), velocity(S(s.velocity)),
        epsilon(S(s.epsilon)), fading_1(S(s.fading_1)), share_1(S(s.share_1)), share_2(S(s.share_2)),
        scale(S(s.scale)) {}

  // Differences, so that a constant gradient is a fixed point whatever 1 - beta rounds to.
  TFAV_INLINE S first(S m, S g) const { return m + (share_1 * g - fading_1 * m); }
  TFAV_INLINE S second(S v, S g) const { return v + share_2 * (g * g - v); }

  // kSquare: nu_2 is not 1. Elsewhere g^2, which may overflow where v does not, stays out.
  template <bool kSquare>
  TFAV_INLINE S direction(S g, S m, S v) const {
    const S under = kSquare ? velocity * v + square * (g * g) : v;
    return (momentum * m + gradient * g) / (root(under) + epsilon);
  }

  // One element: its new moments, unless the pass finds them made, and u.
  template <Pass kPass, bool kSquare, bool kMaximum>
  TFAV_INLINE S change(S w, S g, S decay, S* m, S* v, S* top) const {
    g *= scale;
    S m_new = *m, v_new = *v;
    if (kPass != Pass::kApply) {
      *m = m_new = first(m_new, g);
      *v = v_new = second(v_new, g);
    }
    if (kMaximum) *top = v_new = *top >= v_new ? *top : v_new;
    if (kPass != Pass::kAdam) g = 0;  // LAMB's direction is made of the moments alone
    return direction<kSquare>(g, m_new, v_new) + decayed(w, decay);
  }
};

// LAMB's factor of a variable, |w| / |u|.
TFAV_INLINE double trust_ratio(const Norms& squares, const Scalars& s) {
  double ratio = squares.w > 0 && squares.u > 0 ? sqrt(squares.w) / sqrt(squares.u) : 1.0;
  ratio = ratio < s.ratio_min ? s.ratio_min : ratio;
  return ratio > s.ratio_max ? s.ratio_max : ratio;
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_ADAM_MATH_H_
