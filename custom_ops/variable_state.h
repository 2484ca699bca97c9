// A variable with its slots and its gradient in memory, the types of their elements, and the kernel that updates them.

#ifndef TF_ADAM_VARIANTS_VARIABLE_STATE_H_
#define TF_ADAM_VARIANTS_VARIABLE_STATE_H_

#include <stdint.h>

namespace tfav {

enum class DType { kHalf, kBFloat16, kFloat, kDouble };

// The type of the slots and of the arithmetic for a variable of this type.
inline DType slot_dtype(DType variable) { return variable == DType::kDouble ? DType::kDouble : DType::kFloat; }

// The size of an element, in bytes.
inline int64_t size_of(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// How half-precision weights are stored.
enum class Rounding {
  kNearest,     // rounded to nearest
  kStochastic,  // rounded up or down at random, in proportion
  kMaster,      // the step updates a float copy, the master weights; the variable is the copy rounded to nearest
};

// What selects a kernel, apart from the coefficients.
struct KernelConfig {
  DType variable, gradient;  // the gradient has the type of the variable or of its slots
  Rounding rounding;
  bool squared_gradient;  // nu_2 is not 1
  bool amsgrad;
  bool trust_ratio;  // LAMB; excludes squared_gradient and amsgrad
};

// One variable. v_max, the largest v so far, is null without amsgrad, master without master weights. g may be null.
struct VariableState {
  char *w, *m, *v, *v_max, *master;
  const char* g;
  int64_t size;  // in elements
  bool weight_decay, layer_adaptation;
  uint32_t rng_stream;  // the random numbers that round the variable
};

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_VARIABLE_STATE_H_
