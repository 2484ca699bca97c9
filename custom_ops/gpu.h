// A step on a GPU, given device memory and a stream: called by TensorFlow's kernels (gpu_ops.cc) and, through Python's
// ctypes, by tests/cuda_kernels.py. Needs no headers of CUDA.
//
// Everything is enqueued on the stream and nothing waits for it. Pointers are to the device's memory unless said
// otherwise, and of `Parameter` the array itself is in the host's. Functions that return an int return a cudaError_t: 0
// where all is well. They write no gradient and use no memory but the scratch that they are given, whose size the
// function before each returns; its contents do not matter.

#ifndef TF_ADAM_VARIANTS_GPU_H_
#define TF_ADAM_VARIANTS_GPU_H_

#include <stdint.h>

#include "parameter.h"
#include "step_scalars.h"

namespace tfav {

// What is the same for all variables of a step.
struct GpuLaunch {
  Kind kind;
  bool step_on_host;
  const double* step;  // Step of adam_math.h
  void* scratch;       // aligned to 16 bytes
  int64_t scratch_bytes;
  void* stream;  // a cudaStream_t
};

}  // namespace tfav

#define TFAV_EXPORT extern "C" __attribute__((visibility("default")))

// One step of `count` variables. The same to the last bit each time.
TFAV_EXPORT int64_t tfav_gpu_dense_scratch(const tfav::Parameter*, int64_t count, const tfav::GpuLaunch*);
TFAV_EXPORT int tfav_gpu_dense(const tfav::Parameter*, int64_t count, const tfav::GpuLaunch*);

// One step of one variable of `rows` rows, whose g are the rows that `ids` name; repeated ones are added up in their
// order, where one has hundreds by parts; ids that no row has are passed over. The same to the last bit each time.
// exact: all other rows have a gradient of zero; otherwise nothing happens to them. Fewer than 2^31 ids.
TFAV_EXPORT int64_t tfav_gpu_sparse_scratch(const tfav::Parameter*, int64_t rows, int64_t ids, int exact);
TFAV_EXPORT int tfav_gpu_sparse(const tfav::Parameter*, int64_t rows, const void* ids, int64_t count, int ids_are_int64,
                                int exact, const tfav::GpuLaunch*);

// sum = the sum of the squares of all g, which are of type `kind.gradient`. Nothing else of the variables is looked at.
TFAV_EXPORT int64_t tfav_gpu_squared_norm_scratch(const tfav::Parameter*, int64_t count);
TFAV_EXPORT int tfav_gpu_squared_norm(const tfav::Parameter*, int64_t count, double* sum, const tfav::GpuLaunch*);

// The scalars of a step. The structures themselves are in the host's memory.
TFAV_EXPORT int tfav_gpu_scalars(const tfav::Constants*, const tfav::StepInputs*, double* step, void* stream);

TFAV_EXPORT int tfav_gpu_copy(void* to, const void* from, int64_t bytes, void* stream);

// 0 where CUDA's device of this number runs these kernels; otherwise, as of any of the above, what stands in the way.
TFAV_EXPORT int tfav_gpu_ready(int device);
TFAV_EXPORT const char* tfav_gpu_error(int error);

#endif  // TF_ADAM_VARIANTS_GPU_H_
