// What the CPU's and the GPU's step are given: variables in memory, and their types.

#ifndef TF_ADAM_VARIANTS_TENSORS_H_
#define TF_ADAM_VARIANTS_TENSORS_H_

#include <stdint.h>

namespace tfav {

enum class Type { kHalf, kBFloat16, kFloat, kDouble };

// Of the moments and the arithmetic of a variable of this type.
inline Type state_of(Type variable) { return variable == Type::kDouble ? Type::kDouble : Type::kFloat; }

// Of an element, in bytes.
inline int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

// One variable. top, the largest v so far, and g may be null.
struct Tensors {
  char *w, *m, *v, *top;
  const char* g;
  int64_t size;  // in elements
  bool decays, adapts;
};

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_TENSORS_H_
