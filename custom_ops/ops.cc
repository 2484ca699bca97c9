// The interface of the ops: their inputs and attributes, and the shapes known before they run.

#include <vector>

#include "adam_math.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tensorflow {
namespace {

using shape_inference::InferenceContext;
using shape_inference::ShapeHandle;

Status CheckCoefficientsShape(InferenceContext* c, int input) {
  ShapeHandle coefficients;
  return c->Merge(c->input(input), c->Vector(tfav::kNumCoefficients), &coefficients);
}

// The shape that the handle of a variable records; unknown where it records none.
ShapeHandle HandleShape(InferenceContext* c, int input) {
  const auto* known = c->input_handle_shapes_and_types(input);
  return known == nullptr || known->empty() ? c->UnknownShape() : (*known)[0].shape;
}

// The number of handles per variable, for itself and its slots, in a step of n variables.
Status HandlesPerVariable(InferenceContext* c, int n, int* handles) {
  int velocity_hats, master_weights;
  TF_RETURN_IF_ERROR(c->GetAttr("num_velocity_hats", &velocity_hats));
  TF_RETURN_IF_ERROR(c->GetAttr("num_master_weights", &master_weights));
  if ((velocity_hats != 0 && velocity_hats != n) || (master_weights != 0 && master_weights != n)) {
    return errors::InvalidArgument("velocity_hats and master_weights must have one element a variable, ", n,
                                   ", or none. Received: ", velocity_hats, " and ", master_weights);
  }
  *handles = 3 + (velocity_hats > 0) + (master_weights > 0);
  return OkStatus();
}

Status DenseShapes(InferenceContext* c) {
  int n, handles;
  TF_RETURN_IF_ERROR(c->GetAttr("N", &n));
  TF_RETURN_IF_ERROR(HandlesPerVariable(c, n, &handles));
  std::vector<bool> weight_decay, layer_adaptation;
  std::vector<int> rng_streams;
  TF_RETURN_IF_ERROR(c->GetAttr("weight_decay", &weight_decay));
  TF_RETURN_IF_ERROR(c->GetAttr("layer_adaptation", &layer_adaptation));
  TF_RETURN_IF_ERROR(c->GetAttr("rng_streams", &rng_streams));
  if (int(weight_decay.size()) != n || int(layer_adaptation.size()) != n || int(rng_streams.size()) != n) {
    return errors::InvalidArgument("weight_decay, layer_adaptation and rng_streams must have one element a variable, ",
                                   n, ". Received: ", weight_decay.size(), ", ", layer_adaptation.size(), " and ",
                                   rng_streams.size());
  }
  TF_RETURN_IF_ERROR(CheckCoefficientsShape(c, 0));
  for (int i = 0; i < n; ++i) {
    ShapeHandle merged = c->input(1 + handles * n + i);  // the gradient
    for (int slot = 0; slot < handles; ++slot) {
      TF_RETURN_IF_ERROR(c->Merge(merged, HandleShape(c, 1 + slot * n + i), &merged));
    }
  }
  return OkStatus();
}

Status SparseShapes(InferenceContext* c) {
  int handles;
  TF_RETURN_IF_ERROR(HandlesPerVariable(c, 1, &handles));
  TF_RETURN_IF_ERROR(CheckCoefficientsShape(c, 0));
  ShapeHandle variable = HandleShape(c, 1), values = c->input(1 + handles), indices, row, value_row;
  for (int slot = 1; slot < handles; ++slot) {
    TF_RETURN_IF_ERROR(c->Merge(variable, HandleShape(c, 1 + slot), &variable));
  }
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2 + handles), 1, &indices));
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(values, 1, &values));
  shape_inference::DimensionHandle count;
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(values, 0), c->Dim(indices, 0), &count));
  if (!c->RankKnown(variable)) return OkStatus();
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(variable, 1, &variable));
  TF_RETURN_IF_ERROR(c->Subshape(variable, 1, &row));
  TF_RETURN_IF_ERROR(c->Subshape(values, 1, &value_row));
  return c->Merge(row, value_row, &row);
}

Status CoefficientsShape(InferenceContext* c) {
  ShapeHandle scalar;
  for (int i = 0; i < c->num_inputs(); ++i) TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 0, &scalar));
  c->set_output(0, c->Vector(tfav::kNumCoefficients));
  return OkStatus();
}

REGISTER_OP("TfAdamVariants>DenseStep")
    .Input("coefficients: float64")
    .Input("variables: N * resource")
    .Input("momentums: N * resource")
    .Input("velocities: N * resource")
    .Input("velocity_hats: num_velocity_hats * resource")
    .Input("master_weights: num_master_weights * resource")
    .Input("gradients: N * G")
    .Attr("N: int >= 1")
    .Attr("num_velocity_hats: int >= 0")
    .Attr("num_master_weights: int >= 0")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("G: {half, bfloat16, float, double}")
    .Attr("squared_gradient: bool")
    .Attr("trust_ratio: bool")
    .Attr("weight_decay: list(bool)")
    .Attr("layer_adaptation: list(bool)")
    .Attr("stochastic_rounding: bool")
    .Attr("rng_streams: list(int)")
    .SetIsStateful()
    .SetShapeFn(DenseShapes)
    .Doc(
        "One step of N variables of type T, in place. See adam_math.h for `coefficients`, variable_state.h for the "
        "rest.");

REGISTER_OP("TfAdamVariants>SparseStep")
    .Input("coefficients: float64")
    .Input("variable: resource")
    .Input("momentum: resource")
    .Input("velocity: resource")
    .Input("velocity_hats: num_velocity_hats * resource")
    .Input("master_weights: num_master_weights * resource")
    .Input("values: G")
    .Input("indices: I")
    .Attr("num_velocity_hats: int >= 0")
    .Attr("num_master_weights: int >= 0")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("G: {half, bfloat16, float, double}")
    .Attr("I: {int32, int64}")
    .Attr("squared_gradient: bool")
    .Attr("trust_ratio: bool")
    .Attr("weight_decay: bool")
    .Attr("layer_adaptation: bool")
    .Attr("stochastic_rounding: bool")
    .Attr("rng_stream: int")
    .Attr("exact: bool")
    .SetIsStateful()
    .SetShapeFn(SparseShapes)
    .Doc(
        "One step of one variable with a sparse gradient, in place: `values` are the gradients of the rows `indices`. "
        "The values of repeated indices are summed. exact: all other rows have a zero gradient; otherwise they do not "
        "change.");

REGISTER_OP("TfAdamVariants>SquaredNorm")
    .Input("gradients: N * G")
    .Output("sum: float64")
    .Attr("N: int >= 1")
    .Attr("G: {half, bfloat16, float, double}")
    .SetShapeFn(shape_inference::ScalarShape)
    .Doc("The sum of the squares of all elements of all gradients.");

REGISTER_OP("TfAdamVariants>Coefficients")
    .Input("iterations: int64")
    .Input("learning_rate: L")
    .Input("gradient_scale: num_scales * float64")
    .Input("rounding_seed: num_seeds * uint32")
    .Output("coefficients: float64")
    .Attr("L: {float, double}")
    .Attr("num_scales: int >= 0")
    .Attr("num_seeds: int >= 0")
    .Attr("static_coefficients: list(int)")
    .SetShapeFn(CoefficientsShape)
    .Doc(
        "The `coefficients` for the ops above. static_coefficients: the bits of the numbers in `StaticCoefficients` of "
        "coefficients.h, since an attribute of type float has 32 bits. gradient_scale and rounding_seed: one or none.");

}  // namespace
}  // namespace tensorflow
