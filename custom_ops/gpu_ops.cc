// The ops on a GPU: the kernels of gpu.h on TensorFlow's stream. Needs neither the headers of CUDA nor its compiler.

#include "gpu.h"
#include "op_kernels.h"
#include "xla/stream_executor/stream.h"

// Where there is no GPU, the tests compile the kernels for the CPU and register them there.
#ifndef TFAV_GPU_DEVICE
#define TFAV_GPU_DEVICE DEVICE_GPU
#endif

namespace tensorflow {
namespace tf_adam_variants {
namespace {

Status ToStatus(int error) {
  if (error == 0) return OkStatus();
  return errors::Internal("The step on the GPU failed: ", tfav_gpu_error(error), " (CUDA error ", error, ")");
}

void* StreamOf(OpKernelContext* ctx) {
  const DeviceContext* device = ctx->op_device_context();
  return device == nullptr ? nullptr : device->stream()->platform_specific_handle().stream;  // null: a CPU, in tests
}

struct GpuBackend {
  static Status Copy(OpKernelContext* ctx, void* to, const void* from, size_t bytes) {
    return ToStatus(tfav_gpu_copy(to, from, int64_t(bytes), StreamOf(ctx)));
  }

  static Status StepDense(OpKernelContext* ctx, const tfav::KernelConfig& config,
                          const std::vector<tfav::VariableState>& variables, const Tensor& coefficients) {
    tfav::GpuLaunch launch = LaunchOf(config, coefficients);
    const int64_t count = int64_t(variables.size());
    Tensor scratch;
    TF_RETURN_IF_ERROR(Prepare(ctx, tfav_gpu_dense_scratch(variables.data(), count, &launch), &launch, &scratch));
    return ToStatus(tfav_gpu_dense(variables.data(), count, &launch));
  }

  // The values of the indices are in device memory; to check them would mean to wait for the GPU.
  static Status CheckIndices(const Tensor& indices, int64_t) {
    if (indices.NumElements() <= INT32_MAX) return OkStatus();
    return errors::InvalidArgument("A gradient's slices must be fewer than 2^31. Received: ", indices.NumElements());
  }

  static Status StepSparse(OpKernelContext* ctx, const tfav::KernelConfig& config, const tfav::VariableState& variable,
                           const Tensor& indices, int64_t rows, bool exact, const Tensor& coefficients) {
    tfav::GpuLaunch launch = LaunchOf(config, coefficients);
    const int64_t count = indices.NumElements();
    Tensor scratch;
    TF_RETURN_IF_ERROR(Prepare(ctx, tfav_gpu_sparse_scratch(&variable, rows, count, exact), &launch, &scratch));
    return ToStatus(
        tfav_gpu_sparse(&variable, rows, indices.data(), count, indices.dtype() == DT_INT64, exact, &launch));
  }

  static Status SquaredNorm(OpKernelContext* ctx, tfav::DType dtype, const std::vector<tfav::VariableState>& gradients,
                            double* sum) {
    tfav::GpuLaunch launch = {};
    launch.config.gradient = dtype;
    Tensor scratch;
    const int64_t count = int64_t(gradients.size());
    TF_RETURN_IF_ERROR(Prepare(ctx, tfav_gpu_squared_norm_scratch(gradients.data(), count), &launch, &scratch));
    return ToStatus(tfav_gpu_squared_norm(gradients.data(), count, sum, &launch));
  }

  static Status ComputeCoefficients(OpKernelContext* ctx, const tfav::StaticCoefficients& fixed,
                                    const tfav::StepInputs& inputs, double* coefficients) {
    return ToStatus(tfav_gpu_coefficients(&fixed, &inputs, coefficients, StreamOf(ctx)));
  }

 private:
  static tfav::GpuLaunch LaunchOf(const tfav::KernelConfig& config, const Tensor& coefficients) {
    tfav::GpuLaunch launch = {};
    launch.config = config;
    launch.coefficients = static_cast<const double*>(coefficients.data());
    return launch;
  }

  // TensorFlow reuses the memory of `scratch` only after everything on the stream has used it.
  static Status Prepare(OpKernelContext* ctx, int64_t bytes, tfav::GpuLaunch* launch, Tensor* scratch) {
    launch->stream = StreamOf(ctx);
    launch->scratch_bytes = bytes;
    TF_RETURN_IF_ERROR(ctx->allocate_temp(DT_UINT8, TensorShape({bytes}), scratch));
    launch->scratch = scratch->data();
    return OkStatus();
  }
};

TFAV_REGISTER_KERNELS(TFAV_GPU_DEVICE, GpuBackend)

}  // namespace
}  // namespace tf_adam_variants
}  // namespace tensorflow
