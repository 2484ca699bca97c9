// One step of any number of variables on a CPU: their elements are cut into spans, the spans are gathered into tasks of
// equal work, and threads run the tasks. Knows nothing of TensorFlow.
//
// The sizes alone decide the cuts, and norms are summed in the order of the spans: a step is bit-exact for any number
// of threads.

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

// Runs f(0), ..., f(n - 1), in parallel where it can.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t)>& f)>;

constexpr int64_t kSpan = 16384;  // 256 KiB of float32 w, m, v, g: the second pass of LAMB finds them in the cache

// LAMB runs its two passes over batches of variables with about this many elements in all: the last-level cache still
// holds their w, m and v when the second pass begins.
constexpr int64_t kLambBatch = 1 << 19;

// Bytes per element.
struct ElementSizes {
  int64_t variable, slot, gradient;
};

// The elements of a step, cut into spans, and the spans, gathered into tasks.
class Partition {
 public:
  explicit Partition(const ElementSizes& sizes) : sizes_(sizes) {}

  // Adds elements [begin, end) of a variable. g points to the gradient of element `begin`; null: zeros.
  void add(const VariableState& state, int variable, int64_t begin, int64_t end, const char* g) {
    for (; begin < end; begin += kSpan) {
      const int64_t size = std::min(kSpan, end - begin);
      const auto at = [&](char* slot) { return slot != nullptr ? slot + begin * sizes_.slot : nullptr; };
      spans_.push_back({state.w + begin * sizes_.variable, at(state.m), at(state.v), at(state.v_max), at(state.master),
                        g, begin, size, variable, state.rng_stream});
      if (g != nullptr) g += size * sizes_.gradient;
      elements_ += size;
      task_cost_ += size + kSpanCost;
      if (task_cost_ >= kSpan) end_task();
    }
  }

  // Runs f on every span, in tasks of about kSpan elements.
  template <typename F>
  void for_each(const Parallel& parallel, const F& f) {
    if (task_cost_ > 0) end_task();
    parallel(int64_t(task_ends_.size()), [&](int64_t task) {
      for (size_t i = task > 0 ? task_ends_[task - 1] : 0; i < task_ends_[task]; ++i) f(spans_[i], i);
    });
  }

  const std::vector<Span>& spans() const { return spans_; }
  int64_t elements() const { return elements_; }

 private:
  static constexpr int64_t kSpanCost = 32;  // the cost to begin a span, in elements

  void end_task() {
    task_ends_.push_back(spans_.size());
    task_cost_ = 0;
  }

  ElementSizes sizes_;
  std::vector<Span> spans_;
  std::vector<size_t> task_ends_;  // the index behind the last span of each task
  int64_t task_cost_ = 0, elements_ = 0;
};

inline double decay_of(const VariableState& state, const Coefficients& c) {
  return state.weight_decay ? c.weight_decay : 0.0;
}

// AdamW, QHAdam, QHAdamW.
inline void adam(Partition& partition, const std::vector<VariableState>& variables, const Coefficients& c,
                 SpanLoop loop, const Parallel& parallel) {
  partition.for_each(
      parallel, [&](const Span& span, size_t) { loop(span, c, decay_of(variables[span.variable], c), 1.0, nullptr); });
}

// LAMB: the norms, then the weights. A variable of a single span takes both passes while the cache holds it.
inline void lamb(Partition& partition, const std::vector<VariableState>& variables, const Coefficients& c,
                 const Loops& loops, const Parallel& parallel) {
  const std::vector<Span>& spans = partition.spans();
  const auto step_size_of = [&](const VariableState& state, const Norms& norms) {
    return state.layer_adaptation ? c.learning_rate * trust_ratio(norms, c) : c.learning_rate;
  };
  const auto is_single_span = [&](size_t i) {
    return (i == 0 || spans[i - 1].variable != spans[i].variable) &&
           (i + 1 == spans.size() || spans[i + 1].variable != spans[i].variable);
  };
  std::vector<Norms> norms(spans.size(), Norms{0, 0});
  partition.for_each(parallel, [&](const Span& span, size_t i) {
    const VariableState& state = variables[span.variable];
    loops.norms(span, c, decay_of(state, c), 0.0, &norms[i]);
    if (is_single_span(i)) loops.apply(span, c, decay_of(state, c), step_size_of(state, norms[i]), nullptr);
  });
  std::vector<Norms> sums(variables.size(), Norms{0, 0});
  bool done = true;
  for (size_t i = 0; i < spans.size(); ++i) {
    sums[spans[i].variable].w += norms[i].w;
    sums[spans[i].variable].u += norms[i].u;
    done = done && is_single_span(i);
  }
  if (done) return;
  partition.for_each(parallel, [&](const Span& span, size_t i) {
    const VariableState& state = variables[span.variable];
    if (!is_single_span(i)) {
      loops.apply(span, c, decay_of(state, c), step_size_of(state, sums[span.variable]), nullptr);
    }
  });
}

// The sum of the squares of all gradients, in float64.
inline double squared_norm(const std::vector<VariableState>& gradients, int64_t element_size, SquaredNormLoop loop,
                           const Parallel& parallel) {
  Partition partition({0, 0, element_size});
  for (size_t i = 0; i < gradients.size(); ++i) {
    partition.add(gradients[i], int(i), 0, gradients[i].size, gradients[i].g);
  }
  std::vector<double> sums(partition.spans().size());
  partition.for_each(parallel, [&](const Span& span, size_t i) { sums[i] = loop(span.g, span.size); });
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_STEP_H_
