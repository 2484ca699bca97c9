// The step of one variable with a sparse gradient on a GPU. The indices are sorted, so that equal ones are neighbours,
// in their original order. Then a group of threads sums the gradients of a span of a row and updates the span. No dense
// gradient is ever in memory.

#include <cub/device/device_radix_sort.cuh>

#include "gpu_blocks.h"

namespace tfav {
namespace {

#ifndef TFAV_MAX_BLOCKS
#define TFAV_MAX_BLOCKS 4096
#endif
constexpr int64_t kMaxBlocks = TFAV_MAX_BLOCKS;  // per launch; with more tasks than groups, each group runs several

int64_t blocks_for(int64_t threads) {
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  return wanted < kMaxBlocks ? wanted : kMaxBlocks;
}

#ifndef TFAV_SPAN
#define TFAV_SPAN 2048
#endif
constexpr int kSpan = TFAV_SPAN;  // maximum number of columns in a span of a row
static_assert(kSpan % 4 == 0, "a span consists of packs");

// An index may repeat a hundred thousand times, for example that of padding, and one group of threads would need
// milliseconds to sum its values. So a separate group first sums each window of this many sorted indices, if all of
// them are equal; the group of the row then adds the sums of the windows to the values before and behind them.
#ifndef TFAV_WINDOW
#define TFAV_WINDOW 128
#endif
constexpr int kWindow = TFAV_WINDOW;

// All that a kernel needs to know of the variable and of the indices.
struct SparseUpdate {
  VariableState state;  // g has one row per index
  int64_t rows, width, count;
  const uint64_t* keys;      // the indices, sorted; `rows` for those outside [0, rows)
  const int32_t* positions;  // the position of each key among the indices
  int32_t* first_key;        // exact: for each row, the position of its first key; arbitrary where it has none
  void* window_sums;         // of each window with equal keys, in the type of the slots
  int64_t spans;             // per row
  int span;                  // columns per span; the last span may have fewer
  int threads_per_span;      // size of the group that updates a span
  bool packed;               // whether threads access packs: 16 bytes of the slots at once

  __host__ __device__ __forceinline__ int64_t tasks() const { return (first_key != nullptr ? rows : count) * spans; }

  // Cuts the rows into spans of sizes as equal as possible.
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

// The groups of a launch: their number, the index of the group of this thread, and the index of the thread in it.
struct Group {
  int64_t count, index;
  int lane;

  __device__ __forceinline__ explicit Group(const SparseUpdate& sparse)
      : count(int64_t(gridDim.x) * (kThreads / sparse.threads_per_span)),
        index(int64_t(blockIdx.x) * (kThreads / sparse.threads_per_span) + threadIdx.x / sparse.threads_per_span),
        lane(threadIdx.x % sparse.threads_per_span) {}
};

// The work of a group at one time: columns [begin, begin + columns) of an item, which is a row, a key or a window.
struct Task {
  int64_t item, begin;
  int columns;

  __device__ __forceinline__ Task(const SparseUpdate& sparse, int64_t number) : item(number), begin(0) {
    if (sparse.spans > 1) {
      item = number / sparse.spans;
      begin = (number - item * sparse.spans) * sparse.span;
    }
    const int64_t left = sparse.width - begin;
    columns = left < sparse.span ? int(left) : sparse.span;
  }
};

template <typename I>
__global__ void __launch_bounds__(kThreads)
    init_keys(const I* indices, int64_t count, int64_t rows, uint64_t* keys, int32_t* positions) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    keys[i] = indices[i] >= 0 && indices[i] < rows ? uint64_t(indices[i]) : uint64_t(rows);
    positions[i] = int32_t(i);
  }
}

__device__ __forceinline__ bool is_first_of_row(const SparseUpdate& sparse, int64_t i) {
  return sparse.keys[i] < uint64_t(sparse.rows) && (i == 0 || sparse.keys[i - 1] != sparse.keys[i]);
}

// The end of the keys of a row, which begin at `begin` if there are any. The search doubles its steps, since most rows
// have one key and some have many.
__device__ __forceinline__ int64_t find_end(const SparseUpdate& sparse, int64_t begin, int64_t row) {
  const auto matches = [&](int64_t i) { return i < sparse.count && sparse.keys[i] == uint64_t(row); };
  if (!matches(begin)) return begin;
  int64_t last = begin, step = 1;  // last: the last key known to match
  for (; matches(last + step); step *= 2) last += step;
  for (; step > 0; step /= 2) {
    if (matches(last + step)) last += step;
  }
  return last + 1;
}

__global__ void __launch_bounds__(kThreads) find_first_keys(const __grid_constant__ SparseUpdate sparse) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < sparse.count; i += int64_t(gridDim.x) * kThreads) {
    if (is_first_of_row(sparse, i)) sparse.first_key[sparse.keys[i]] = int32_t(i);
  }
}

