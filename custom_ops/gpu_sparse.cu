// The step of one variable on a GPU, by a gradient that names rows. The ids are sorted, so that those of a row stand
// side by side, in the order in which they were given; a group of threads takes a row, adds up its gradients, and makes
// the step. No dense gradient is ever in memory.

#include <cub/device/device_radix_sort.cuh>

#include "gpu_blocks.h"

namespace tfav {
namespace {

#ifndef TFAV_MOST_BLOCKS
#define TFAV_MOST_BLOCKS 4096
#endif
constexpr int64_t kMostBlocks = TFAV_MOST_BLOCKS;  // in each launch; a group of threads takes several rows beyond

int64_t blocks_for(int64_t threads) {
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  return wanted < kMostBlocks ? wanted : kMostBlocks;
}

// All a kernel needs to know of the variable and of the ids.
struct SparseUpdate {
  Parameter t;  // t.g: one row for each id
  int64_t rows, width, count;
  const uint64_t* keys;      // the ids, sorted; `rows` for those that no row has
  const int32_t* positions;  // where each was among those given
  int32_t* first;            // exact: of each row, its first key; any, where it has none
  int threads_per_row;       // threads that update a row together

  int64_t units() const { return first != nullptr ? rows : count; }
};

template <typename I>
__global__ void __launch_bounds__(kThreads)
    prepare(const I* ids, int64_t count, int64_t rows, uint64_t* keys, int32_t* positions) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    keys[i] = ids[i] >= 0 && ids[i] < rows ? uint64_t(ids[i]) : uint64_t(rows);
    positions[i] = int32_t(i);
  }
}

__device__ __forceinline__ bool begins_row(const SparseUpdate& sparse, int64_t i) {
  return sparse.keys[i] < uint64_t(sparse.rows) && (i == 0 || sparse.keys[i - 1] != sparse.keys[i]);
}

// Where the keys of a row end, which begin there if there are any. By doubled steps: most rows have one key, some many.
__device__ __forceinline__ int64_t end_of(const SparseUpdate& sparse, int64_t begin, int64_t row) {
  const auto fits = [&](int64_t i) { return i < sparse.count && sparse.keys[i] == uint64_t(row); };
  if (!fits(begin)) return begin;
  int64_t last = begin, step = 1;  // the last key known to fit
  for (; fits(last + step); step *= 2) last += step;
  for (; step > 0; step /= 2) {
    if (fits(last + step)) last += step;
  }
  return last + 1;
}

__global__ void __launch_bounds__(kThreads) find_rows(const __grid_constant__ SparseUpdate sparse) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < sparse.count; i += int64_t(gridDim.x) * kThreads) {
    if (begins_row(sparse, i)) sparse.first[sparse.keys[i]] = int32_t(i);
  }
}

// norms: of each block, written where kPass computes them. made_step_size: read where kPass uses it.
template <typename T, typename G, Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding>
__global__ void __launch_bounds__(kThreads, 3)  // 3 blocks at a time: for more, the compiler would spill registers
    update_rows(const __grid_constant__ SparseUpdate sparse, const __grid_constant__ StepSource source, Norms* norms,
                const double* made_step_size) {
  using S = typename StateOf<T>::type;
  const Step step = source.get();
  const Formula<S> formula(step);
  const S decay = S(sparse.t.weight_decay ? step.weight_decay : 0.0);
  const S step_size = S(kPass == Pass::kApply ? *made_step_size : 1.0);
  Norms sum = {0, 0};
  const int groups = kThreads / sparse.threads_per_row, lane = threadIdx.x % sparse.threads_per_row;
  const int64_t units = sparse.first != nullptr ? sparse.rows : sparse.count;
  for (int64_t unit = int64_t(blockIdx.x) * groups + threadIdx.x / sparse.threads_per_row; unit < units;
       unit += int64_t(gridDim.x) * groups) {
    int64_t row, begin;
    if (sparse.first != nullptr) {  // exact: a unit is a row, which need not be named
      row = unit;
      begin = sparse.first[row];
    } else {  // lazy: a position in the sorted keys
      if (!begins_row(sparse, unit)) continue;
      row = int64_t(sparse.keys[unit]);
      begin = unit;
    }
    const int64_t end = kPass != Pass::kApply ? end_of(sparse, begin, row) : begin;
    for (int64_t column = lane; column < sparse.width; column += sparse.threads_per_row) {
      S gradient = 0;
      if constexpr (kPass != Pass::kApply) {
        const G* const values = reinterpret_cast<const G*>(sparse.t.g) + column;
#pragma unroll 4  // loads of several values are under way at once
        for (int64_t i = begin; i < end; ++i) {
          gradient += S(widened(values[sparse.positions[i] * sparse.width]));
        }
      }
      const Arrays<T, S, S> arrays(sparse.t, &gradient, step, row * sparse.width + column);
      advance<kPass, kSquaredGradient, kAmsgrad, kRounding, 1>(formula, decay, step_size, arrays, 0, &sum);
    }
  }
  if constexpr (kPass == Pass::kNorms) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) norms[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    rows_trust_ratio(const __grid_constant__ StepSource source, bool layer_adaptation, const Norms* norms,
                     int64_t count, double* step_size) {
  const Norms sum = sum_of(norms, count);
  if (threadIdx.x == 0) {
    const Step step = source.get();
    *step_size = step.learning_rate * (layer_adaptation ? trust_ratio(sum, step) : 1.0);
  }
}

// Where things are in the scratch: each at a multiple of 16 bytes.
struct Scratch {
  uint64_t *keys, *sorted_keys;
  int32_t *positions, *sorted_positions, *first;
  Norms* norms;
  double* step_size;
  void* sorting;
  size_t sorting_bytes;
  int64_t bytes;

  // How many bits of the keys the sort looks at: those of `rows`.
  static int bits(int64_t rows) {
    int bits = 1;
    while (rows >> bits != 0) ++bits;
    return bits;
  }

  cudaError_t sort(int64_t rows, int64_t count, void* stream) {
    return cub::DeviceRadixSort::SortPairs(sorting, sorting_bytes, keys, sorted_keys, positions, sorted_positions,
                                           int(count), 0, bits(rows), static_cast<cudaStream_t>(stream));
  }

  Scratch(void* base, int64_t rows, int64_t count, bool exact) : sorting(nullptr), bytes(0) {
    const auto take = [&](int64_t more) {
      const uintptr_t at = reinterpret_cast<uintptr_t>(base) + bytes;  // base is null where only the size is asked for
      bytes += (more + 15) / 16 * 16;
      return reinterpret_cast<void*>(at);
    };
    keys = static_cast<uint64_t*>(take(count * 8));
    sorted_keys = static_cast<uint64_t*>(take(count * 8));
    positions = static_cast<int32_t*>(take(count * 4));
    sorted_positions = static_cast<int32_t*>(take(count * 4));
    first = exact ? static_cast<int32_t*>(take(rows * 4)) : nullptr;
    norms = static_cast<Norms*>(take(kMostBlocks * int64_t(sizeof(Norms))));
    step_size = static_cast<double*>(take(8));
    sorting_bytes = 0;
    sort(rows, count, nullptr);  // without memory it returns how much it needs
    sorting = take(int64_t(sorting_bytes));
  }
};

}  // namespace
}  // namespace tfav

