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
  void* master;   // master weights, or null
  const void* g;  // null: zeros
  int64_t begin;  // its first element's index in the variable
  int64_t size;
  int variable;
  uint32_t stream;  // the variable's, of random numbers
};

// decay, step_size: the variable's.
using Loop = void (*)(const Span&, const Step&, double decay, double step_size, Norms*);
// Adds up the squares of a gradient's elements, as they are.
using SquaredNormLoop = double (*)(const void* g, int64_t size);

struct Loops {
  Loop adam, norms, apply;
};

// The loops of a step, chosen for this processor.
Loops loops_for(const Kind&);
SquaredNormLoop squared_norm_for(Type gradient);
// The instructions that were chosen: "x86-64-v4", "x86-64-v3" or "baseline".
const char* instruction_set();

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_LOOPS_H_
