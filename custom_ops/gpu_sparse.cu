// The step of one variable on a GPU, by a gradient that names rows. The ids are sorted, so that those of a row stand
// side by side, in the order in which they were given; a group of threads takes a span of a row, adds up its gradients,
// and makes the step. No dense gradient is ever in memory.

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

#ifndef TFAV_SPAN
#define TFAV_SPAN 2048
#endif
constexpr int kSpan = TFAV_SPAN;  // columns of a row, at most, that a group of threads takes
static_assert(kSpan % 4 == 0, "a span is packs");

// One id may be named a hundred thousand times, for example that of padding, and one group of threads would take
// milliseconds to add up its values. So each window of this many sorted ids, if they are all of one row, is summed by a
// group of its own before; the row's group then adds the windows' sums to the values before and behind them.
#ifndef TFAV_WINDOW
#define TFAV_WINDOW 128
#endif
constexpr int kWindow = TFAV_WINDOW;

// All a kernel needs to know of the variable and of the ids.
struct SparseUpdate {
  Parameter t;  // t.g: one row for each id
  int64_t rows, width, count;
  const uint64_t* keys;      // the ids, sorted; `rows` for those that no row has
  const int32_t* positions;  // where each was among those given
  int32_t* first;            // exact: of each row, its first key; any, where it has none
  void* window_sums;         // of each window, where it is of one row, in the type of the moments
  int64_t spans;             // of each row
  int span;                  // columns of a span; the last one may have fewer
  int threads_per_span;      // that update a span together
  bool packed;               // 16 bytes of the moments at once

  __host__ __device__ __forceinline__ int64_t units() const { return (first != nullptr ? rows : count) * spans; }

  // Cuts the rows into spans as even as can be.
  void cut(int pack) {
    spans = (width + kSpan - 1) / kSpan;
    const int64_t even = (width + spans - 1) / spans;
    span = int((even + pack - 1) / pack * pack);
    spans = (width + span - 1) / span;
    packed = pack > 1;
    threads_per_span = 1;
    while (threads_per_span < kThreads && threads_per_span * pack < span) threads_per_span *= 2;
  }
};

// Of the groups of a launch: how many there are, which one this thread is of, and as which of its threads.
struct Group {
  int64_t count, number;
  int lane;

  __device__ __forceinline__ explicit Group(const SparseUpdate& sparse)
      : count(int64_t(gridDim.x) * (kThreads / sparse.threads_per_span)),
        number(int64_t(blockIdx.x) * (kThreads / sparse.threads_per_span) + threadIdx.x / sparse.threads_per_span),
        lane(threadIdx.x % sparse.threads_per_span) {}
};

// What a group takes at once: of a row, of a sorted id or of a window, columns `begin` to begin + columns.
struct Unit {
  int64_t of, begin;
  int columns;

