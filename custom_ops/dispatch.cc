// Which of the compiled loops this processor runs.

#include "loops.h"

namespace tfav {

#define TFAV_DECLARE(set)         \
  Loops loops_##set(const Kind&); \
  SquaredNormLoop squares_##set(Type);

TFAV_DECLARE(baseline)

#ifdef TFAV_X86_LEVELS  // loops.cc was compiled for x86-64-v3 and -v4 too

TFAV_DECLARE(v3)
TFAV_DECLARE(v4)

static int level() {
  static const int found = [] {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? 4
               : 3;
  }();
  return found;
}

#define TFAV_CHOOSE(call) (level() == 4 ? call(v4) : level() == 3 ? call(v3) : call(baseline))
const char* instruction_set() { return level() == 4 ? "x86-64-v4" : level() == 3 ? "x86-64-v3" : "baseline"; }

#else

#define TFAV_CHOOSE(call) call(baseline)
const char* instruction_set() { return "baseline"; }

#endif

Loops loops_for(const Kind& kind) {
#define TFAV_LOOPS(set) loops_##set(kind)
  return TFAV_CHOOSE(TFAV_LOOPS);
}

SquaredNormLoop squared_norm_for(Type gradient) {
#define TFAV_SQUARES(set) squares_##set(gradient)
  return TFAV_CHOOSE(TFAV_SQUARES);
}

}  // namespace tfav

// For `python -m tf_adam_variants.fused status`.
extern "C" __attribute__((visibility("default"))) const char* tfav_instruction_set() { return tfav::instruction_set(); }
