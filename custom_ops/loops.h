// The innermost loops: one thread updates one span. Compiled once per instruction set (loops.cc).

#ifndef TF_ADAM_VARIANTS_LOOPS_H_
#define TF_ADAM_VARIANTS_LOOPS_H_

#include <stdint.h>

#include "adam_math.h"
#include "variable_state.h"

namespace tfav {

// Neighbouring elements of one variable.
struct Span {
  void* w;
  void* m;
  void* v;
  void* v_max;    // the largest v so far, or null
  void* master;   // master weights, or null
  const void* g;  // null: zeros
  int64_t begin;  // index of the first element in the variable
  int64_t size;
  int variable;         // index of the variable among those of the step
  uint32_t rng_stream;  // of the variable
};

// decay and step_size are those of the variable. Only the pass for norms adds to Norms.
using SpanLoop = void (*)(const Span&, const Coefficients&, double decay, double step_size, Norms*);
// Returns the sum of the squares of the elements of a gradient, without gradient_scale.
using SquaredNormLoop = double (*)(const void* g, int64_t size);

struct Loops {
  SpanLoop adam, norms, apply;
};

// The loops for a step on this processor.
Loops loops_for(const KernelConfig&);
SquaredNormLoop squared_norm_for(DType gradient);
// The instruction set of these loops: "x86-64-v4", "x86-64-v3" or "baseline".
const char* instruction_set();

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_LOOPS_H_
