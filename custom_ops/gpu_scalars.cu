// The scalars of a step on a GPU, where the count of updates and the learning rate are: one thread makes them.

#include "gpu_blocks.h"
#include "step_scalars.h"

namespace tfav {
namespace {

__global__ void scalars(const __grid_constant__ Constants constants, const __grid_constant__ StepInputs inputs,
                        Step* to) {
  if (threadIdx.x == 0) *to = step_of(constants, inputs);
}

}  // namespace
}  // namespace tfav

int tfav_gpu_scalars(const tfav::Constants* constants, const tfav::StepInputs* inputs, double* to, void* stream) {
  return tfav::launch_kernel(tfav::scalars, 1, stream, *constants, *inputs, reinterpret_cast<tfav::Step*>(to));
}
