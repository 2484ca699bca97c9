// The update of one element, shared by the loops on the CPU and the kernels on a GPU.

#ifndef TF_ADAM_VARIANTS_UPDATE_ELEMENT_H_
#define TF_ADAM_VARIANTS_UPDATE_ELEMENT_H_

#include "adam_math.h"
#include "half_precision.h"
#include "variable_state.h"

namespace tfav {

// Runs one pass over one element and returns its w^2 and u^2, for the pass that needs norms. Reads and writes v_max
// only with kAmsgrad and master only with Rounding::kMaster. stream_key and index select the random number.
template <Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, typename T, typename S>
TFAV_INLINE Norms update_element(const Formula<S>& formula, S g, S decay, S step_size, uint32_t stream_key,
                                 uint32_t index, T* w, S* m, S* v, S* v_max, S* master) {
  S weight;
  if constexpr (kRounding == Rounding::kMaster)
    weight = effective_weight(*w, *master);
  else
    weight = to_float(*w);
  const S u = formula.template update_moments<kPass, kSquaredGradient, kAmsgrad>(weight, g, decay, m, v, v_max);
  if constexpr (kPass != Pass::kNorms) {
    const S updated = new_weight(weight, u, step_size);
    if constexpr (kRounding == Rounding::kMaster) *master = updated;
    if constexpr (kRounding == Rounding::kStochastic)
      round_stochastically(updated, random_bits(stream_key, index), w);
    else
      round_to_nearest(updated, w);
  }
  return {double(weight) * double(weight), double(u) * double(u)};
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_UPDATE_ELEMENT_H_
