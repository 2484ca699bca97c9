// The ops' kernels but for the arithmetic, which a Device does: attributes, locks, checks of what they are given, and
// the way from TensorFlow's variables to plain pointers.
//
// A Device has
//   static Status Copy(OpKernelContext*, void* to, const void* from, size_t bytes);
//   static Status Dense(OpKernelContext*, const tfav::Kind&, const std::vector<tfav::Parameter>&, const Tensor& step);
//   static Status CheckIds(const Tensor& ids, int64_t rows);
//   static Status Sparse(OpKernelContext*, const tfav::Kind&, const tfav::Parameter&, const Tensor& ids, int64_t rows,
//                        bool exact, const Tensor& step);
//   static Status SquaredNorm(OpKernelContext*, tfav::Type, const std::vector<tfav::Parameter>&, double* sum);
//   static Status Scalars(OpKernelContext*, const tfav::Constants&, const tfav::StepInputs&, double* step);
// Dense and Sparse are called after all checks, while the variables are locked; the g of Sparse are the values of the
// ids.

#ifndef TF_ADAM_VARIANTS_OP_KERNELS_H_
#define TF_ADAM_VARIANTS_OP_KERNELS_H_

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "adam_math.h"
#include "parameter.h"
#include "step_scalars.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace tensorflow {
namespace tf_adam_variants {

inline tfav::Type TypeOf(DataType type) {
  return type == DT_HALF       ? tfav::Type::kHalf
         : type == DT_BFLOAT16 ? tfav::Type::kBFloat16
         : type == DT_FLOAT    ? tfav::Type::kFloat
                               : tfav::Type::kDouble;
}

// The variables of a step, locked as long as this lives.
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
    std::sort(mutexes.begin(), mutexes.end());  // TensorFlow's order, so that there is no deadlock
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
      return errors::InvalidArgument("A variable of the step must be ", DataTypeString(dtype),
                                     shape == nullptr ? "" : " of shape " + shape->DebugString(),
                                     ". Received: ", var.DebugString());
    }
    return OkStatus();
  }

  const Tensor& tensor(int i) const { return *vars_[i]->tensor(); }

  // Memory of the i-th variable that may be written: where a dense read still references the tensor, the variable
  // gets a copy of its own. Sparse reads lock the variable instead.
  template <typename Device>
  Status Writable(OpKernelContext* ctx, int i, char** data) {
    Tensor* tensor = vars_[i]->tensor();
    if (!tensor->RefCountIsOne()) {
      Tensor copy;
      TF_RETURN_IF_ERROR(ctx->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
      TF_RETURN_IF_ERROR(Device::Copy(ctx, copy.data(), tensor->data(), tensor->TotalBytes()));
      *tensor = copy;
    }
    *data = static_cast<char*>(tensor->data());
    return OkStatus();
  }

 private:
  std::vector<core::RefCountPtr<Var>> vars_;
  std::vector<mutex_lock> locks_;  // released before the variables are
};

// Inputs are the step, then the variables, their slots in this order: momentums, velocities, velocity_hats,
// master_weights; those of one kind side by side, and the gradients.
template <typename Device>
class StepOp : public OpKernel {
 public:
  explicit StepOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    DataType gradient;
    bool stochastic_rounding;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &type_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("G", &gradient));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("squared_gradient", &kind_.squared_gradient));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("trust_ratio", &kind_.trust_ratio));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("stochastic_rounding", &stochastic_rounding));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_velocity_hats", &velocity_hats_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_master_weights", &master_weights_));
    kind_.variable = TypeOf(type_);
    kind_.gradient = TypeOf(gradient);
    kind_.amsgrad = velocity_hats_ > 0;
    kind_.rounding = master_weights_ > 0   ? tfav::Rounding::kMaster
                     : stochastic_rounding ? tfav::Rounding::kStochastic
                                           : tfav::Rounding::kNearest;
    OP_REQUIRES(ctx, !(kind_.trust_ratio && (kind_.squared_gradient || kind_.amsgrad)),
                errors::InvalidArgument("A step with a trust ratio takes neither `squared_gradient` nor `amsgrad`"));
    OP_REQUIRES(ctx, !(stochastic_rounding && master_weights_ > 0),
                errors::InvalidArgument("A step with master weights takes no `stochastic_rounding`"));
    OP_REQUIRES(ctx,
                kind_.rounding == tfav::Rounding::kNearest || kind_.variable == tfav::Type::kHalf ||
                    kind_.variable == tfav::Type::kBFloat16,
                errors::InvalidArgument("Master weights and `stochastic_rounding` are for half and bfloat16 "
                                        "variables. Received: ",
                                        DataTypeString(type_)));
    OP_REQUIRES(ctx, kind_.gradient == kind_.variable || kind_.gradient == tfav::state_of(kind_.variable),
                errors::InvalidArgument("Gradients must be of the type of the variables, ", DataTypeString(type_),
                                        ", or of their moments. Received: ", DataTypeString(gradient)));
  }

 protected:
  // How many slots' variables there are, with the weights themselves.
  int slots() const { return 3 + kind_.amsgrad + (kind_.rounding == tfav::Rounding::kMaster); }

  Status CheckCounts(int n) const {
    for (const int given : {velocity_hats_, master_weights_}) {
      if (given != 0 && given != n) {
        return errors::InvalidArgument("velocity_hats and master_weights must have one element a variable, ", n,
                                       ", or none. Received: ", velocity_hats_, " and ", master_weights_);
      }
    }
    return OkStatus();
  }

  static Status CheckStep(const Tensor& step) {
    if (step.dims() == 1 && step.NumElements() == tfav::kStepFields) return OkStatus();
    return errors::InvalidArgument("step must have shape [", tfav::kStepFields,
                                   "]. Received: ", step.shape().DebugString());
  }

  Status CheckOne(const Locked& vars, int i, int n, const TensorShape* shape) const {
    const DataType state = type_ == DT_DOUBLE ? DT_DOUBLE : DT_FLOAT;
    TF_RETURN_IF_ERROR(vars.Check(i, type_, shape));
    for (int slot = 1; slot < slots(); ++slot) {
      TF_RETURN_IF_ERROR(vars.Check(slot * n + i, state, &vars.tensor(i).shape()));
    }
    return OkStatus();
  }

  // Variable i of n and its slots. Call it after all checks: it may copy.
  Status ParameterOf(OpKernelContext* ctx, Locked* vars, int i, int n, tfav::Parameter* t) const {
    *t = {};
    t->size = vars->tensor(i).NumElements();
    std::vector<char**> pointers = {&t->w, &t->m, &t->v};
    if (kind_.amsgrad) pointers.push_back(&t->v_max);
    if (kind_.rounding == tfav::Rounding::kMaster) pointers.push_back(&t->master);
    for (size_t slot = 0; slot < pointers.size(); ++slot) {
      TF_RETURN_IF_ERROR(vars->Writable<Device>(ctx, int(slot) * n + i, pointers[slot]));
    }
    return OkStatus();
  }

  DataType type_;
  tfav::Kind kind_;

 private:
  int velocity_hats_, master_weights_;
};

