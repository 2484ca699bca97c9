// The ops on a CPU: TensorFlow's threads run the step of step.h.

#include <cstring>

#include "op_kernels.h"
#include "sparse.h"
#include "step.h"
#include "tensorflow/core/platform/threadpool.h"

namespace tensorflow {
namespace tf_adam_variants {
namespace {

// Neighbouring tasks. Each thread runs its own share first, in the order of memory, because the processor prefetches
// that better than every other task; then it helps with the remaining shares.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

tfav::Parallel ThreadsOf(OpKernelContext* ctx) {
  thread::ThreadPool* pool = ctx->device()->tensorflow_cpu_worker_threads()->workers;
  return [pool](int64_t n, const std::function<void(int64_t)>& f) {
    const int64_t workers = std::min<int64_t>(n, pool->NumThreads());
    if (workers <= 1) {
      for (int64_t i = 0; i < n; ++i) f(i);
      return;
    }
    std::vector<Share> shares(workers);
    for (int64_t k = 0; k < workers; ++k) {
      shares[k].next = n * k / workers;
      shares[k].end = n * (k + 1) / workers;
    }
    using thread::ThreadPool;
    const ThreadPool::SchedulingParams one_each(ThreadPool::SchedulingStrategy::kFixedBlockSize, {}, 1);
    pool->ParallelFor(workers, one_each, [&](int64_t first, int64_t) {
      for (int64_t k = 0; k < workers; ++k) {
        Share& share = shares[(first + k) % workers];
        for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) f(i);
      }
    });
  };
}

tfav::Coefficients ToCoefficients(const Tensor& tensor) {
  tfav::Coefficients c;
  memcpy(&c, tensor.data(), sizeof c);
  return c;
}

std::vector<int64_t> ToInt64(const Tensor& indices) {
  std::vector<int64_t> result(indices.NumElements());
  if (indices.dtype() == DT_INT32) {
    std::copy_n(static_cast<const int32_t*>(indices.data()), result.size(), result.begin());
  } else {
    std::copy_n(static_cast<const int64_t*>(indices.data()), result.size(), result.begin());
  }
  return result;
}

tfav::ElementSizes ElementSizesOf(tfav::DType variable, tfav::DType gradient) {
  return {tfav::size_of(variable), tfav::size_of(tfav::slot_dtype(variable)), tfav::size_of(gradient)};
}

void RunStep(OpKernelContext* ctx, const tfav::KernelConfig& config, tfav::Partition& partition,
             const std::vector<tfav::VariableState>& variables, const tfav::Coefficients& c, const tfav::Loops& loops) {
  if (config.trust_ratio) {
    tfav::lamb(partition, variables, c, loops, ThreadsOf(ctx));
  } else {
    tfav::adam(partition, variables, c, loops.adam, ThreadsOf(ctx));
  }
}

struct CpuBackend {
  static Status Copy(OpKernelContext*, void* to, const void* from, size_t bytes) {
    memcpy(to, from, bytes);
    return OkStatus();
  }

  static Status StepDense(OpKernelContext* ctx, const tfav::KernelConfig& config,
                          const std::vector<tfav::VariableState>& variables, const Tensor& coefficients) {
    const tfav::Coefficients c = ToCoefficients(coefficients);
    const tfav::Loops loops = tfav::loops_for(config);
    const tfav::ElementSizes sizes = ElementSizesOf(config.variable, config.gradient);
    tfav::Partition partition(sizes);
    for (size_t i = 0; i < variables.size(); ++i) {
      partition.add(variables[i], int(i), 0, variables[i].size, variables[i].g);
      if (config.trust_ratio && partition.elements() >= tfav::kLambBatch) {
        RunStep(ctx, config, partition, variables, c, loops);
        partition = tfav::Partition(sizes);
      }
    }
    RunStep(ctx, config, partition, variables, c, loops);
    return OkStatus();
  }

  static Status CheckIndices(const Tensor& indices, int64_t rows) {
    const std::vector<int64_t> index = ToInt64(indices);
    for (size_t i = 0; i < index.size(); ++i) {
      if (index[i] < 0 || index[i] >= rows) {
        return errors::InvalidArgument("The ids of a gradient's slices must be in [0, ", rows,
                                       "). Received: ", index[i], " at ", i);
      }
    }
    return OkStatus();
  }

  static Status StepSparse(OpKernelContext* ctx, const tfav::KernelConfig& config, const tfav::VariableState& variable,
                           const Tensor& indices, int64_t num_rows, bool exact, const Tensor& coefficients) {
    const std::vector<int64_t> index = ToInt64(indices);
    const tfav::UniqueRows rows(index.data(), int64_t(index.size()));
    const int64_t width = num_rows > 0 ? variable.size / num_rows : 0;
    const tfav::DType slot = tfav::slot_dtype(config.variable);
    const int64_t row_bytes = width * tfav::size_of(slot);
    Tensor sum_tensor;
    TF_RETURN_IF_ERROR(ctx->allocate_temp(slot == tfav::DType::kDouble ? DT_DOUBLE : DT_FLOAT,
                                          TensorShape({rows.count(), width}), &sum_tensor));
    char* sums = static_cast<char*>(sum_tensor.data());
    const int64_t rows_per_task = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width));
    ThreadsOf(ctx)((rows.count() + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
      const int64_t end = std::min(rows.count(), (task + 1) * rows_per_task);
      for (int64_t i = task * rows_per_task; i < end; ++i) {
        rows.sum_values(i, config.gradient, variable.g, width, sums + i * row_bytes);
      }
    });
    tfav::KernelConfig sums_config = config;
    sums_config.gradient = slot;
    tfav::Partition partition(ElementSizesOf(config.variable, slot));
    tfav::add_rows(partition, variable, rows, width, sums, row_bytes, exact);
    RunStep(ctx, sums_config, partition, {variable}, ToCoefficients(coefficients), tfav::loops_for(sums_config));
    return OkStatus();
  }

  static Status SquaredNorm(OpKernelContext* ctx, tfav::DType dtype, const std::vector<tfav::VariableState>& gradients,
                            double* sum) {
    *sum = tfav::squared_norm(gradients, tfav::size_of(dtype), tfav::squared_norm_for(dtype), ThreadsOf(ctx));
    return OkStatus();
  }

  static Status ComputeCoefficients(OpKernelContext*, const tfav::StaticCoefficients& fixed,
                                    const tfav::StepInputs& inputs, double* coefficients) {
    const tfav::Coefficients c = tfav::coefficients_of(fixed, inputs);
    memcpy(coefficients, &c, sizeof c);
    return OkStatus();
  }
};

TFAV_REGISTER_KERNELS(DEVICE_CPU, CpuBackend)

}  // namespace
}  // namespace tf_adam_variants
}  // namespace tensorflow
