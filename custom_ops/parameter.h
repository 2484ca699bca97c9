// A variable with its slots and its gradient in memory, the types of their elements, and which step it takes.

#ifndef TF_ADAM_VARIANTS_PARAMETER_H_
#define TF_ADAM_VARIANTS_PARAMETER_H_

#include <stdint.h>

namespace tfav {

enum class Type { kHalf, kBFloat16, kFloat, kDouble };

// Of the moments and the arithmetic of a variable of this type.
inline Type state_of(Type variable) { return variable == Type::kDouble ? Type::kDouble : Type::kFloat; }

// Of an element, in bytes.
inline int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// How half and bfloat16 weights are kept.
enum class Rounding {
  kNearest,     // rounded to nearest
  kStochastic,  // rounded up or down at random, in proportion
  kMaster,      // the step is taken by a float copy, the master weights, and the variable is its rounding to nearest
};

// Which step it is, apart from its scalars.
struct Kind {
  Type variable, gradient;  // the gradient's: the variable's or that of its moments
  Rounding rounding;
  bool squared_gradient;  // nu_2 is not 1
  bool amsgrad;
  bool trust_ratio;  // LAMB; without the two before
};

// One variable. v_max, the largest v so far, is null without amsgrad, master without master weights. g may be null.
struct Parameter {
  char *w, *m, *v, *v_max, *master;
  const char* g;
  int64_t size;  // in elements
  bool weight_decay, layer_adaptation;
  uint32_t stream;  // which random numbers round it
};

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_PARAMETER_H_
