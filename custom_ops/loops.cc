// Compiled once for each set of instructions, with TFAV_SET naming it. Only the two functions at the end are
// visible from outside, and nothing of the standard library is used: an inline function of it, compiled
// here for a newer processor, could be the one that the linker keeps for the whole library.

#include "loops.h"

#include "half_types.h"

#ifndef TFAV_SET
#define TFAV_SET baseline
#endif

namespace tfav {
namespace {

constexpr int64_t kZeros = 1024;
const double zeros[kZeros] = {};  // as a gradient of any type

template <typename T, typename G, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, Pass kPass>
void update_span(T* __restrict w, typename StateOf<T>::type* __restrict m, typename StateOf<T>::type* __restrict v,
                 typename StateOf<T>::type* __restrict v_max, typename StateOf<T>::type* __restrict master,
                 const G* __restrict g, int64_t size, const Formula<typename StateOf<T>::type>& f,
                 typename StateOf<T>::type decay, typename StateOf<T>::type step_size, uint32_t key, Norms* norms) {
  using S = typename StateOf<T>::type;
  const Formula<S> c = f;  // a copy that no store can change
  double w_squares = 0, u_squares = 0;
#pragma omp simd reduction(+ : w_squares, u_squares)
  for (int64_t i = 0; i < size; ++i) {
    S weight;
    if constexpr (kRounding == Rounding::kMaster)
      weight = followed(w[i], master[i]);
    else
      weight = widened(w[i]);
    const S gradient = kPass == Pass::kApply ? S(0) : S(widened(g[i]));
    const S u = c.template change<kPass, kSquaredGradient, kAmsgrad>(weight, gradient, decay, &m[i], &v[i],
                                                                     kAmsgrad ? &v_max[i] : nullptr);
    if (kPass == Pass::kNorms) {
      w_squares += double(weight) * double(weight);
      u_squares += double(u) * double(u);
    } else {
      const S new_weight = updated(weight, u, step_size);
      if (kRounding == Rounding::kMaster) master[i] = new_weight;
      if (kRounding == Rounding::kStochastic)
        narrow_randomly(new_weight, random_bits(key, uint32_t(i)), &w[i]);
      else
        narrow(new_weight, &w[i]);
    }
  }
  if (kPass == Pass::kNorms) {
    norms->w += w_squares;
    norms->u += u_squares;
  }
}

template <typename T, typename G, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, Pass kPass>
void loop(const Span& s, const Step& step, double decay, double step_size, Norms* norms) {
  using S = typename StateOf<T>::type;
  const Formula<S> f(step);
  const uint32_t key = stream_key(step, s.stream) + uint32_t(s.begin);
  const int64_t most = s.g != nullptr ? s.size : kZeros;
  for (int64_t i = 0; i < s.size; i += most) {
    const int64_t size = s.size - i < most ? s.size - i : most;
    const G* g = s.g != nullptr ? static_cast<const G*>(s.g) : reinterpret_cast<const G*>(zeros);
    update_span<T, G, kSquaredGradient, kAmsgrad, kRounding, kPass>(
        static_cast<T*>(s.w) + i, static_cast<S*>(s.m) + i, static_cast<S*>(s.v) + i,
        kAmsgrad ? static_cast<S*>(s.v_max) + i : nullptr,
        kRounding == Rounding::kMaster ? static_cast<S*>(s.master) + i : nullptr, g, size, f, S(decay), S(step_size),
        key + uint32_t(i), norms);
  }
}

template <typename T, typename G, Rounding kRounding>
Loops chosen(const Kind& kind) {
  // What is not written is not rounded, and LAMB's second pass reads no gradient.
  constexpr Rounding kRead = kRounding == Rounding::kMaster ? Rounding::kMaster : Rounding::kNearest;
  return {kind.squared_gradient ? (kind.amsgrad ? loop<T, G, true, true, kRounding, Pass::kAdam>
                                                : loop<T, G, true, false, kRounding, Pass::kAdam>)
                                : (kind.amsgrad ? loop<T, G, false, true, kRounding, Pass::kAdam>
                                                : loop<T, G, false, false, kRounding, Pass::kAdam>),
          loop<T, G, false, false, kRead, Pass::kNorms>, loop<T, T, false, false, kRounding, Pass::kApply>};
}

template <typename T, typename G>
Loops rounded(const Kind& kind) {
  return kind.rounding == Rounding::kMaster       ? chosen<T, G, Rounding::kMaster>(kind)
         : kind.rounding == Rounding::kStochastic ? chosen<T, G, Rounding::kStochastic>(kind)
                                                  : chosen<T, G, Rounding::kNearest>(kind);
}

template <typename G>
double squares(const void* gradient, int64_t size) {
  const G* __restrict g = static_cast<const G*>(gradient);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += double(widened(g[i])) * double(widened(g[i]));
  return sum;
}

}  // namespace

#define TFAV_JOIN_(name, set) name##_##set
#define TFAV_JOIN(name, set) TFAV_JOIN_(name, set)

Loops TFAV_JOIN(loops, TFAV_SET)(const Kind& kind) {
  const bool same = kind.gradient == kind.variable;
  switch (kind.variable) {
    case Type::kHalf:
      return same ? rounded<Half, Half>(kind) : rounded<Half, float>(kind);
    case Type::kBFloat16:
      return same ? rounded<BFloat16, BFloat16>(kind) : rounded<BFloat16, float>(kind);
    case Type::kFloat:
      return chosen<float, float, Rounding::kNearest>(kind);
    default:
      return chosen<double, double, Rounding::kNearest>(kind);
  }
}

SquaredNormLoop TFAV_JOIN(squares, TFAV_SET)(Type gradient) {
  return gradient == Type::kHalf       ? squares<Half>
         : gradient == Type::kBFloat16 ? squares<BFloat16>
         : gradient == Type::kFloat    ? squares<float>
                                       : squares<double>;
}

}  // namespace tfav
