// A step on a GPU, given device memory and a stream: called by TensorFlow's kernels (gpu_ops.cc) and, through Python's
// ctypes, by tests/tools/cuda_kernels.py. Needs no headers of CUDA.
//
// The functions enqueue everything on the stream and never wait for it. Pointers are to device memory unless said
// otherwise; arrays of VariableState are in host memory. Functions that return an int return a cudaError_t, 0 for
// success. They write no gradient. Their only temporary memory is the scratch in GpuLaunch, whose size the function
// above each of them returns and whose contents do not matter.

#ifndef TF_ADAM_VARIANTS_GPU_H_
#define TF_ADAM_VARIANTS_GPU_H_

#include <stdint.h>

#include "coefficients.h"
#include "variable_state.h"

namespace tfav {

// What is the same for all variables of a step.
struct GpuLaunch {
  KernelConfig config;
  bool coefficients_on_host;
  const double* coefficients;  // Coefficients of adam_math.h
  void* scratch;               // aligned to 16 bytes
  int64_t scratch_bytes;
  void* stream;  // a cudaStream_t
};

}  // namespace tfav

#define TFAV_EXPORT extern "C" __attribute__((visibility("default")))

// One step of `count` variables, bit-exact each time.
TFAV_EXPORT int64_t tfav_gpu_dense_scratch(const tfav::VariableState*, int64_t count, const tfav::GpuLaunch*);
TFAV_EXPORT int tfav_gpu_dense(const tfav::VariableState*, int64_t count, const tfav::GpuLaunch*);

// One step of one variable of `rows` rows, bit-exact each time. Its g has one row per index. The values of repeated
// indices are summed in their order, or in parts where an index repeats a hundred times; indices outside [0, rows) are
// ignored. exact: all other rows have a gradient of zero; otherwise they do not change. Fewer than 2^31 indices.
TFAV_EXPORT int64_t tfav_gpu_sparse_scratch(const tfav::VariableState*, int64_t rows, int64_t indices, int exact);
TFAV_EXPORT int tfav_gpu_sparse(const tfav::VariableState*, int64_t rows, const void* indices, int64_t count,
                                int indices_are_int64, int exact, const tfav::GpuLaunch*);

// sum = the sum of the squares of all g, which have the type `config.gradient`. Reads only g and size.
TFAV_EXPORT int64_t tfav_gpu_squared_norm_scratch(const tfav::VariableState*, int64_t count);
TFAV_EXPORT int tfav_gpu_squared_norm(const tfav::VariableState*, int64_t count, double* sum, const tfav::GpuLaunch*);

// The coefficients of a step. The two structures are in host memory.
TFAV_EXPORT int tfav_gpu_coefficients(const tfav::StaticCoefficients*, const tfav::StepInputs*, double* coefficients,
                                      void* stream);

TFAV_EXPORT int tfav_gpu_copy(void* to, const void* from, int64_t bytes, void* stream);

// 0 if CUDA's device of this number can run the kernels; otherwise the error that prevents it.
TFAV_EXPORT int tfav_gpu_ready(int device);
TFAV_EXPORT const char* tfav_gpu_error(int error);

#endif  // TF_ADAM_VARIANTS_GPU_H_