template <typename Device>
class DenseStep : public StepOp<Device> {
 public:
  explicit DenseStep(OpKernelConstruction* ctx) : StepOp<Device>(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("N", &n_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("weight_decay", &weight_decay_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer_adaptation", &layer_adaptation_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("streams", &streams_));
    OP_REQUIRES_OK(ctx, this->CheckCounts(n_));
    OP_REQUIRES(ctx,
                int(weight_decay_.size()) == n_ && int(layer_adaptation_.size()) == n_ && int(streams_.size()) == n_,
                errors::InvalidArgument("weight_decay, layer_adaptation and streams must have one element a variable"));
  }

  void Compute(OpKernelContext* ctx) override {
    const int slots = this->slots(), gradients = 1 + slots * n_;
    OP_REQUIRES_OK(ctx, this->CheckStep(ctx->input(0)));
    Locked vars;
    OP_REQUIRES_OK(ctx, vars.Lock(ctx, 1, slots * n_));
    for (int i = 0; i < n_; ++i) {  // all checks first: a step is taken by all variables or by none
      const TensorShape& shape = ctx->input(gradients + i).shape();
      OP_REQUIRES_OK(ctx, this->CheckOne(vars, i, n_, &shape));
    }
    std::vector<tfav::Parameter> t(n_);
    for (int i = 0; i < n_; ++i) {
      OP_REQUIRES_OK(ctx, this->ParameterOf(ctx, &vars, i, n_, &t[i]));
      t[i].g = static_cast<const char*>(ctx->input(gradients + i).data());
      t[i].weight_decay = weight_decay_[i];
      t[i].layer_adaptation = layer_adaptation_[i];
      t[i].stream = uint32_t(streams_[i]);
    }
    OP_REQUIRES_OK(ctx, Device::Dense(ctx, this->kind_, t, ctx->input(0)));
  }

 private:
  int n_;
  std::vector<bool> weight_decay_, layer_adaptation_;
  std::vector<int> streams_;
};

template <typename Device>
class SparseStep : public StepOp<Device> {
 public:
  explicit SparseStep(OpKernelConstruction* ctx) : StepOp<Device>(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("weight_decay", &weight_decay_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer_adaptation", &layer_adaptation_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("stream", &stream_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("exact", &exact_));
    OP_REQUIRES_OK(ctx, this->CheckCounts(1));
  }

  void Compute(OpKernelContext* ctx) override {
    const int slots = this->slots();
    const Tensor& values = ctx->input(1 + slots);
    const Tensor& ids = ctx->input(2 + slots);
    OP_REQUIRES_OK(ctx, this->CheckStep(ctx->input(0)));
    Locked vars;
    OP_REQUIRES_OK(ctx, vars.Lock(ctx, 1, slots));
    OP_REQUIRES_OK(ctx, this->CheckOne(vars, 0, 1, nullptr));
    const TensorShape shape = vars.tensor(0).shape();
    OP_REQUIRES(
        ctx, shape.dims() >= 1 && ids.dims() == 1 && values.dims() == shape.dims(),
        errors::InvalidArgument("ids must be a vector, values rows of the variable, ", shape.DebugString(),
                                ". Received: ", ids.shape().DebugString(), " and ", values.shape().DebugString()));
    TensorShape wanted = shape;
    wanted.set_dim(0, ids.dim_size(0));
    OP_REQUIRES(ctx, values.shape() == wanted,
                errors::InvalidArgument("values must have shape ", wanted.DebugString(),
                                        ". Received: ", values.shape().DebugString()));
    OP_REQUIRES_OK(ctx, Device::CheckIds(ids, shape.dim_size(0)));
    tfav::Parameter t;
    OP_REQUIRES_OK(ctx, this->ParameterOf(ctx, &vars, 0, 1, &t));
    t.g = static_cast<const char*>(values.data());
    t.weight_decay = weight_decay_;
    t.layer_adaptation = layer_adaptation_;
    t.stream = uint32_t(stream_);
    OP_REQUIRES_OK(ctx, Device::Sparse(ctx, this->kind_, t, ids, shape.dim_size(0), exact_, ctx->input(0)));
  }

 private:
  bool weight_decay_, layer_adaptation_, exact_;
  int stream_;
};

template <typename Device>
class SquaredNorm : public OpKernel {
 public:
  explicit SquaredNorm(OpKernelConstruction* ctx) : OpKernel(ctx) { OP_REQUIRES_OK(ctx, ctx->GetAttr("G", &type_)); }

  void Compute(OpKernelContext* ctx) override {
    std::vector<tfav::Parameter> gradients(ctx->num_inputs(), tfav::Parameter{});
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      gradients[i].g = static_cast<const char*>(ctx->input(i).data());
      gradients[i].size = ctx->input(i).NumElements();
    }
    Tensor* sum;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({}), &sum));
    OP_REQUIRES_OK(ctx, Device::SquaredNorm(ctx, TypeOf(type_), gradients, static_cast<double*>(sum->data())));
  }

