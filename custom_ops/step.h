// One step over any number of variables: their elements cut into spans, the spans into blocks of equal work,
// the blocks taken by threads. Knows nothing of TensorFlow.
//
// Where the cuts are depends on the sizes alone, and norms are added up in the order of the spans: a step is
// the same to the last bit for any number of threads.

#ifndef TF_ADAM_VARIANTS_STEP_H_
#define TF_ADAM_VARIANTS_STEP_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "adam_math.h"
#include "loops.h"

namespace tfav {

// Runs f(0), ..., f(n - 1), at the same time where it can.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t)>& f)>;

constexpr int64_t kSpan = 16384;  // 256 KiB of float32 w, m, v, g: LAMB's second pass finds them in the cache

// LAMB's two passes are made over variables of about so many elements together: their w, m and v are still in the
// last level of the cache when the second begins.
constexpr int64_t kTogether = 1 << 19;

struct Sizes {
  int64_t variable, state, gradient;  // of an element in bytes
};

class Plan {
 public:
  explicit Plan(const Sizes& sizes) : sizes_(sizes) {}

  // Elements [begin, end) of a variable. g points to the gradient of element `begin`; null: zeros.
  void add(const Parameter& t, int variable, int64_t begin, int64_t end, const char* g) {
    for (; begin < end; begin += kSpan) {
      const int64_t size = std::min(kSpan, end - begin);
      const auto at = [&](char* state) { return state != nullptr ? state + begin * sizes_.state : nullptr; };
      spans_.push_back({t.w + begin * sizes_.variable, at(t.m), at(t.v), at(t.v_max), at(t.master), g, begin, size,
                        variable, t.stream});
      if (g != nullptr) g += size * sizes_.gradient;
      elements_ += size;
      filled_ += size + kOverhead;
      if (filled_ >= kSpan) end_block();
    }
  }

  // Runs f on every span, in blocks of about kSpan elements.
  template <typename F>
  void for_each(const Parallel& parallel, const F& f) {
    if (filled_ > 0) end_block();
    parallel(int64_t(blocks_.size()), [&](int64_t block) {
      for (size_t i = block > 0 ? blocks_[block - 1] : 0; i < blocks_[block]; ++i) f(spans_[i], i);
    });
  }

  const std::vector<Span>& spans() const { return spans_; }
  int64_t elements() const { return elements_; }

 private:
  static constexpr int64_t kOverhead = 32;  // what beginning a span costs, in elements

  void end_block() {
    blocks_.push_back(spans_.size());
    filled_ = 0;
  }

  Sizes sizes_;
  std::vector<Span> spans_;
  std::vector<size_t> blocks_;  // where each ends
  int64_t filled_ = 0, elements_ = 0;
};

inline double decay_of(const Parameter& t, const Step& s) { return t.weight_decay ? s.weight_decay : 0.0; }

// AdamW, QHAdam, QHAdamW.
inline void adam(Plan& plan, const std::vector<Parameter>& variables, const Step& s, Loop loop,
                 const Parallel& parallel) {
  plan.for_each(parallel,
                [&](const Span& span, size_t) { loop(span, s, decay_of(variables[span.variable], s), 1.0, nullptr); });
}

// LAMB: the norms, then the step. A variable of one span takes both while it is in the cache.
inline void lamb(Plan& plan, const std::vector<Parameter>& variables, const Step& s, const Loops& loops,
                 const Parallel& parallel) {
  const std::vector<Span>& spans = plan.spans();
  const auto step_size_of = [&](const Parameter& t, const Norms& n) {
    return t.layer_adaptation ? s.learning_rate * trust_ratio(n, s) : s.learning_rate;
  };
  const auto alone = [&](size_t i) {
    return (i == 0 || spans[i - 1].variable != spans[i].variable) &&
           (i + 1 == spans.size() || spans[i + 1].variable != spans[i].variable);
  };
  std::vector<Norms> norms(spans.size(), Norms{0, 0});
  plan.for_each(parallel, [&](const Span& span, size_t i) {
    const Parameter& t = variables[span.variable];
    loops.norms(span, s, decay_of(t, s), 0.0, &norms[i]);
    if (alone(i)) loops.apply(span, s, decay_of(t, s), step_size_of(t, norms[i]), nullptr);
  });
  std::vector<Norms> sums(variables.size(), Norms{0, 0});
  bool done = true;
  for (size_t i = 0; i < spans.size(); ++i) {
    sums[spans[i].variable].w += norms[i].w;
    sums[spans[i].variable].u += norms[i].u;
    done = done && alone(i);
  }
  if (done) return;
  plan.for_each(parallel, [&](const Span& span, size_t i) {
    const Parameter& t = variables[span.variable];
    if (!alone(i)) loops.apply(span, s, decay_of(t, s), step_size_of(t, sums[span.variable]), nullptr);
  });
}

// The sum of the squares of all gradients, in float64.
inline double squared_norm(const std::vector<Parameter>& gradients, int64_t element, SquaredNormLoop loop,
                           const Parallel& parallel) {
  Plan plan({0, 0, element});
  for (size_t i = 0; i < gradients.size(); ++i) plan.add(gradients[i], int(i), 0, gradients[i].size, gradients[i].g);
  std::vector<double> sums(plan.spans().size());
  plan.for_each(parallel, [&](const Span& span, size_t i) { sums[i] = loop(span.g, span.size); });
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_STEP_H_
