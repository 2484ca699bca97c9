// cub's sort of pairs, on a CPU: stable, and by the bits that it is told alone.

#ifndef CUDA_ON_CPU_DEVICE_RADIX_SORT_H_
#define CUDA_ON_CPU_DEVICE_RADIX_SORT_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* scratch, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values,
                               Value* sorted_values, int count, int begin_bit, int end_bit, cudaStream_t) {
    if (scratch == nullptr) {
      bytes = 1;
      return cudaSuccess;
    }
    const auto part = [&](int i) { return keys[i] >> begin_bit & ((Key(1) << (end_bit - begin_bit)) - 1); };
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return part(a) < part(b); });
    for (int i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub

#endif  // CUDA_ON_CPU_DEVICE_RADIX_SORT_H_
