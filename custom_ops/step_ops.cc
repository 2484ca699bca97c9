// The ops: their interface, the checks of what they are given, and the way from TensorFlow's variables to plain
// pointers. The only file with TensorFlow's headers.

#include <algorithm>
#include <string>
#include <vector>

#include "rows.h"
#include "step.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/threadpool.h"

namespace tensorflow {
namespace {

using shape_inference::InferenceContext;
using shape_inference::ShapeHandle;

Status ScalarsShape(InferenceContext* c, int input) {
  ShapeHandle scalars;
  return c->Merge(c->input(input), c->Vector(tfav::kScalars), &scalars);
}

// The shape that a variable's handle tells of, unknown where it does not.
ShapeHandle HandleShape(InferenceContext* c, int input) {
  const auto* known = c->input_handle_shapes_and_types(input);
  return known == nullptr || known->empty() ? c->UnknownShape() : (*known)[0].shape;
}

Status DenseShapes(InferenceContext* c) {
  int n, maxima;
  TF_RETURN_IF_ERROR(c->GetAttr("N", &n));
  TF_RETURN_IF_ERROR(c->GetAttr("num_maxima", &maxima));
  std::vector<bool> decays, adapts;
  TF_RETURN_IF_ERROR(c->GetAttr("decays", &decays));
  TF_RETURN_IF_ERROR(c->GetAttr("adapts", &adapts));
  if (int(decays.size()) != n || int(adapts.size()) != n || (maxima != 0 && maxima != n)) {
    return errors::InvalidArgument("decays, adapts and maxima must have one element a variable, ", n,
                                   ". Received: ", decays.size(), ", ", adapts.size(), " and ", maxima);
  }
  TF_RETURN_IF_ERROR(ScalarsShape(c, 0));
  for (int i = 0; i < n; ++i) {
    ShapeHandle merged = c->input(1 + 3 * n + maxima + i);  // the gradient
    for (int slot = 0; slot < (maxima ? 4 : 3); ++slot) {
      TF_RETURN_IF_ERROR(c->Merge(merged, HandleShape(c, 1 + slot * n + i), &merged));
    }
  }
  return OkStatus();
}

Status RowsShapes(InferenceContext* c) {
  int maxima;
  TF_RETURN_IF_ERROR(c->GetAttr("num_maxima", &maxima));
  if (maxima > 1) return errors::InvalidArgument("There must be at most one of maxima. Received: ", maxima);
  TF_RETURN_IF_ERROR(ScalarsShape(c, 0));
  ShapeHandle variable = HandleShape(c, 1), ids, row, value_row;
  TF_RETURN_IF_ERROR(c->Merge(variable, HandleShape(c, 2), &variable));
  TF_RETURN_IF_ERROR(c->Merge(variable, HandleShape(c, 3), &variable));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(5 + maxima), 1, &ids));
  ShapeHandle values = c->input(4 + maxima);
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(values, 1, &values));
  shape_inference::DimensionHandle count;
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(values, 0), c->Dim(ids, 0), &count));
  if (!c->RankKnown(variable)) return OkStatus();
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(variable, 1, &variable));
  TF_RETURN_IF_ERROR(c->Subshape(variable, 1, &row));
  TF_RETURN_IF_ERROR(c->Subshape(values, 1, &value_row));
  return c->Merge(row, value_row, &row);
}

REGISTER_OP("TfAdamVariants>DenseStep")
    .Input("scalars: float64")
    .Input("variables: N * resource")
    .Input("momentums: N * resource")
    .Input("velocities: N * resource")
    .Input("maxima: num_maxima * resource")
    .Input("gradients: N * G")
    .Attr("N: int >= 1")
    .Attr("num_maxima: int >= 0")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("G: {half, bfloat16, float, double}")
    .Attr("square: bool")
    .Attr("trust_ratio: bool")
    .Attr("decays: list(bool)")
    .Attr("adapts: list(bool)")
    .SetIsStateful()
    .SetShapeFn(DenseShapes)
    .Doc("One step of N variables of type T, in place. See adam_math.h for the scalars.");

