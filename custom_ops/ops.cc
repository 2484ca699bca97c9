// The ops' interface: what they take, and what is known of it before they run.

#include <vector>

#include "adam_math.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

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

}  // namespace
}  // namespace tensorflow
