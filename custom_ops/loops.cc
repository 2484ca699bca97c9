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

template <typename T, typename G, bool kSquaredGradient, bool kAmsgrad, Pass kPass>
void update_span(T* __restrict w, typename StateOf<T>::type* __restrict m, typename StateOf<T>::type* __restrict v,
                 typename StateOf<T>::type* __restrict v_max, const G* __restrict g, int64_t size,
                 const Formula<typename StateOf<T>::type>& f, typename StateOf<T>::type decay,
                 typename StateOf<T>::type step_size, Norms* norms) {
  using S = typename StateOf<T>::type;
  const Formula<S> c = f;  // a copy that no store can change
  double w_squares = 0, u_squares = 0;
#pragma omp simd reduction(+ : w_squares, u_squares)
  for (int64_t i = 0; i < size; ++i) {
    const S weight = widened(w[i]);
    const S gradient = kPass == Pass::kApply ? S(0) : S(widened(g[i]));
    const S u = c.template change<kPass, kSquaredGradient, kAmsgrad>(weight, gradient, decay, &m[i], &v[i],
                                                                     kAmsgrad ? &v_max[i] : nullptr);
    if (kPass == Pass::kNorms) {
      w_squares += double(weight) * double(weight);
      u_squares += double(u) * double(u);
    } else {
      narrow(updated(weight, u, step_size), &w[i]);
    }
  }
  if (kPass == Pass::kNorms) {
    norms->w += w_squares;
    norms->u += u_squares;
  }
}

template <typename T, typename G, bool kSquaredGradient, bool kAmsgrad, Pass kPass>
void loop(const Span& s, const Step& step, double decay, double step_size, Norms* norms) {
  using S = typename StateOf<T>::type;
  const Formula<S> f(step);
  const int64_t most = s.g != nullptr ? s.size : kZeros;
  for (int64_t i = 0; i < s.size; i += most) {
    const int64_t size = s.size - i < most ? s.size - i : most;
    const G* g = s.g != nullptr ? static_cast<const G*>(s.g) : reinterpret_cast<const G*>(zeros);
    update_span<T, G, kSquaredGradient, kAmsgrad, kPass>(
        static_cast<T*>(s.w) + i, static_cast<S*>(s.m) + i, static_cast<S*>(s.v) + i,
        kAmsgrad ? static_cast<S*>(s.v_max) + i : nullptr, g, size, f, S(decay), S(step_size), norms);
  }
}

template <typename T, typename G>
Loops chosen(bool squared_gradient, bool amsgrad) {
  return {squared_gradient ? (amsgrad ? loop<T, G, true, true, Pass::kAdam> : loop<T, G, true, false, Pass::kAdam>)
                           : (amsgrad ? loop<T, G, false, true, Pass::kAdam> : loop<T, G, false, false, Pass::kAdam>),
          loop<T, G, false, false, Pass::kNorms>, loop<T, G, false, false, Pass::kApply>};
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

Loops TFAV_JOIN(loops, TFAV_SET)(Type variable, Type gradient, bool squared_gradient, bool amsgrad) {
  switch (variable) {
    case Type::kHalf:
      return gradient == Type::kHalf ? chosen<Half, Half>(squared_gradient, amsgrad)
                                     : chosen<Half, float>(squared_gradient, amsgrad);
    case Type::kBFloat16:
      return gradient == Type::kBFloat16 ? chosen<BFloat16, BFloat16>(squared_gradient, amsgrad)
                                         : chosen<BFloat16, float>(squared_gradient, amsgrad);
    case Type::kFloat:
      return chosen<float, float>(squared_gradient, amsgrad);
    default:
      return chosen<double, double>(squared_gradient, amsgrad);
  }
}

SquaredNormLoop TFAV_JOIN(squares, TFAV_SET)(Type gradient) {
  return gradient == Type::kHalf       ? squares<Half>
         : gradient == Type::kBFloat16 ? squares<BFloat16>
         : gradient == Type::kFloat    ? squares<float>
                                       : squares<double>;
}

}  // namespace tfav