using namespace tfav;

#define TFAV_RETURN_ERROR(call) \
  if (const cudaError_t error = (call)) return error

int64_t tfav_gpu_sparse_scratch(const Parameter*, int64_t rows, int64_t ids, int exact) {
  return Scratch(nullptr, rows, ids, exact != 0).bytes;
}

int tfav_gpu_sparse(const Parameter* t, int64_t rows, const void* ids, int64_t count, int ids_are_int64, int exact,
                    const GpuLaunch* launch) {
  if (t->size == 0) return cudaSuccess;
  if (count > INT32_MAX) return cudaErrorInvalidValue;
  Scratch scratch(launch->scratch, rows, count, exact != 0);
  if (launch->scratch_bytes < scratch.bytes) return cudaErrorInvalidValue;
  void* const stream = launch->stream;
  if (count > 0) {
    if (ids_are_int64 != 0) {
      TFAV_RETURN_ERROR(launch_kernel(prepare<int64_t>, blocks_for(count), stream, static_cast<const int64_t*>(ids),
                                      count, rows, scratch.keys, scratch.positions));
    } else {
      TFAV_RETURN_ERROR(launch_kernel(prepare<int32_t>, blocks_for(count), stream, static_cast<const int32_t*>(ids),
                                      count, rows, scratch.keys, scratch.positions));
    }
    TFAV_RETURN_ERROR(scratch.sort(rows, count, stream));
  }
  SparseUpdate sparse = {*t, rows, t->size / rows, count, scratch.sorted_keys, scratch.sorted_positions, scratch.first,
                         1};
  while (sparse.threads_per_row < kThreads && sparse.threads_per_row < sparse.width) sparse.threads_per_row *= 2;
  if (exact != 0) {
    const size_t bytes = size_t(rows) * sizeof *scratch.first;
    TFAV_RETURN_ERROR(cudaMemsetAsync(scratch.first, 0, bytes, static_cast<cudaStream_t>(stream)));
    TFAV_RETURN_ERROR(launch_kernel(find_rows, blocks_for(count), stream, sparse));
  }
  const StepSource source(*launch);
  const int64_t blocks = blocks_for(sparse.units() * sparse.threads_per_row);
  return with_types(launch->kind.variable, launch->kind.gradient, [&](auto* w, auto* g) -> cudaError_t {
    using T = std::remove_pointer_t<decltype(w)>;
    using G = std::remove_pointer_t<decltype(g)>;
    return with_rounding<T>(launch->kind.rounding, [&](auto rounding) -> cudaError_t {
      if (!launch->kind.trust_ratio) {
        const auto kernel = launch->kind.squared_gradient
                                ? (launch->kind.amsgrad ? update_rows<T, G, Pass::kAdam, true, true, rounding>
                                                        : update_rows<T, G, Pass::kAdam, true, false, rounding>)
                                : (launch->kind.amsgrad ? update_rows<T, G, Pass::kAdam, false, true, rounding>
                                                        : update_rows<T, G, Pass::kAdam, false, false, rounding>);
        return launch_kernel(kernel, blocks, stream, sparse, source, nullptr, nullptr);
      }
      TFAV_RETURN_ERROR(launch_kernel(update_rows<T, G, Pass::kNorms, false, false, when_read(rounding)>, blocks,
                                      stream, sparse, source, scratch.norms, nullptr));
      TFAV_RETURN_ERROR(launch_kernel(rows_trust_ratio, 1, stream, source, t->layer_adaptation, scratch.norms, blocks,
                                      scratch.step_size));
      return launch_kernel(update_rows<T, T, Pass::kApply, false, false, rounding>, blocks, stream, sparse, source,
                           nullptr, scratch.step_size);
    });
  });
}
