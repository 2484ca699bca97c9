// The coefficients of a step. Python computes what is the same in every step, this function the rest, in one thread of
// the host or of a GPU. Coefficients.from_hyperparameters in tf_adam_variants/engines/coefficients.py computes the same
// for the other engines.

#ifndef TF_ADAM_VARIANTS_COEFFICIENTS_H_
#define TF_ADAM_VARIANTS_COEFFICIENTS_H_

#include "adam_math.h"

namespace tfav {

// What is the same in every step: class StaticCoefficients of engines/coefficients.py, field by field.
struct StaticCoefficients {
  Coefficients coefficients;      // for bias corrections and a learning rate of 1
  double log_beta_1, log_beta_2;  // -infinity without a bias correction
  double decay_peak;              // weight_decay is multiplied by learning_rate / decay_peak; 0: by 1
  double trust_ratio;             // 1 with a trust ratio, 0 without
};
constexpr int kNumStaticCoefficients = sizeof(StaticCoefficients) / sizeof(double);

// What changes from step to step, in the memory of the device that computes the coefficients.
struct StepInputs {
  const int64_t* iterations;  // number of updates before this one
  const float* float_rate;    // the learning rate, in one of the two types
  const double* double_rate;
  const double* gradient_scale;   // null: 1
  const uint32_t* rounding_seed;  // null: no stochastic rounding
};

TFAV_INLINE Coefficients coefficients_of(const StaticCoefficients& fixed, const StepInputs& inputs) {
  const double rate = inputs.double_rate != nullptr ? *inputs.double_rate : double(*inputs.float_rate);
  const double t = double(*inputs.iterations + 1);
  // 1 - beta^t, without the cancellation that 1 - pow(beta, t) suffers for small t.
  const double correction_1 = -expm1(t * fixed.log_beta_1);
  const double correction_2 = -expm1(t * fixed.log_beta_2);
  Coefficients c = fixed.coefficients;
  const bool squared_gradient = c.c_g2 != 0;
  // With nu_2 = 1, numerator and denominator times sqrt(correction_2), so that v is used as it is.
  const double root = squared_gradient ? 1.0 : sqrt(correction_2);
  const double factor = fixed.trust_ratio != 0 ? 1.0 : rate;
  if (inputs.gradient_scale != nullptr) c.gradient_scale = *inputs.gradient_scale;
  c.c_m = root * (factor * c.c_m / correction_1);
  c.c_g = root * (factor * c.c_g);
  if (squared_gradient) c.c_v /= correction_2;
  c.epsilon *= root;
  if (fixed.decay_peak != 0) c.weight_decay *= rate / fixed.decay_peak;
  c.learning_rate = rate;
  if (inputs.rounding_seed != nullptr) c.rng_key = hash32(*inputs.rounding_seed + hash32(uint32_t(*inputs.iterations)));
  return c;
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_COEFFICIENTS_H_
