// The innermost loops: a span of elements, one thread. Compiled once for each set of instructions (loops.cc).

#ifndef TF_ADAM_VARIANTS_LOOPS_H_
#define TF_ADAM_VARIANTS_LOOPS_H_

#include <stdint.h>

#include "adam_math.h"
#include "parameter.h"

namespace tfav {

// A run of elements of one variable.
struct Span {
  void* w;
  void* m;
  void* v;
  void* v_max;    // the largest v so far, or null
  const void* g;  // null: zeros
  int64_t size;
  int variable;
};

// decay, step_size: the variable's.
using Loop = void (*)(const Span&, const Step&, double decay, double step_size, Norms*);
// Adds up the squares of a gradient's elements, as they are.
using SquaredNormLoop = double (*)(const void* g, int64_t size);

struct Loops {
  Loop adam, norms, apply;
};

// The loops for a type of variables and of gradients (the variable's, or that of its moments), with or
// without the g^2 of nu_2 != 1 under the root and the largest v of amsgrad. Chosen for this processor.
Loops loops_for(Type variable, Type gradient, bool squared_gradient, bool amsgrad);
SquaredNormLoop squared_norm_for(Type gradient);
// The instructions that were chosen: "x86-64-v4", "x86-64-v3" or "baseline".
const char* instruction_set();

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_LOOPS_H_