REGISTER_OP("TfAdamVariants>RowsStep")
    .Input("scalars: float64")
    .Input("variable: resource")
    .Input("momentum: resource")
    .Input("velocity: resource")
    .Input("maxima: num_maxima * resource")
    .Input("values: G")
    .Input("ids: I")
    .Attr("num_maxima: int >= 0")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("G: {half, bfloat16, float, double}")
    .Attr("I: {int32, int64}")
    .Attr("square: bool")
    .Attr("trust_ratio: bool")
    .Attr("decays: bool")
    .Attr("adapts: bool")
    .Attr("exact: bool")
    .SetIsStateful()
    .SetShapeFn(RowsShapes)
    .Doc("One step of one variable, in place, where the gradient is values in the rows of these ids. Repeated "
         "ids are summed. exact: other rows have a zero gradient; otherwise they are left alone.");

REGISTER_OP("TfAdamVariants>SquaredNorm")
    .Input("gradients: N * G")
    .Output("sum: float64")
    .Attr("N: int >= 1")
    .Attr("G: {half, bfloat16, float, double}")
    .SetShapeFn(shape_inference::ScalarShape)
    .Doc("The sum of the squares of all elements of all gradients.");

template <typename T>
struct Kind;
template <>
struct Kind<Eigen::half> {
  using Plain = tfav::Half;
  static constexpr tfav::Type value = tfav::Type::kHalf;
};
template <>
struct Kind<bfloat16> {
  using Plain = tfav::BFloat16;
  static constexpr tfav::Type value = tfav::Type::kBFloat16;
};
template <>
struct Kind<float> {
  using Plain = float;
  static constexpr tfav::Type value = tfav::Type::kFloat;
};
template <>
struct Kind<double> {
  using Plain = double;
  static constexpr tfav::Type value = tfav::Type::kDouble;
};

tfav::Parallel OnThreadsOf(OpKernelContext* ctx) {
  thread::ThreadPool* pool = ctx->device()->tensorflow_cpu_worker_threads()->workers;
  return [pool](int64_t n, const std::function<void(int64_t)>& f) {
    const int64_t workers = std::min<int64_t>(n, pool->NumThreads());
    if (workers <= 1) {
      for (int64_t i = 0; i < n; ++i) f(i);
      return;
    }
    std::atomic<int64_t> next{0};  // whoever is free takes the next block
    using thread::ThreadPool;
    const ThreadPool::SchedulingParams one_each(ThreadPool::SchedulingStrategy::kFixedBlockSize, {}, 1);
    pool->ParallelFor(workers, one_each, [&](int64_t, int64_t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    });
  };
}

// The variables of a step, locked against everybody else as long as this lives.
class Locked {
 public:
  // Handles first, first + 1, ..., first + count - 1 of the op's inputs.
  Status Lock(OpKernelContext* ctx, int first, int count) {
    vars_.resize(count);
    std::vector<mutex*> mutexes(count);
    for (int i = 0; i < count; ++i) {
      TF_RETURN_IF_ERROR(LookupResource(ctx, HandleFromInput(ctx, first + i), &vars_[i]));
      mutexes[i] = vars_[i]->mu();
    }
    std::sort(mutexes.begin(), mutexes.end());  // TensorFlow's order: nobody waits in a circle
    if (std::adjacent_find(mutexes.begin(), mutexes.end()) != mutexes.end()) {
      return errors::InvalidArgument("The variables of one step must all be different ones");
    }
    locks_.reserve(count);
    for (mutex* m : mutexes) locks_.emplace_back(*m);
    return OkStatus();
  }

