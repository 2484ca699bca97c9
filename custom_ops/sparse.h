// Sparse gradients on a CPU: values for indexed rows. Finds repeated indices and sums their values. Knows nothing of
// TensorFlow.

#ifndef TF_ADAM_VARIANTS_SPARSE_H_
#define TF_ADAM_VARIANTS_SPARSE_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "half_precision.h"
#include "step.h"

namespace tfav {

// Each indexed row once, in ascending order, with its positions among the indices.
class UniqueRows {
 public:
  template <typename I>
  UniqueRows(const I* indices, int64_t count) : positions_(count) {
    // A hash table of the rows so far, with open addressing: a sort of all indices would take longer than the step.
    uint64_t slots = 16;
    while (slots < 2 * uint64_t(count)) slots *= 2;
    std::vector<int64_t> table(slots, -1), group(count), unique;
    for (int64_t i = 0; i < count; ++i) {
      uint64_t slot = uint64_t(indices[i]) * 0x9e3779b97f4a7c15u >> 20 & (slots - 1);
      while (table[slot] >= 0 && unique[table[slot]] != int64_t(indices[i])) slot = (slot + 1) & (slots - 1);
      if (table[slot] < 0) {
        table[slot] = int64_t(unique.size());
        unique.push_back(indices[i]);
      }
      group[i] = table[slot];
    }
    const int64_t groups = int64_t(unique.size());
    std::vector<int64_t> order(groups), rank(groups);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return unique[a] < unique[b]; });
    rows_.resize(groups);
    for (int64_t i = 0; i < groups; ++i) {
      rows_[i] = unique[order[i]];
      rank[order[i]] = i;
    }
    // A counting sort keeps the positions of each row in ascending order, so that sums have one order.
    begins_.assign(groups + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++begins_[rank[group[i]] + 1];
    std::partial_sum(begins_.begin(), begins_.end(), begins_.begin());
    std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
    for (int64_t i = 0; i < count; ++i) positions_[next[rank[group[i]]]++] = i;
  }

  int64_t count() const { return int64_t(rows_.size()); }
  int64_t row(int64_t i) const { return rows_[i]; }

  // sum[0, width) = the sum of the values at all positions of the i-th row.
  template <typename G, typename S>
  void sum_values(int64_t i, const void* gradient, int64_t width, void* result) const {
    const G* values = static_cast<const G*>(gradient);
    S* sum = static_cast<S*>(result);
    std::fill(sum, sum + width, S(0));
    for (int64_t k = begins_[i]; k < begins_[i + 1]; ++k) {
      const G* value = values + positions_[k] * width;
      for (int64_t j = 0; j < width; ++j) sum[j] += to_float(value[j]);
    }
  }

  // The same for a type that is known only at run time. The sum has the type of the slots.
  void sum_values(int64_t i, DType dtype, const void* gradient, int64_t width, void* result) const {
    switch (dtype) {
      case DType::kHalf:
        return sum_values<Half, float>(i, gradient, width, result);
      case DType::kBFloat16:
        return sum_values<BFloat16, float>(i, gradient, width, result);
      case DType::kFloat:
        return sum_values<float, float>(i, gradient, width, result);
      default:
        return sum_values<double, double>(i, gradient, width, result);
    }
  }

 private:
  std::vector<int64_t> rows_, begins_, positions_;
};

// Adds the rows of a sparse step to the partition; the i-th row has the gradient sums[i * row_bytes ...]. exact: also
// all rows in between, with gradients of zero.
inline void add_rows(Partition& partition, const VariableState& state, const UniqueRows& rows, int64_t width,
                     const char* sums, int64_t row_bytes, bool exact) {
  int64_t done = 0;
  for (int64_t i = 0; i < rows.count(); ++i) {
    const int64_t begin = rows.row(i) * width;
    if (exact) partition.add(state, 0, done, begin, nullptr);
    partition.add(state, 0, begin, begin + width, sums + i * row_bytes);
    done = begin + width;
  }
  if (exact) partition.add(state, 0, done, state.size, nullptr);
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_SPARSE_H_
