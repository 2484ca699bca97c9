// Gradients as slices: repeated ids found and their values summed. Knows nothing of TensorFlow.

#ifndef TF_ADAM_VARIANTS_SPARSE_H_
#define TF_ADAM_VARIANTS_SPARSE_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "half_types.h"
#include "step.h"

namespace tfav {

// Each row once, in ascending order, with the positions where it is named.
class Rows {
 public:
  template <typename I>
  Rows(const I* ids, int64_t count) : positions_(count) {
    // A hash table of the rows met so far, by open addressing: sorting all ids would take longer than the step.
    uint64_t slots = 16;
    while (slots < 2 * uint64_t(count)) slots *= 2;
    std::vector<int64_t> table(slots, -1), group(count), met;
    for (int64_t i = 0; i < count; ++i) {
      uint64_t slot = uint64_t(ids[i]) * 0x9e3779b97f4a7c15u >> 20 & (slots - 1);
      while (table[slot] >= 0 && met[table[slot]] != int64_t(ids[i])) slot = (slot + 1) & (slots - 1);
      if (table[slot] < 0) {
        table[slot] = int64_t(met.size());
        met.push_back(ids[i]);
      }
      group[i] = table[slot];
    }
    const int64_t groups = int64_t(met.size());
    std::vector<int64_t> order(groups), rank(groups);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return met[a] < met[b]; });
    rows_.resize(groups);
    for (int64_t i = 0; i < groups; ++i) {
      rows_[i] = met[order[i]];
      rank[order[i]] = i;
    }
    // Counted and placed, in the order in which they were given: sums have one order.
    begins_.assign(groups + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++begins_[rank[group[i]] + 1];
    std::partial_sum(begins_.begin(), begins_.end(), begins_.begin());
    std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
    for (int64_t i = 0; i < count; ++i) positions_[next[rank[group[i]]]++] = i;
  }

  int64_t count() const { return int64_t(rows_.size()); }
  int64_t row(int64_t i) const { return rows_[i]; }

  // sum[0, width) = the values of all positions that name the i-th row.
  template <typename G, typename S>
  void add_up(int64_t i, const void* given, int64_t width, void* to) const {
    const G* values = static_cast<const G*>(given);
    S* sum = static_cast<S*>(to);
    std::fill(sum, sum + width, S(0));
    for (int64_t k = begins_[i]; k < begins_[i + 1]; ++k) {
      const G* value = values + positions_[k] * width;
      for (int64_t j = 0; j < width; ++j) sum[j] += widened(value[j]);
    }
  }

  // The same for values of a type known when it runs. The sum is of the type of the moments.
  void add_up(int64_t i, Type gradient, const void* values, int64_t width, void* sum) const {
    switch (gradient) {
      case Type::kHalf:
        return add_up<Half, float>(i, values, width, sum);
      case Type::kBFloat16:
        return add_up<BFloat16, float>(i, values, width, sum);
      case Type::kFloat:
        return add_up<float, float>(i, values, width, sum);
      default:
        return add_up<double, double>(i, values, width, sum);
    }
  }

 private:
  std::vector<int64_t> rows_, begins_, positions_;
};

// The spans of a step by rows, whose gradients are sums[i * width ...]. Exact: of all rows, zeros where none is named.
inline void add_rows(Plan& plan, const Parameter& t, const Rows& rows, int64_t width, const char* sums, int64_t bytes,
                     bool exact) {
  int64_t done = 0;
  for (int64_t i = 0; i < rows.count(); ++i) {
    const int64_t begin = rows.row(i) * width;
    if (exact) plan.add(t, 0, done, begin, nullptr);
    plan.add(t, 0, begin, begin + width, sums + i * bytes);
    done = begin + width;
  }
  if (exact) plan.add(t, 0, done, t.size, nullptr);
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_SPARSE_H_
