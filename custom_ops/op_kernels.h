// The kernels of the ops, except for the arithmetic, which a Backend does: attributes, locks, checks of the inputs, and
// the way from TensorFlow's variables to plain pointers.
//
// A Backend has
//   static Status Copy(OpKernelContext*, void* to, const void* from, size_t bytes);
//   static Status StepDense(OpKernelContext*, const tfav::KernelConfig&, const std::vector<tfav::VariableState>&,
//                           const Tensor& coefficients);
//   static Status CheckIndices(const Tensor& indices, int64_t rows);
//   static Status StepSparse(OpKernelContext*, const tfav::KernelConfig&, const tfav::VariableState&,
//                            const Tensor& indices, int64_t rows, bool exact, const Tensor& coefficients);
//   static Status SquaredNorm(OpKernelContext*, tfav::DType, const std::vector<tfav::VariableState>&, double* sum);
//   static Status ComputeCoefficients(OpKernelContext*, const tfav::StaticCoefficients&, const tfav::StepInputs&,
//                                     double* coefficients);
// StepDense and StepSparse are called after all checks, while the variables are locked. For StepSparse, g has one row
// per index.

#ifndef TF_ADAM_VARIANTS_OP_KERNELS_H_
#define TF_ADAM_VARIANTS_OP_KERNELS_H_

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "adam_math.h"
#include "coefficients.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "variable_state.h"

namespace tensorflow {
namespace tf_adam_variants {

inline tfav::DType DTypeOf(DataType type) {
  return type == DT_HALF       ? tfav::DType::kHalf
         : type == DT_BFLOAT16 ? tfav::DType::kBFloat16
         : type == DT_FLOAT    ? tfav::DType::kFloat
                               : tfav::DType::kDouble;
}

// The variables of a step, locked for the lifetime of this object.
class LockedVariables {
 public:
  // Locks the variables of the inputs first, first + 1, ..., first + count - 1 of the op.
  Status Lock(OpKernelContext* ctx, int first, int count) {
    vars_.resize(count);
    std::vector<mutex*> mutexes(count);
    for (int i = 0; i < count; ++i) {
      TF_RETURN_IF_ERROR(LookupResource(ctx, HandleFromInput(ctx, first + i), &vars_[i]));
      mutexes[i] = vars_[i]->mu();
    }
    std::sort(mutexes.begin(), mutexes.end());  // TensorFlow's order, which avoids deadlocks
    if (std::adjacent_find(mutexes.begin(), mutexes.end()) != mutexes.end()) {
      return errors::InvalidArgument("The variables of one step must all be different ones");
    }
    locks_.reserve(count);
    for (mutex* m : mutexes) locks_.emplace_back(*m);
    return OkStatus();
  }

  // Checks that the i-th variable has this type and, unless null, this shape.
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