  __device__ __forceinline__ Unit(const SparseUpdate& sparse, int64_t number) : of(number), begin(0) {
    if (sparse.spans > 1) {
      of = number / sparse.spans;
      begin = (number - of * sparse.spans) * sparse.span;
    }
    const int64_t left = sparse.width - begin;
    columns = left < sparse.span ? int(left) : sparse.span;
  }
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

// Adds the values at `begin` to `end` of one column, or of N, to a sum, in their order. positions: null, or which rows
// of `values` they are.
template <int N, typename S, typename X>
__device__ __forceinline__ void add_values(const X* values, int64_t width, const int32_t* positions, int64_t begin,
                                           int64_t end, Pack<S, N>* sum) {
#pragma unroll 4  // loads of several values are under way at once
  for (int64_t i = begin; i < end; ++i) {
    const Pack<X, N> pack = load<N>(values + (positions != nullptr ? positions[i] : i) * width);
#pragma unroll
    for (int k = 0; k < N; ++k) sum->x[k] += S(widened(pack.x[k]));
  }
}

template <typename S, typename G>
__global__ void __launch_bounds__(kThreads) sum_windows(const __grid_constant__ SparseUpdate sparse) {
  const Group group(sparse);
  const int64_t units = sparse.count / kWindow * sparse.spans;
  for (int64_t number = group.number; number < units; number += group.count) {
    const Unit unit(sparse, number);
    const int64_t begin = unit.of * kWindow, end = begin + kWindow;
    if (sparse.keys[begin] != sparse.keys[end - 1] || sparse.keys[begin] >= uint64_t(sparse.rows)) continue;
    const G* const values = reinterpret_cast<const G*>(sparse.t.g) + unit.begin;
    S* const sums = static_cast<S*>(sparse.window_sums) + unit.of * sparse.width + unit.begin;
    const auto take = [&](auto many) {
      constexpr int kMany = decltype(many)::value;
      for (int i = group.lane * kMany; i < unit.columns; i += sparse.threads_per_span * kMany) {
        Pack<S, kMany> sum = {};
        add_values<kMany>(values + i, sparse.width, sparse.positions, begin, end, &sum);
        store<kMany>(sum, sums + i);
      }
    };
    if (sparse.packed)
      take(std::integral_constant<int, 16 / sizeof(S)>());
    else
      take(std::integral_constant<int, 1>());
  }
}

// The sum of the values of sorted ids `begin` to `end`, which are of one row, in column `column` and N - 1 more.
template <int N, typename S, typename G>
__device__ __forceinline__ Pack<S, N> sum_values(const SparseUpdate& sparse, int64_t begin, int64_t end,
                                                 int64_t column) {
  const G* const values = reinterpret_cast<const G*>(sparse.t.g) + column;
  const S* const sums = static_cast<const S*>(sparse.window_sums) + column;
  const int64_t first = (begin + kWindow - 1) / kWindow, last = end / kWindow;  // the windows in between
  Pack<S, N> sum = {};
  if (first < last) {
    add_values<N>(values, sparse.width, sparse.positions, begin, first * kWindow, &sum);
    add_values<N>(sums, sparse.width, nullptr, first, last, &sum);
    begin = last * kWindow;
  }
  add_values<N>(values, sparse.width, sparse.positions, begin, end, &sum);
  return sum;
}

// norms: of each block, written where kPass computes them. made_step_size: read where kPass uses it.
// Bounds of so many blocks at a time: for more, the compiler would spill registers.
template <typename T, typename G, Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    update_rows(const __grid_constant__ SparseUpdate sparse, const __grid_constant__ StepSource source, Norms* norms,
                const double* made_step_size) {
  using S = typename StateOf<T>::type;
  const Step step = source.get();
  const Formula<S> formula(step);
  const S decay = S(sparse.t.weight_decay ? step.weight_decay : 0.0);
  const S step_size = S(kPass == Pass::kApply ? *made_step_size : 1.0);
  Norms norm = {0, 0};
  const Group group(sparse);
  const int64_t units = sparse.units();
  for (int64_t number = group.number; number < units; number += group.count) {
    const Unit unit(sparse, number);
    int64_t row, begin;
    if (sparse.first != nullptr) {  // exact: a unit is of a row, which need not be named
      row = unit.of;
      begin = sparse.first[row];
    } else {  // lazy: of a position in the sorted keys
      if (!begins_row(sparse, unit.of)) continue;
      row = int64_t(sparse.keys[unit.of]);
      begin = unit.of;
    }
    const int64_t end = kPass != Pass::kApply ? end_of(sparse, begin, row) : begin;
    const auto take = [&](auto many) {
      constexpr int kMany = decltype(many)::value;
#pragma unroll 1
      for (int i = group.lane * kMany; i < unit.columns; i += sparse.threads_per_span * kMany) {
        const int64_t column = unit.begin + i;
        Pack<S, kMany> gradient = {};
        if constexpr (kPass != Pass::kApply) gradient = sum_values<kMany, S, G>(sparse, begin, end, column);
        const Arrays<T, S, S> arrays(sparse.t, gradient.x, step, row * sparse.width + column);
        advance<kPass, kSquaredGradient, kAmsgrad, kRounding, kMany>(formula, decay, step_size, arrays, 0, &norm);
      }
    };
    if (sparse.packed)
      take(std::integral_constant<int, 16 / sizeof(S)>());
    else
      take(std::integral_constant<int, 1>());
  }
  if constexpr (kPass == Pass::kNorms) {
    norm = block_sum(norm);
    if (threadIdx.x == 0) norms[blockIdx.x] = norm;
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

int64_t width_of(const Parameter& t, int64_t rows) { return rows > 0 ? t.size / rows : 0; }

// Where things are in the scratch: each at a multiple of 16 bytes.
struct Scratch {
  uint64_t *keys, *sorted_keys;
  int32_t *positions, *sorted_positions, *first;
  void* window_sums;
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

  Scratch(void* base, int64_t rows, int64_t width, int64_t count, bool exact) : sorting(nullptr), bytes(0) {
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
    window_sums = take(count / kWindow * width * int64_t(sizeof(double)));
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

int64_t tfav_gpu_sparse_scratch(const Parameter* t, int64_t rows, int64_t ids, int exact) {
  return Scratch(nullptr, rows, width_of(*t, rows), ids, exact != 0).bytes;
}

int tfav_gpu_sparse(const Parameter* t, int64_t rows, const void* ids, int64_t count, int ids_are_int64, int exact,
                    const GpuLaunch* launch) {
  if (t->size == 0) return cudaSuccess;
  if (count > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t width = width_of(*t, rows);
  Scratch scratch(launch->scratch, rows, width, count, exact != 0);
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
  SparseUpdate sparse = {};
  sparse.t = *t;
  sparse.rows = rows;
  sparse.width = width;
  sparse.count = count;
  sparse.keys = scratch.sorted_keys;
  sparse.positions = scratch.sorted_positions;
  sparse.first = scratch.first;
  sparse.window_sums = scratch.window_sums;
  if (exact != 0) {
    const size_t bytes = size_t(rows) * sizeof *scratch.first;
    TFAV_RETURN_ERROR(cudaMemsetAsync(scratch.first, 0, bytes, static_cast<cudaStream_t>(stream)));
    TFAV_RETURN_ERROR(launch_kernel(find_rows, blocks_for(count), stream, sparse));
  }
  const StepSource source(*launch);
  return with_types(launch->kind.variable, launch->kind.gradient, [&](auto* w, auto* g) -> cudaError_t {
    using T = std::remove_pointer_t<decltype(w)>;
    using G = std::remove_pointer_t<decltype(g)>;
    using S = typename StateOf<T>::type;
    constexpr int kPack = 16 / sizeof(S);
    sparse.cut(width % kPack == 0 && aligned(*t) ? kPack : 1);
    TFAV_RETURN_ERROR(launch_kernel(
        sum_windows<S, G>, blocks_for(count / kWindow * sparse.spans * sparse.threads_per_span), stream, sparse));
    const int64_t blocks = blocks_for(sparse.units() * sparse.threads_per_span);
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
