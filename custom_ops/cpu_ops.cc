// The ops on a CPU: TensorFlow's threads take the step of step.h.

#include <cstring>

#include "op_kernels.h"
#include "sparse.h"
#include "step.h"
#include "tensorflow/core/platform/threadpool.h"

namespace tensorflow {
namespace tf_adam_variants {
namespace {

// Each thread begins with a share of its own, so that it walks through memory: the processor fetches ahead better than
// where threads take every other block. Whose share is done takes from the others'.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

tfav::Parallel OnThreadsOf(OpKernelContext* ctx) {
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

tfav::Step StepOf(const Tensor& step) {
  tfav::Step s;
  memcpy(&s, step.data(), sizeof s);
  return s;
}

void Run(OpKernelContext* ctx, const tfav::Kind& kind, tfav::Plan& plan, const std::vector<tfav::Parameter>& t,
         const tfav::Step& s, const tfav::Loops& loops) {
  if (kind.trust_ratio) {
    tfav::lamb(plan, t, s, loops, OnThreadsOf(ctx));
  } else {
    tfav::adam(plan, t, s, loops.adam, OnThreadsOf(ctx));
  }
}

std::vector<int64_t> Widened(const Tensor& ids) {
  std::vector<int64_t> wide(ids.NumElements());
  if (ids.dtype() == DT_INT32) {
    std::copy_n(static_cast<const int32_t*>(ids.data()), wide.size(), wide.begin());
  } else {
    std::copy_n(static_cast<const int64_t*>(ids.data()), wide.size(), wide.begin());
  }
  return wide;
}

struct Cpu {
  static Status Copy(OpKernelContext*, void* to, const void* from, size_t bytes) {
    memcpy(to, from, bytes);
    return OkStatus();
  }

  static Status Dense(OpKernelContext* ctx, const tfav::Kind& kind, const std::vector<tfav::Parameter>& t,
                      const Tensor& step) {
    const tfav::Step s = StepOf(step);
    const tfav::Loops loops = tfav::loops_for(kind);
    const tfav::Sizes sizes = SizesOf(kind.variable, kind.gradient);
    tfav::Plan plan(sizes);
    for (size_t i = 0; i < t.size(); ++i) {
      plan.add(t[i], int(i), 0, t[i].size, t[i].g);
      if (kind.trust_ratio && plan.elements() >= tfav::kTogether) {
        Run(ctx, kind, plan, t, s, loops);
        plan = tfav::Plan(sizes);
      }
    }
    Run(ctx, kind, plan, t, s, loops);
    return OkStatus();
  }

  static Status CheckIds(const Tensor& ids, int64_t rows) {
    const std::vector<int64_t> id = Widened(ids);
    for (size_t i = 0; i < id.size(); ++i) {
      if (id[i] < 0 || id[i] >= rows) {
        return errors::InvalidArgument("The ids of a gradient's slices must be in [0, ", rows, "). Received: ", id[i],
                                       " at ", i);
      }
    }
    return OkStatus();
  }

  static Status Sparse(OpKernelContext* ctx, const tfav::Kind& kind, const tfav::Parameter& t, const Tensor& ids,
                       int64_t rows, bool exact, const Tensor& step) {
    const std::vector<int64_t> id = Widened(ids);
    const tfav::Rows named(id.data(), int64_t(id.size()));
    const int64_t width = rows > 0 ? t.size / rows : 0;
    const tfav::Type state = tfav::state_of(kind.variable);  // in which rows are added up
    const int64_t bytes = width * tfav::size_of(state);
    Tensor sums;
    TF_RETURN_IF_ERROR(ctx->allocate_temp(state == tfav::Type::kDouble ? DT_DOUBLE : DT_FLOAT,
                                          TensorShape({named.count(), width}), &sums));
    char* sum = static_cast<char*>(sums.data());
    const int64_t together = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width));
    OnThreadsOf(ctx)((named.count() + together - 1) / together, [&](int64_t block) {
      const int64_t end = std::min(named.count(), (block + 1) * together);
      for (int64_t i = block * together; i < end; ++i) named.add_up(i, kind.gradient, t.g, width, sum + i * bytes);
    });
    tfav::Kind of_sums = kind;
    of_sums.gradient = state;
    tfav::Plan plan(SizesOf(kind.variable, state));
    tfav::add_rows(plan, t, named, width, sum, bytes, exact);
    Run(ctx, of_sums, plan, {t}, StepOf(step), tfav::loops_for(of_sums));
    return OkStatus();
  }

  static Status SquaredNorm(OpKernelContext* ctx, tfav::Type type, const std::vector<tfav::Parameter>& gradients,
                            double* sum) {
    *sum = tfav::squared_norm(gradients, tfav::size_of(type), tfav::squared_norm_for(type), OnThreadsOf(ctx));
    return OkStatus();
  }

  static Status Scalars(OpKernelContext*, const tfav::Constants& constants, const tfav::StepInputs& inputs,
                        double* step) {
    const tfav::Step s = tfav::step_of(constants, inputs);
    memcpy(step, &s, sizeof s);
    return OkStatus();
  }

 private:
  static tfav::Sizes SizesOf(tfav::Type variable, tfav::Type gradient) {
    return {tfav::size_of(variable), tfav::size_of(tfav::state_of(variable)), tfav::size_of(gradient)};
  }
};

TFAV_REGISTER_KERNELS(DEVICE_CPU, Cpu)

}  // namespace
}  // namespace tf_adam_variants
}  // namespace tensorflow