  // Returns memory of the i-th variable that may be written. Where a dense read still references the tensor, the
  // variable first gets a copy. Sparse reads need none, because they lock the variable.
  template <typename Backend>
  Status GetWritable(OpKernelContext* ctx, int i, char** data) {
    Tensor* tensor = vars_[i]->tensor();
    if (!tensor->RefCountIsOne()) {
      Tensor copy;
      TF_RETURN_IF_ERROR(ctx->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
      TF_RETURN_IF_ERROR(Backend::Copy(ctx, copy.data(), tensor->data(), tensor->TotalBytes()));
      *tensor = copy;
    }
    *data = static_cast<char*>(tensor->data());
    return OkStatus();
  }

 private:
  std::vector<core::RefCountPtr<Var>> vars_;
  std::vector<mutex_lock> locks_;  // released before the variables
};

// The inputs are the coefficients, then the handles (all variables, all momentums, all velocities, and if used all
// velocity_hats and all master_weights), then the gradients.
template <typename Backend>
class StepOpBase : public OpKernel {
 public:
  explicit StepOpBase(OpKernelConstruction* ctx) : OpKernel(ctx) {
    DataType gradient;
    bool stochastic_rounding;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &type_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("G", &gradient));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("squared_gradient", &config_.squared_gradient));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("trust_ratio", &config_.trust_ratio));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("stochastic_rounding", &stochastic_rounding));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_velocity_hats", &velocity_hats_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_master_weights", &master_weights_));
    config_.variable = DTypeOf(type_);
    config_.gradient = DTypeOf(gradient);
    config_.amsgrad = velocity_hats_ > 0;
    config_.rounding = master_weights_ > 0   ? tfav::Rounding::kMaster
                       : stochastic_rounding ? tfav::Rounding::kStochastic
                                             : tfav::Rounding::kNearest;
    OP_REQUIRES(ctx, !(config_.trust_ratio && (config_.squared_gradient || config_.amsgrad)),
                errors::InvalidArgument("A step with a trust ratio takes neither `squared_gradient` nor `amsgrad`"));
    OP_REQUIRES(ctx, !(stochastic_rounding && master_weights_ > 0),
                errors::InvalidArgument("A step with master weights takes no `stochastic_rounding`"));
    OP_REQUIRES(ctx,
                config_.rounding == tfav::Rounding::kNearest || config_.variable == tfav::DType::kHalf ||
                    config_.variable == tfav::DType::kBFloat16,
                errors::InvalidArgument("Master weights and `stochastic_rounding` are for half and bfloat16 "
                                        "variables. Received: ",
                                        DataTypeString(type_)));
    OP_REQUIRES(ctx, config_.gradient == config_.variable || config_.gradient == tfav::slot_dtype(config_.variable),
                errors::InvalidArgument("Gradients must be of the type of the variables, ", DataTypeString(type_),
                                        ", or of their moments. Received: ", DataTypeString(gradient)));
  }

 protected:
  // The number of handles per variable, for itself and its slots.
  int handles_per_variable() const { return 3 + config_.amsgrad + (config_.rounding == tfav::Rounding::kMaster); }

  Status CheckSlotCounts(int n) const {
    for (const int count : {velocity_hats_, master_weights_}) {
      if (count != 0 && count != n) {
        return errors::InvalidArgument("velocity_hats and master_weights must have one element a variable, ", n,
                                       ", or none. Received: ", velocity_hats_, " and ", master_weights_);
      }
    }
    return OkStatus();
  }

  static Status CheckCoefficients(const Tensor& coefficients) {
    if (coefficients.dims() == 1 && coefficients.NumElements() == tfav::kNumCoefficients) return OkStatus();
    return errors::InvalidArgument("coefficients must have shape [", tfav::kNumCoefficients,
                                   "]. Received: ", coefficients.shape().DebugString());
  }

  // Checks variable i of n and its slots.
  Status CheckVariable(const LockedVariables& locked, int i, int n, const TensorShape* shape) const {
    const DataType slot_dtype = type_ == DT_DOUBLE ? DT_DOUBLE : DT_FLOAT;
    TF_RETURN_IF_ERROR(locked.Check(i, type_, shape));
    for (int slot = 1; slot < handles_per_variable(); ++slot) {
      TF_RETURN_IF_ERROR(locked.Check(slot * n + i, slot_dtype, &locked.tensor(i).shape()));
    }
    return OkStatus();
  }

  // Returns the memory of variable i of n and its slots. Call it after all checks: it may copy.
  Status GetState(OpKernelContext* ctx, LockedVariables* locked, int i, int n, tfav::VariableState* state) const {
    *state = {};
    state->size = locked->tensor(i).NumElements();
    std::vector<char**> pointers = {&state->w, &state->m, &state->v};
    if (config_.amsgrad) pointers.push_back(&state->v_max);
    if (config_.rounding == tfav::Rounding::kMaster) pointers.push_back(&state->master);
    for (size_t slot = 0; slot < pointers.size(); ++slot) {
      TF_RETURN_IF_ERROR(locked->GetWritable<Backend>(ctx, int(slot) * n + i, pointers[slot]));
    }
    return OkStatus();
  }

  DataType type_;
  tfav::KernelConfig config_;

 private:
  int velocity_hats_, master_weights_;
};

