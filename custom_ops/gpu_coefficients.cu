// The coefficients of a step, computed by one thread of the GPU, whose memory holds the iterations and the learning
// rate.

#include "coefficients.h"
#include "gpu_blocks.h"

namespace tfav {
namespace {

__global__ void compute_coefficients(const __grid_constant__ StaticCoefficients fixed,
                                     const __grid_constant__ StepInputs inputs, Coefficients* result) {
  if (threadIdx.x == 0) *result = coefficients_of(fixed, inputs);
}

}  // namespace
}  // namespace tfav

int tfav_gpu_coefficients(const tfav::StaticCoefficients* fixed, const tfav::StepInputs* inputs, double* result,
                          void* stream) {
  return tfav::launch_kernel(tfav::compute_coefficients, 1, stream, *fixed, *inputs,
                             reinterpret_cast<tfav::Coefficients*>(result));
}
