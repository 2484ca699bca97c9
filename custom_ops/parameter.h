// A variable with its slots and its gradient in memory, and the types of their elements.

#ifndef TF_ADAM_VARIANTS_PARAMETER_H_
#define TF_ADAM_VARIANTS_PARAMETER_H_

#include <stdint.h>

namespace tfav {

enum class Type { kHalf, kBFloat16, kFloat, kDouble };

// Of the moments and the arithmetic of a variable of this type.
inline Type state_of(Type variable) { return variable == Type::kDouble ? Type::kDouble : Type::kFloat; }

// Of an element, in bytes.
inline int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// One variable. v_max, the largest v so far, and g may be null.
struct Parameter {
  char *w, *m, *v, *v_max;
  const char* g;
  int64_t size;  // in elements
  bool weight_decay, layer_adaptation;
};

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_PARAMETER_H_