template <typename Backend>
class DenseStepOp : public StepOpBase<Backend> {
 public:
  explicit DenseStepOp(OpKernelConstruction* ctx) : StepOpBase<Backend>(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("N", &n_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("weight_decay", &weight_decay_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer_adaptation", &layer_adaptation_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("rng_streams", &rng_streams_));
    OP_REQUIRES_OK(ctx, this->CheckSlotCounts(n_));
    OP_REQUIRES(
        ctx, int(weight_decay_.size()) == n_ && int(layer_adaptation_.size()) == n_ && int(rng_streams_.size()) == n_,
        errors::InvalidArgument("weight_decay, layer_adaptation and rng_streams must have one element a variable"));
  }

  void Compute(OpKernelContext* ctx) override {
    const int handles = this->handles_per_variable(), gradients = 1 + handles * n_;
    OP_REQUIRES_OK(ctx, this->CheckCoefficients(ctx->input(0)));
    LockedVariables locked;
    OP_REQUIRES_OK(ctx, locked.Lock(ctx, 1, handles * n_));
    for (int i = 0; i < n_; ++i) {  // all checks first: a step updates all variables or none
      const TensorShape& shape = ctx->input(gradients + i).shape();
      OP_REQUIRES_OK(ctx, this->CheckVariable(locked, i, n_, &shape));
    }
    std::vector<tfav::VariableState> variables(n_);
    for (int i = 0; i < n_; ++i) {
      tfav::VariableState& state = variables[i];
      OP_REQUIRES_OK(ctx, this->GetState(ctx, &locked, i, n_, &state));
      state.g = static_cast<const char*>(ctx->input(gradients + i).data());
      state.weight_decay = weight_decay_[i];
      state.layer_adaptation = layer_adaptation_[i];
      state.rng_stream = uint32_t(rng_streams_[i]);
    }
    OP_REQUIRES_OK(ctx, Backend::StepDense(ctx, this->config_, variables, ctx->input(0)));
  }

 private:
  int n_;
  std::vector<bool> weight_decay_, layer_adaptation_;
  std::vector<int> rng_streams_;
};

template <typename Backend>
class SparseStepOp : public StepOpBase<Backend> {
 public:
  explicit SparseStepOp(OpKernelConstruction* ctx) : StepOpBase<Backend>(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("weight_decay", &weight_decay_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("layer_adaptation", &layer_adaptation_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("rng_stream", &rng_stream_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("exact", &exact_));
    OP_REQUIRES_OK(ctx, this->CheckSlotCounts(1));
  }

  void Compute(OpKernelContext* ctx) override {
    const int handles = this->handles_per_variable();
    const Tensor& values = ctx->input(1 + handles);
    const Tensor& indices = ctx->input(2 + handles);
    OP_REQUIRES_OK(ctx, this->CheckCoefficients(ctx->input(0)));
    LockedVariables locked;
    OP_REQUIRES_OK(ctx, locked.Lock(ctx, 1, handles));
    OP_REQUIRES_OK(ctx, this->CheckVariable(locked, 0, 1, nullptr));
    const TensorShape shape = locked.tensor(0).shape();
    OP_REQUIRES(
        ctx, shape.dims() >= 1 && indices.dims() == 1 && values.dims() == shape.dims(),
        errors::InvalidArgument("indices must be a vector, values rows of the variable, ", shape.DebugString(),
                                ". Received: ", indices.shape().DebugString(), " and ", values.shape().DebugString()));
    TensorShape values_shape = shape;
    values_shape.set_dim(0, indices.dim_size(0));
    OP_REQUIRES(ctx, values.shape() == values_shape,
                errors::InvalidArgument("values must have shape ", values_shape.DebugString(),
                                        ". Received: ", values.shape().DebugString()));
    OP_REQUIRES_OK(ctx, Backend::CheckIndices(indices, shape.dim_size(0)));
    tfav::VariableState state;
    OP_REQUIRES_OK(ctx, this->GetState(ctx, &locked, 0, 1, &state));
    state.g = static_cast<const char*>(values.data());
    state.weight_decay = weight_decay_;
    state.layer_adaptation = layer_adaptation_;
    state.rng_stream = uint32_t(rng_stream_);
    OP_REQUIRES_OK(ctx,
                   Backend::StepSparse(ctx, this->config_, state, indices, shape.dim_size(0), exact_, ctx->input(0)));
  }

 private:
  bool weight_decay_, layer_adaptation_, exact_;
  int rng_stream_;
};

template <typename Backend>
class SquaredNormOp : public OpKernel {
 public:
  explicit SquaredNormOp(OpKernelConstruction* ctx) : OpKernel(ctx) { OP_REQUIRES_OK(ctx, ctx->GetAttr("G", &type_)); }

  void Compute(OpKernelContext* ctx) override {
    std::vector<tfav::VariableState> gradients(ctx->num_inputs(), tfav::VariableState{});
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      gradients[i].g = static_cast<const char*>(ctx->input(i).data());
      gradients[i].size = ctx->input(i).NumElements();
    }
    Tensor* sum;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({}), &sum));
    OP_REQUIRES_OK(ctx, Backend::SquaredNorm(ctx, DTypeOf(type_), gradients, static_cast<double*>(sum->data())));
  }

 private:
  DataType type_;
};

template <typename Backend>
class CoefficientsOp : public OpKernel {
 public:
  explicit CoefficientsOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    std::vector<int64_t> bits;  // of float64 numbers
    OP_REQUIRES_OK(ctx, ctx->GetAttr("static_coefficients", &bits));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_scales", &num_scales_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_seeds", &num_seeds_));
    OP_REQUIRES(ctx, bits.size() == tfav::kNumStaticCoefficients && num_scales_ <= 1 && num_seeds_ <= 1,
                errors::InvalidArgument(
                    "There must be ", tfav::kNumStaticCoefficients,
                    " static coefficients, and at most one gradient_scale and rounding_seed. Received: ", bits.size(),
                    ", ", num_scales_, " and ", num_seeds_));
    memcpy(&static_coefficients_, bits.data(), sizeof static_coefficients_);
  }

  void Compute(OpKernelContext* ctx) override {
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      OP_REQUIRES(ctx, ctx->input(i).dims() == 0,
                  errors::InvalidArgument("The inputs of the coefficients must be scalars. Received: shape ",
                                          ctx->input(i).shape().DebugString()));
    }
    const auto data = [&](int i) { return ctx->input(i).data(); };
    const bool is_float = ctx->input(1).dtype() == DT_FLOAT;
    tfav::StepInputs inputs = {};
    inputs.iterations = static_cast<const int64_t*>(data(0));
    if (is_float) inputs.float_rate = static_cast<const float*>(data(1));
    if (!is_float) inputs.double_rate = static_cast<const double*>(data(1));
    if (num_scales_ > 0) inputs.gradient_scale = static_cast<const double*>(data(2));
    if (num_seeds_ > 0) inputs.rounding_seed = static_cast<const uint32_t*>(data(2 + num_scales_));
    Tensor* output;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({tfav::kNumCoefficients}), &output));
    OP_REQUIRES_OK(
        ctx, Backend::ComputeCoefficients(ctx, static_coefficients_, inputs, static_cast<double*>(output->data())));
  }

 private:
  tfav::StaticCoefficients static_coefficients_;
  int num_scales_, num_seeds_;
};

}  // namespace tf_adam_variants
}  // namespace tensorflow

// Registers the kernels of a backend for a type of device. Handles of variables are always in host memory.
#define TFAV_REGISTER_KERNELS(device, Backend)                                                        \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>DenseStep")                                            \
                              .Device(device)                                                         \
                              .HostMemory("variables")                                                \
                              .HostMemory("momentums")                                                \
                              .HostMemory("velocities")                                               \
                              .HostMemory("velocity_hats")                                            \
                              .HostMemory("master_weights"),                                          \
                          DenseStepOp<Backend>);                                                      \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>SparseStep")                                           \
                              .Device(device)                                                         \
                              .HostMemory("variable")                                                 \
                              .HostMemory("momentum")                                                 \
                              .HostMemory("velocity")                                                 \
                              .HostMemory("velocity_hats")                                            \
                              .HostMemory("master_weights"),                                          \
                          SparseStepOp<Backend>);                                                     \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>SquaredNorm").Device(device), SquaredNormOp<Backend>); \
  REGISTER_KERNEL_BUILDER(Name("TfAdamVariants>Coefficients").Device(device), CoefficientsOp<Backend>);

#endif  // TF_ADAM_VARIANTS_OP_KERNELS_H_