  // The i-th variable, which must be of this type and, unless null, shape.
  Status Check(int i, DataType dtype, const TensorShape* shape) const {
    const Var& var = *vars_[i];
    if (!vars_[i]->is_initialized) return errors::FailedPrecondition("A variable of the step is not initialized");
    const Tensor& tensor = *vars_[i]->tensor();
    if (tensor.dtype() != dtype || (shape != nullptr && tensor.shape() != *shape)) {
      return errors::InvalidArgument(
          "A variable of the step must be ", DataTypeString(dtype),
          shape == nullptr ? "" : " of shape " + shape->DebugString(), ". Received: ", var.DebugString());
    }
    return OkStatus();
  }

  const Tensor& tensor(int i) const { return *vars_[i]->tensor(); }

  // Memory of the i-th variable that nobody else reads: a dense read that is still alive shares the tensor, and
  // then the variable gets a copy of its own. Sparse reads hold the lock instead.
  Status Writable(OpKernelContext* ctx, int i, char** data) {
    Tensor* tensor = vars_[i]->tensor();
    if (!tensor->RefCountIsOne()) {
      Tensor copy;
      TF_RETURN_IF_ERROR(ctx->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
      memcpy(copy.data(), tensor->data(), tensor->TotalBytes());
      *tensor = copy;
    }
    *data = static_cast<char*>(tensor->data());
    return OkStatus();
  }

 private:
  std::vector<core::RefCountPtr<Var>> vars_;
  std::vector<mutex_lock> locks_;  // released before the variables are
};

template <typename T, typename G>
class Step : public OpKernel {
 public:
  explicit Step(OpKernelConstruction* ctx) : OpKernel(ctx) {
    bool square;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("square", &square));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("trust_ratio", &trust_ratio_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_maxima", &maxima_));
    OP_REQUIRES(ctx, !(trust_ratio_ && (square || maxima_ > 0)),
                errors::InvalidArgument("A step with a trust ratio takes neither `square` nor `maxima`"));
    loops_ = tfav::loops_for(Kind<T>::value, Kind<G>::value, square, maxima_ > 0);
  }

 protected:
  using S = typename tfav::StateOf<T>::type;

  Status ScalarsOf(OpKernelContext* ctx, tfav::Scalars* s) const {
    const Tensor& t = ctx->input(0);
    if (t.dims() != 1 || t.NumElements() != tfav::kScalars) {
      return errors::InvalidArgument("scalars must have shape [", tfav::kScalars,
                                     "]. Received: ", t.shape().DebugString());
    }
    memcpy(s, t.data(), sizeof *s);
    return OkStatus();
  }

  // Variable i of n and its slots. Call it after all Checks: it may copy.
  Status TensorsOf(OpKernelContext* ctx, Locked* vars, int i, int n, tfav::Tensors* t) const {
    t->size = vars->tensor(i).NumElements();
    t->top = nullptr;
    TF_RETURN_IF_ERROR(vars->Writable(ctx, i, &t->w));
    TF_RETURN_IF_ERROR(vars->Writable(ctx, n + i, &t->m));
    TF_RETURN_IF_ERROR(vars->Writable(ctx, 2 * n + i, &t->v));
    return maxima_ > 0 ? vars->Writable(ctx, 3 * n + i, &t->top) : OkStatus();
  }

  Status CheckOne(const Locked& vars, int i, int n, const TensorShape* shape) const {
    TF_RETURN_IF_ERROR(vars.Check(i, DataTypeToEnum<T>::value, shape));
    for (int slot = 1; slot < (maxima_ > 0 ? 4 : 3); ++slot) {
      TF_RETURN_IF_ERROR(vars.Check(slot * n + i, DataTypeToEnum<S>::value, &vars.tensor(i).shape()));
    }
    return OkStatus();
  }

  void Run(OpKernelContext* ctx, tfav::Plan& plan, const std::vector<tfav::Tensors>& t, const tfav::Scalars& s,
           const tfav::Loops& loops) const {
    if (trust_ratio_) {
      tfav::lamb(plan, t, s, loops, OnThreadsOf(ctx));
    } else {
      tfav::adam(plan, t, s, loops.adam, OnThreadsOf(ctx));
    }
  }