// Adds values [begin, end) of N columns to a sum, in their order. positions: the rows of `values` that they are; null
// for consecutive rows.
template <int N, typename S, typename X>
__device__ __forceinline__ void add_values(const X* values, int64_t width, const int32_t* positions, int64_t begin,
                                           int64_t end, Pack<S, N>* sum) {
#pragma unroll 4  // loads of several values are in flight at once
  for (int64_t i = begin; i < end; ++i) {
    const Pack<X, N> pack = load<N>(values + (positions != nullptr ? positions[i] : i) * width);
#pragma unroll
    for (int k = 0; k < N; ++k) sum->x[k] += S(to_float(pack.x[k]));
  }
}

template <typename S, typename G>
__global__ void __launch_bounds__(kThreads) sum_windows(const __grid_constant__ SparseUpdate sparse) {
  const Group group(sparse);
  const int64_t tasks = sparse.count / kWindow * sparse.spans;
  for (int64_t number = group.index; number < tasks; number += group.count) {
    const Task task(sparse, number);
    const int64_t begin = task.item * kWindow, end = begin + kWindow;
    if (sparse.keys[begin] != sparse.keys[end - 1] || sparse.keys[begin] >= uint64_t(sparse.rows)) continue;
    const G* const values = reinterpret_cast<const G*>(sparse.state.g) + task.begin;
    S* const sums = static_cast<S*>(sparse.window_sums) + task.item * sparse.width + task.begin;
    const auto sum_columns = [&](auto pack) {
      constexpr int kPack = decltype(pack)::value;
      for (int i = group.lane * kPack; i < task.columns; i += sparse.threads_per_span * kPack) {
        Pack<S, kPack> sum = {};
        add_values<kPack>(values + i, sparse.width, sparse.positions, begin, end, &sum);
        store<kPack>(sum, sums + i);
      }
    };
    if (sparse.packed)
      sum_columns(std::integral_constant<int, 16 / sizeof(S)>());
    else
      sum_columns(std::integral_constant<int, 1>());
  }
}

// The sum of the values of keys [begin, end), which are equal, in columns [column, column + N).
template <int N, typename S, typename G>
__device__ __forceinline__ Pack<S, N> sum_values(const SparseUpdate& sparse, int64_t begin, int64_t end,
                                                 int64_t column) {
  const G* const values = reinterpret_cast<const G*>(sparse.state.g) + column;
  const S* const sums = static_cast<const S*>(sparse.window_sums) + column;
  const int64_t first = (begin + kWindow - 1) / kWindow, last = end / kWindow;  // whole windows in between
  Pack<S, N> sum = {};
  if (first < last) {
    add_values<N>(values, sparse.width, sparse.positions, begin, first * kWindow, &sum);
    add_values<N>(sums, sparse.width, nullptr, first, last, &sum);
    begin = last * kWindow;
  }
  add_values<N>(values, sparse.width, sparse.positions, begin, end, &sum);
  return sum;
}

