// The scalars of a step: what is the same in every step is made in Python, and the rest here, by one thread of the host
// or of a GPU. Step.of in tf_adam_variants/_step.py computes the same for the other engines.

#ifndef TF_ADAM_VARIANTS_STEP_SCALARS_H_
#define TF_ADAM_VARIANTS_STEP_SCALARS_H_

#include "adam_math.h"

namespace tfav {

// What is the same in every step of an update: class Constants of _step.py, field by field.
struct Constants {
  Step step;                      // as it is where the bias corrections and the learning rate are 1
  double log_beta_1, log_beta_2;  // -infinity without a bias correction
  double decay_peak;              // the weight decay is that of `step` times learning_rate / decay_peak; 0: times 1
  double trust_ratio;             // 1 or 0: whether there is one
};
constexpr int kConstants = sizeof(Constants) / sizeof(double);

// What changes, in the memory of the device that makes the scalars.
struct StepInputs {
  const int64_t* iterations;  // how many updates there have been
  const float* float_rate;    // the learning rate, in one of the two types
  const double* double_rate;
  const double* gradient_scale;   // null: 1
  const uint32_t* rounding_seed;  // null: nothing is rounded at random
};

TFAV_INLINE Step step_of(const Constants& constants, const StepInputs& inputs) {
  const double rate = inputs.double_rate != nullptr ? *inputs.double_rate : double(*inputs.float_rate);
  const double t = double(*inputs.iterations + 1);
  // 1 - beta^t, without the cancellation that 1 - pow(beta, t) suffers for small t.
  const double correction_1 = -expm1(t * constants.log_beta_1);
  const double correction_2 = -expm1(t * constants.log_beta_2);
  Step s = constants.step;
  const bool squared_gradient = s.squared_gradient_coefficient != 0;
  // Without it, numerator and denominator times sqrt(correction_2), so that v is used as it is.
  const double root = squared_gradient ? 1.0 : sqrt(correction_2);
  const double factor = constants.trust_ratio != 0 ? 1.0 : rate;
  if (inputs.gradient_scale != nullptr) s.gradient_scale = *inputs.gradient_scale;
  s.momentum_coefficient = root * (factor * s.momentum_coefficient / correction_1);
  s.gradient_coefficient = root * (factor * s.gradient_coefficient);
  if (squared_gradient) s.velocity_coefficient /= correction_2;
  s.epsilon *= root;
  if (constants.decay_peak != 0) s.weight_decay *= rate / constants.decay_peak;
  s.learning_rate = rate;
  if (inputs.rounding_seed != nullptr)
    s.rounding_key = mixed(*inputs.rounding_seed + mixed(uint32_t(*inputs.iterations)));
  return s;
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_STEP_SCALARS_H_
