// Compiled once per instruction set, which TFAV_SET names. Only the two functions at the end are visible outside, and
// nothing of the standard library is used: of an inline function that is compiled here for a newer processor and
// elsewhere for any, the linker could keep the newer one for the whole library.

#include "loops.h"

#include "update_element.h"

#ifndef TFAV_SET
#define TFAV_SET baseline
#endif

namespace tfav {
namespace {

constexpr int64_t kZeros = 1024;
const double zeros[kZeros] = {};  // as a gradient of any type

template <typename T, typename G, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, Pass kPass>
void update_elements(T* __restrict w, typename SlotType<T>::type* __restrict m,
                     typename SlotType<T>::type* __restrict v, typename SlotType<T>::type* __restrict v_max,
                     typename SlotType<T>::type* __restrict master, const G* __restrict g, int64_t size,
                     const Formula<typename SlotType<T>::type>& shared, typename SlotType<T>::type decay,
                     typename SlotType<T>::type step_size, uint32_t stream_key, Norms* norms) {
  using S = typename SlotType<T>::type;
  const Formula<S> formula = shared;  // a copy that no store can change
  double w_squares = 0, u_squares = 0;
#pragma omp simd reduction(+ : w_squares, u_squares)
  for (int64_t i = 0; i < size; ++i) {
    const S gradient = kPass == Pass::kApply ? S(0) : S(to_float(g[i]));
    const Norms element = update_element<kPass, kSquaredGradient, kAmsgrad, kRounding>(
        formula, gradient, decay, step_size, stream_key, uint32_t(i), &w[i], &m[i], &v[i],
        kAmsgrad ? &v_max[i] : nullptr, kRounding == Rounding::kMaster ? &master[i] : nullptr);
    if (kPass == Pass::kNorms) {
      w_squares += element.w;
      u_squares += element.u;
    }
  }
  if (kPass == Pass::kNorms) {
    norms->w += w_squares;
    norms->u += u_squares;
  }
}

template <typename T, typename G, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, Pass kPass>
void update_span(const Span& span, const Coefficients& c, double decay, double step_size, Norms* norms) {
  using S = typename SlotType<T>::type;
  const Formula<S> formula(c);
  const uint32_t stream_key = rng_stream_key(c, span.rng_stream) + uint32_t(span.begin);
  const int64_t stride = span.g != nullptr ? span.size : kZeros;
  for (int64_t i = 0; i < span.size; i += stride) {
    const int64_t size = span.size - i < stride ? span.size - i : stride;
    const G* g = span.g != nullptr ? static_cast<const G*>(span.g) : reinterpret_cast<const G*>(zeros);
    update_elements<T, G, kSquaredGradient, kAmsgrad, kRounding, kPass>(
        static_cast<T*>(span.w) + i, static_cast<S*>(span.m) + i, static_cast<S*>(span.v) + i,
        kAmsgrad ? static_cast<S*>(span.v_max) + i : nullptr,
        kRounding == Rounding::kMaster ? static_cast<S*>(span.master) + i : nullptr, g, size, formula, S(decay),
        S(step_size), stream_key + uint32_t(i), norms);
  }
}

template <typename T, typename G, Rounding kRounding>
Loops select_loops(const KernelConfig& config) {
  // The pass for norms writes no weights, so it does not round them; the second pass of LAMB reads no gradient.
  constexpr Rounding kRead = kRounding == Rounding::kMaster ? Rounding::kMaster : Rounding::kNearest;
  return {config.squared_gradient ? (config.amsgrad ? update_span<T, G, true, true, kRounding, Pass::kAdam>
                                                    : update_span<T, G, true, false, kRounding, Pass::kAdam>)
                                  : (config.amsgrad ? update_span<T, G, false, true, kRounding, Pass::kAdam>
                                                    : update_span<T, G, false, false, kRounding, Pass::kAdam>),
          update_span<T, G, false, false, kRead, Pass::kNorms>,
          update_span<T, T, false, false, kRounding, Pass::kApply>};
}

template <typename T, typename G>
Loops select_half_precision_loops(const KernelConfig& config) {
  return config.rounding == Rounding::kMaster       ? select_loops<T, G, Rounding::kMaster>(config)
         : config.rounding == Rounding::kStochastic ? select_loops<T, G, Rounding::kStochastic>(config)
                                                    : select_loops<T, G, Rounding::kNearest>(config);
}

template <typename G>
double sum_squares(const void* gradient, int64_t size) {
  const G* __restrict g = static_cast<const G*>(gradient);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += double(to_float(g[i])) * double(to_float(g[i]));
  return sum;
}

}  // namespace

#define TFAV_JOIN_(name, set) name##_##set
#define TFAV_JOIN(name, set) TFAV_JOIN_(name, set)

Loops TFAV_JOIN(loops, TFAV_SET)(const KernelConfig& config) {
  const bool same = config.gradient == config.variable;
  switch (config.variable) {
    case DType::kHalf:
      return same ? select_half_precision_loops<Half, Half>(config) : select_half_precision_loops<Half, float>(config);
    case DType::kBFloat16:
      return same ? select_half_precision_loops<BFloat16, BFloat16>(config)
                  : select_half_precision_loops<BFloat16, float>(config);
    case DType::kFloat:
      return select_loops<float, float, Rounding::kNearest>(config);
    default:
      return select_loops<double, double, Rounding::kNearest>(config);
  }
}

SquaredNormLoop TFAV_JOIN(squared_norm, TFAV_SET)(DType gradient) {
  return gradient == DType::kHalf       ? sum_squares<Half>
         : gradient == DType::kBFloat16 ? sum_squares<BFloat16>
         : gradient == DType::kFloat    ? sum_squares<float>
                                        : sum_squares<double>;
}

}  // namespace tfav