// norms: one per block, written if kPass is kNorms. lamb_step_size: read if kPass is kApply. The launch bounds ask for
// so many blocks at a time: for more, the compiler would spill registers.
template <typename T, typename G, Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    update_rows(const __grid_constant__ SparseUpdate sparse, const __grid_constant__ CoefficientsSource source,
                Norms* norms, const double* lamb_step_size) {
  using S = typename SlotType<T>::type;
  const Coefficients c = source.get();
  const Formula<S> formula(c);
  const S decay = S(sparse.state.weight_decay ? c.weight_decay : 0.0);
  const S step_size = S(kPass == Pass::kApply ? *lamb_step_size : 1.0);
  Norms norm = {0, 0};
  const Group group(sparse);
  const int64_t tasks = sparse.tasks();
  for (int64_t number = group.index; number < tasks; number += group.count) {
    const Task task(sparse, number);
    int64_t row, begin;
    if (sparse.first_key != nullptr) {  // exact: the item is a row, which may have no key
      row = task.item;
      begin = sparse.first_key[row];
    } else {  // lazy: the item is a key, and the first key of each row updates it
      if (!is_first_of_row(sparse, task.item)) continue;
      row = int64_t(sparse.keys[task.item]);
      begin = task.item;
    }
    const int64_t end = kPass != Pass::kApply ? find_end(sparse, begin, row) : begin;
    const auto update_columns = [&](auto pack) {
      constexpr int kPack = decltype(pack)::value;
#pragma unroll 1
      for (int i = group.lane * kPack; i < task.columns; i += sparse.threads_per_span * kPack) {
        const int64_t column = task.begin + i;
        Pack<S, kPack> gradient = {};
        if constexpr (kPass != Pass::kApply) gradient = sum_values<kPack, S, G>(sparse, begin, end, column);
        const Arrays<T, S, S> arrays(sparse.state, gradient.x, c, row * sparse.width + column);
        update_elements<kPass, kSquaredGradient, kAmsgrad, kRounding, kPack>(formula, decay, step_size, arrays, 0,
                                                                             &norm);
      }
    };
    if (sparse.packed)
      update_columns(std::integral_constant<int, 16 / sizeof(S)>());
    else
      update_columns(std::integral_constant<int, 1>());
  }
  if constexpr (kPass == Pass::kNorms) {
    norm = sum_block(norm);
    if (threadIdx.x == 0) norms[blockIdx.x] = norm;
  }
}

__global__ void __launch_bounds__(kThreads)
    compute_step_size(const __grid_constant__ CoefficientsSource source, bool layer_adaptation, const Norms* norms,
                      int64_t count, double* step_size) {
  const Norms sum = sum_parts(norms, count);
  if (threadIdx.x == 0) {
    const Coefficients c = source.get();
    *step_size = c.learning_rate * (layer_adaptation ? trust_ratio(sum, c) : 1.0);
  }
}

int64_t row_width(const VariableState& state, int64_t rows) { return rows > 0 ? state.size / rows : 0; }

// The parts of the scratch memory, each at a multiple of 16 bytes.
struct Scratch {
  uint64_t *keys, *sorted_keys;
  int32_t *positions, *sorted_positions, *first_key;
  void* window_sums;
  Norms* norms;
  double* step_size;
  void* sort_workspace;
  size_t sort_workspace_bytes;
  int64_t bytes;

  // The number of bits of the keys to sort by: those of `rows`, the largest key.
  static int key_bits(int64_t rows) {
    int bits = 1;
    while (rows >> bits != 0) ++bits;
    return bits;
  }

  cudaError_t sort(int64_t rows, int64_t count, void* stream) {
    return cub::DeviceRadixSort::SortPairs(sort_workspace, sort_workspace_bytes, keys, sorted_keys, positions,
                                           sorted_positions, int(count), 0, key_bits(rows),
                                           static_cast<cudaStream_t>(stream));
  }

  Scratch(void* base, int64_t rows, int64_t width, int64_t count, bool exact) : sort_workspace(nullptr), bytes(0) {
    const auto reserve = [&](int64_t size) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(base) + bytes;  // base is null if only the size is wanted
      bytes += (size + 15) / 16 * 16;
      return reinterpret_cast<void*>(address);
    };
    keys = static_cast<uint64_t*>(reserve(count * 8));
    sorted_keys = static_cast<uint64_t*>(reserve(count * 8));
    positions = static_cast<int32_t*>(reserve(count * 4));
    sorted_positions = static_cast<int32_t*>(reserve(count * 4));
    first_key = exact ? static_cast<int32_t*>(reserve(rows * 4)) : nullptr;
    window_sums = reserve(count / kWindow * width * int64_t(sizeof(double)));
    norms = static_cast<Norms*>(reserve(kMaxBlocks * int64_t(sizeof(Norms))));
    step_size = static_cast<double*>(reserve(8));
    sort_workspace_bytes = 0;
    sort(rows, count, nullptr);  // without a workspace it only sets sort_workspace_bytes
    sort_workspace = reserve(int64_t(sort_workspace_bytes));
  }
};

}  // namespace
}  // namespace tfav