 private:
  DataType type_;
};

template <typename Device>
class StepScalars : public OpKernel {
 public:
  explicit StepScalars(OpKernelConstruction* ctx) : OpKernel(ctx) {
    std::vector<int64_t> constants;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("constants", &constants));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_scales", &scales_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_seeds", &seeds_));
    OP_REQUIRES(ctx, constants.size() == tfav::kConstants && scales_ <= 1 && seeds_ <= 1,
                errors::InvalidArgument("There must be ", tfav::kConstants,
                                        " constants, and at most one gradient_scale and rounding_seed. Received: ",
                                        constants.size(), ", ", scales_, " and ", seeds_));
    memcpy(&constants_, constants.data(), sizeof constants_);
  }

  void Compute(OpKernelContext* ctx) override {
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      OP_REQUIRES(ctx, ctx->input(i).dims() == 0,
                  errors::InvalidArgument("What a step's scalars are made from must be scalars. Received: shape ",
                                          ctx->input(i).shape().DebugString()));
    }
    const auto data = [&](int i) { return ctx->input(i).data(); };
    const bool is_float = ctx->input(1).dtype() == DT_FLOAT;
    tfav::StepInputs inputs = {};
    inputs.iterations = static_cast<const int64_t*>(data(0));
    if (is_float) inputs.float_rate = static_cast<const float*>(data(1));
    if (!is_float) inputs.double_rate = static_cast<const double*>(data(1));
    if (scales_ > 0) inputs.gradient_scale = static_cast<const double*>(data(2));
    if (seeds_ > 0) inputs.rounding_seed = static_cast<const uint32_t*>(data(2 + scales_));
    Tensor* step;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({tfav::kStepFields}), &step));
    OP_REQUIRES_OK(ctx, Device::Scalars(ctx, constants_, inputs, static_cast<double*>(step->data())));
  }

 private:
  tfav::Constants constants_;
  int scales_, seeds_;
};

}  // namespace tf_adam_variants
}  // namespace tensorflow

// The kernels of a device. Handles of variables are always in the host's memory.
#define TFAV_REGISTER_KERNELS(type, device)                                                      \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>DenseStep")                                       \
                              .Device(type)                                                      \
                              .HostMemory("variables")                                           \
                              .HostMemory("momentums")                                           \
                              .HostMemory("velocities")                                          \
                              .HostMemory("velocity_hats")                                       \
                              .HostMemory("master_weights"),                                     \
                          DenseStep<device>);                                                    \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>SparseStep")                                      \
                              .Device(type)                                                      \
                              .HostMemory("variable")                                            \
                              .HostMemory("momentum")                                            \
                              .HostMemory("velocity")                                            \
                              .HostMemory("velocity_hats")                                       \
                              .HostMemory("master_weights"),                                     \
                          SparseStep<device>);                                                   \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>SquaredNorm").Device(type), SquaredNorm<device>); \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>StepScalars").Device(type), StepScalars<device>);

#endif  // TF_ADAM_VARIANTS_OP_KERNELS_H_