  bool trust_ratio_;
  int maxima_;
  tfav::Loops loops_;
};

template <typename T, typename G>
class DenseStep : public Step<T, G> {
 public:
  explicit DenseStep(OpKernelConstruction* ctx) : Step<T, G>(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("N", &n_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("decays", &decays_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("adapts", &adapts_));
    OP_REQUIRES(ctx,
                int(decays_.size()) == n_ && int(adapts_.size()) == n_ &&
                    (this->maxima_ == 0 || this->maxima_ == n_),
                errors::InvalidArgument("decays, adapts and maxima must have one element a variable"));
  }

  void Compute(OpKernelContext* ctx) override {
    const int slots = this->maxima_ > 0 ? 4 : 3, gradients = 1 + slots * n_;
    tfav::Scalars s;
    OP_REQUIRES_OK(ctx, this->ScalarsOf(ctx, &s));
    Locked vars;
    OP_REQUIRES_OK(ctx, vars.Lock(ctx, 1, slots * n_));
    for (int i = 0; i < n_; ++i) {  // all checks first: a step is taken by all variables or by none
      const TensorShape& shape = ctx->input(gradients + i).shape();
      OP_REQUIRES_OK(ctx, this->CheckOne(vars, i, n_, &shape));
    }
    std::vector<tfav::Tensors> t(n_);
    const tfav::Sizes sizes{sizeof(T), sizeof(typename Step<T, G>::S), sizeof(G)};
    tfav::Plan plan(sizes);
    for (int i = 0; i < n_; ++i) {
      OP_REQUIRES_OK(ctx, this->TensorsOf(ctx, &vars, i, n_, &t[i]));
      t[i].g = static_cast<const char*>(ctx->input(gradients + i).data());
      t[i].decays = decays_[i];
      t[i].adapts = adapts_[i];
    }
    for (int i = 0; i < n_; ++i) {  // nothing can fail from here on
      plan.add(t[i], i, 0, t[i].size, t[i].g);
      if (this->trust_ratio_ && plan.elements() >= tfav::kTogether) {
        this->Run(ctx, plan, t, s, this->loops_);
        plan = tfav::Plan(sizes);
      }
    }
    this->Run(ctx, plan, t, s, this->loops_);
  }

 private:
  int n_;
  std::vector<bool> decays_, adapts_;
};

template <typename T, typename G, typename I>
class RowsStep : public Step<T, G> {
 public:
  using S = typename Step<T, G>::S;

  explicit RowsStep(OpKernelConstruction* ctx) : Step<T, G>(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("decays", &decays_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("adapts", &adapts_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("exact", &exact_));
    OP_REQUIRES(ctx, this->maxima_ <= 1, errors::InvalidArgument("There must be at most one of maxima"));
    bool square;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("square", &square));
    // Rows are added up in the type of the moments.
    this->loops_ = tfav::loops_for(Kind<T>::value, Kind<S>::value, square, this->maxima_ > 0);
  }