using namespace tfav;

int64_t tfav_gpu_sparse_scratch(const VariableState* state, int64_t rows, int64_t indices, int exact) {
  return Scratch(nullptr, rows, row_width(*state, rows), indices, exact != 0).bytes;
}

int tfav_gpu_sparse(const VariableState* state, int64_t rows, const void* indices, int64_t count, int indices_are_int64,
                    int exact, const GpuLaunch* launch) {
  if (state->size == 0) return cudaSuccess;
  if (count > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t width = row_width(*state, rows);
  Scratch scratch(launch->scratch, rows, width, count, exact != 0);
  if (launch->scratch_bytes < scratch.bytes) return cudaErrorInvalidValue;
  void* const stream = launch->stream;
  if (count > 0) {
    if (indices_are_int64 != 0) {
      TFAV_RETURN_ERROR(launch_kernel(init_keys<int64_t>, blocks_for(count), stream,
                                      static_cast<const int64_t*>(indices), count, rows, scratch.keys,
                                      scratch.positions));
    } else {
      TFAV_RETURN_ERROR(launch_kernel(init_keys<int32_t>, blocks_for(count), stream,
                                      static_cast<const int32_t*>(indices), count, rows, scratch.keys,
                                      scratch.positions));
    }
    TFAV_RETURN_ERROR(scratch.sort(rows, count, stream));
  }
  SparseUpdate sparse = {};
  sparse.state = *state;
  sparse.rows = rows;
  sparse.width = width;
  sparse.count = count;
  sparse.keys = scratch.sorted_keys;
  sparse.positions = scratch.sorted_positions;
  sparse.first_key = scratch.first_key;
  sparse.window_sums = scratch.window_sums;
  if (exact != 0) {
    const size_t bytes = size_t(rows) * sizeof *scratch.first_key;
    TFAV_RETURN_ERROR(cudaMemsetAsync(scratch.first_key, 0, bytes, static_cast<cudaStream_t>(stream)));
    TFAV_RETURN_ERROR(launch_kernel(find_first_keys, blocks_for(count), stream, sparse));
  }
  const CoefficientsSource source(*launch);
  return dispatch_dtypes(
      launch->config.variable, launch->config.gradient, [&](auto variable, auto gradient) -> cudaError_t {
        using T = typename decltype(variable)::type;
        using G = typename decltype(gradient)::type;
        using S = typename SlotType<T>::type;
        constexpr int kPack = 16 / sizeof(S);
        sparse.cut(width % kPack == 0 && is_aligned(*state) ? kPack : 1);
        TFAV_RETURN_ERROR(launch_kernel(
            sum_windows<S, G>, blocks_for(count / kWindow * sparse.spans * sparse.threads_per_span), stream, sparse));
        const int64_t blocks = blocks_for(sparse.tasks() * sparse.threads_per_span);
        return dispatch_rounding<T>(launch->config.rounding, [&](auto rounding) -> cudaError_t {
          if (!launch->config.trust_ratio) {
            const auto kernel = launch->config.squared_gradient
                                    ? (launch->config.amsgrad ? update_rows<T, G, Pass::kAdam, true, true, rounding>
                                                              : update_rows<T, G, Pass::kAdam, true, false, rounding>)
                                    : (launch->config.amsgrad ? update_rows<T, G, Pass::kAdam, false, true, rounding>
                                                              : update_rows<T, G, Pass::kAdam, false, false, rounding>);
            return launch_kernel(kernel, blocks, stream, sparse, source, nullptr, nullptr);
          }
          TFAV_RETURN_ERROR(launch_kernel(update_rows<T, G, Pass::kNorms, false, false, read_rounding(rounding)>,
                                          blocks, stream, sparse, source, scratch.norms, nullptr));
          TFAV_RETURN_ERROR(launch_kernel(compute_step_size, 1, stream, source, state->layer_adaptation, scratch.norms,
                                          blocks, scratch.step_size));
          return launch_kernel(update_rows<T, T, Pass::kApply, false, false, rounding>, blocks, stream, sparse, source,
                               nullptr, scratch.step_size);
        });
      });
}
