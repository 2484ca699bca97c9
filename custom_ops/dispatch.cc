// Chooses among the compiled loops those for this processor.

#include "loops.h"

namespace tfav {

#define TFAV_DECLARE(set)                 \
  Loops loops_##set(const KernelConfig&); \
  SquaredNormLoop squared_norm_##set(DType);

TFAV_DECLARE(baseline)

#ifdef TFAV_X86_LEVELS  // loops.cc was compiled for x86-64-v3 and -v4 too

TFAV_DECLARE(v3)
TFAV_DECLARE(v4)

static int x86_level() {
  static const int detected = [] {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? 4
               : 3;
  }();
  return detected;
}

#define TFAV_CHOOSE(call) (x86_level() == 4 ? call(v4) : x86_level() == 3 ? call(v3) : call(baseline))
const char* instruction_set() { return x86_level() == 4 ? "x86-64-v4" : x86_level() == 3 ? "x86-64-v3" : "baseline"; }

#else

#define TFAV_CHOOSE(call) call(baseline)
const char* instruction_set() { return "baseline"; }

#endif

Loops loops_for(const KernelConfig& config) {
#define TFAV_LOOPS(set) loops_##set(config)
  return TFAV_CHOOSE(TFAV_LOOPS);
}

SquaredNormLoop squared_norm_for(DType gradient) {
#define TFAV_SQUARED_NORM(set) squared_norm_##set(gradient)
  return TFAV_CHOOSE(TFAV_SQUARED_NORM);
}

}  // namespace tfav

// For `python -m tf_adam_variants.fused status`.
extern "C" __attribute__((visibility("default"))) const char* tfav_instruction_set() { return tfav::instruction_set(); }