  void Compute(OpKernelContext* ctx) override {
    tfav::Scalars s;
    OP_REQUIRES_OK(ctx, this->ScalarsOf(ctx, &s));
    const Tensor& values = ctx->input(4 + this->maxima_);
    const Tensor& ids = ctx->input(5 + this->maxima_);
    Locked vars;
    OP_REQUIRES_OK(ctx, vars.Lock(ctx, 1, 3 + this->maxima_));
    OP_REQUIRES_OK(ctx, this->CheckOne(vars, 0, 1, nullptr));
    const TensorShape shape = vars.tensor(0).shape();
    OP_REQUIRES(ctx, shape.dims() >= 1 && ids.dims() == 1 && values.dims() == shape.dims(),
                errors::InvalidArgument("ids must be a vector, values rows of the variable, ", shape.DebugString(),
                                        ". Received: ", ids.shape().DebugString(), " and ",
                                        values.shape().DebugString()));
    TensorShape wanted = shape;
    wanted.set_dim(0, ids.dim_size(0));
    OP_REQUIRES(ctx, values.shape() == wanted,
                errors::InvalidArgument("values must have shape ", wanted.DebugString(),
                                        ". Received: ", values.shape().DebugString()));
    const I* id = static_cast<const I*>(ids.data());
    for (int64_t i = 0; i < ids.NumElements(); ++i) {
      OP_REQUIRES(ctx, id[i] >= 0 && id[i] < shape.dim_size(0),
                  errors::InvalidArgument("The ids of a gradient's slices must be in [0, ", shape.dim_size(0),
                                          "). Received: ", id[i], " at ", i));
    }
    std::vector<tfav::Tensors> t(1);
    OP_REQUIRES_OK(ctx, this->TensorsOf(ctx, &vars, 0, 1, &t[0]));
    t[0].decays = decays_;
    t[0].adapts = adapts_;

    const tfav::Rows rows(id, ids.NumElements());
    const int64_t width = shape.dim_size(0) > 0 ? t[0].size / shape.dim_size(0) : 0;
    Tensor sums;
    OP_REQUIRES_OK(ctx, ctx->allocate_temp(DataTypeToEnum<S>::value, TensorShape({rows.count(), width}), &sums));
    S* sum = static_cast<S*>(sums.data());
    const auto* value = static_cast<const typename Kind<G>::Plain*>(values.data());
    const tfav::Parallel parallel = OnThreadsOf(ctx);
    const int64_t together = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width));
    parallel((rows.count() + together - 1) / together, [&](int64_t block) {
      const int64_t end = std::min(rows.count(), (block + 1) * together);
      for (int64_t i = block * together; i < end; ++i) rows.add_up(i, value, width, sum + i * width);
    });
    tfav::Plan plan({sizeof(T), sizeof(S), sizeof(S)});
    tfav::add_rows(plan, t[0], rows, width, static_cast<const char*>(sums.data()), width * sizeof(S), exact_);
    this->Run(ctx, plan, t, s, this->loops_);
  }

 private:
  bool decays_, adapts_, exact_;
};

template <typename G>
class SquaredNorm : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    std::vector<tfav::Tensors> gradients(ctx->num_inputs());
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      gradients[i].g = static_cast<const char*>(ctx->input(i).data());
      gradients[i].size = ctx->input(i).NumElements();
    }
    Tensor* sum;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({}), &sum));
    sum->scalar<double>()() =
        tfav::squares(gradients, sizeof(G), tfav::squares_for(Kind<G>::value), OnThreadsOf(ctx));
  }
};

#define REGISTER_STEP(T, G)                                                                          \
  REGISTER_KERNEL_BUILDER(                                                                           \
      Name("TfAdamVariants>DenseStep").Device(DEVICE_CPU).TypeConstraint<T>("T").TypeConstraint<G>("G"), \
      DenseStep<T, G>);                                                                              \
  REGISTER_ROWS(T, G, int32)                                                                         \
  REGISTER_ROWS(T, G, int64_t)

#define REGISTER_ROWS(T, G, I)                             \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>RowsStep")  \
                              .Device(DEVICE_CPU)          \
                              .TypeConstraint<T>("T")      \
                              .TypeConstraint<G>("G")      \
                              .TypeConstraint<I>("I"),     \
                          RowsStep<T, G, I>);

#define REGISTER_NORM(G) \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>SquaredNorm").Device(DEVICE_CPU).TypeConstraint<G>("G"), SquaredNorm<G>);

REGISTER_STEP(float, float)
REGISTER_STEP(double, double)
REGISTER_STEP(Eigen::half, Eigen::half)
REGISTER_STEP(Eigen::half, float)
REGISTER_STEP(bfloat16, bfloat16)
REGISTER_STEP(bfloat16, float)
REGISTER_NORM(float)
REGISTER_NORM(double)
REGISTER_NORM(Eigen::half)
REGISTER_NORM(bfloat16)

}  // namespace
}  // namespace tensorflow
