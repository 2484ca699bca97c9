// The ops on a GPU: the kernels of gpu.h on TensorFlow's stream. Needs neither CUDA's headers nor its compiler.

#include "gpu.h"
#include "op_kernels.h"
#include "xla/stream_executor/stream.h"

// The tests, where no GPU is, have the kernels compiled for the CPU, and register them there.
#ifndef TFAV_GPU_DEVICE
#define TFAV_GPU_DEVICE DEVICE_GPU
#endif

namespace tensorflow {
namespace tf_adam_variants {
namespace {

Status StatusOf(int error) {
  if (error == 0) return OkStatus();
  return errors::Internal("The step on the GPU failed: ", tfav_gpu_error(error), " (CUDA error ", error, ")");
}

void* StreamOf(OpKernelContext* ctx) {
  const DeviceContext* device = ctx->op_device_context();
  return device == nullptr ? nullptr : device->stream()->platform_specific_handle().stream;  // null: the tests' CPU
}

struct Gpu {
  static Status Copy(OpKernelContext* ctx, void* to, const void* from, size_t bytes) {
    return StatusOf(tfav_gpu_copy(to, from, int64_t(bytes), StreamOf(ctx)));
  }

  static Status Dense(OpKernelContext* ctx, const tfav::Kind& kind, const std::vector<tfav::Parameter>& t,
                      const Tensor& step) {
    tfav::GpuLaunch launch = LaunchOf(kind, step);
    Tensor scratch;
    TF_RETURN_IF_ERROR(Prepare(ctx, tfav_gpu_dense_scratch(t.data(), int64_t(t.size()), &launch), &launch, &scratch));
    return StatusOf(tfav_gpu_dense(t.data(), int64_t(t.size()), &launch));
  }

  // The ids are in the GPU's memory, and to look at them would mean to wait for it.
  static Status CheckIds(const Tensor& ids, int64_t) {
    if (ids.NumElements() <= INT32_MAX) return OkStatus();
    return errors::InvalidArgument("A gradient's slices must be fewer than 2^31. Received: ", ids.NumElements());
  }

  static Status Sparse(OpKernelContext* ctx, const tfav::Kind& kind, const tfav::Parameter& t, const Tensor& ids,
                       int64_t rows, bool exact, const Tensor& step) {
    tfav::GpuLaunch launch = LaunchOf(kind, step);
    const int64_t count = ids.NumElements();
    Tensor scratch;
    TF_RETURN_IF_ERROR(Prepare(ctx, tfav_gpu_sparse_scratch(&t, rows, count, exact), &launch, &scratch));
    return StatusOf(tfav_gpu_sparse(&t, rows, ids.data(), count, ids.dtype() == DT_INT64, exact, &launch));
  }

  static Status SquaredNorm(OpKernelContext* ctx, tfav::Type type, const std::vector<tfav::Parameter>& gradients,
                            double* sum) {
    tfav::GpuLaunch launch = {};
    launch.kind.gradient = type;
    Tensor scratch;
    const int64_t count = int64_t(gradients.size());
    TF_RETURN_IF_ERROR(Prepare(ctx, tfav_gpu_squared_norm_scratch(gradients.data(), count), &launch, &scratch));
    return StatusOf(tfav_gpu_squared_norm(gradients.data(), count, sum, &launch));
  }

  static Status Scalars(OpKernelContext* ctx, const tfav::Constants& constants, const tfav::StepInputs& inputs,
                        double* step) {
    return StatusOf(tfav_gpu_scalars(&constants, &inputs, step, StreamOf(ctx)));
  }

 private:
  static tfav::GpuLaunch LaunchOf(const tfav::Kind& kind, const Tensor& step) {
    tfav::GpuLaunch launch = {};
    launch.kind = kind;
    launch.step = static_cast<const double*>(step.data());
    return launch;
  }

  // TensorFlow does not reuse the memory of `scratch` before what is on the stream has used it.
  static Status Prepare(OpKernelContext* ctx, int64_t bytes, tfav::GpuLaunch* launch, Tensor* scratch) {
    launch->stream = StreamOf(ctx);
    launch->scratch_bytes = bytes;
    TF_RETURN_IF_ERROR(ctx->allocate_temp(DT_UINT8, TensorShape({bytes}), scratch));
    launch->scratch = scratch->data();
    return OkStatus();
  }
};

TFAV_REGISTER_KERNELS(TFAV_GPU_DEVICE, Gpu)

}  // namespace
}  // namespace tf_adam_variants
}  // namespace tensorflow
