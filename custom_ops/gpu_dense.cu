// The step of many variables on a GPU. Each variable is cut into chunks, a block updates one chunk, and a launch
// updates the chunks of a batch of variables. Their addresses are in the parameters of the kernel: nothing is copied to
// the device before a launch, and nothing waits.

#include <thread>

#include "gpu_blocks.h"

namespace tfav {
namespace {

#ifndef TFAV_CHUNK
#define TFAV_CHUNK 4096
#endif
constexpr int kChunk = TFAV_CHUNK;  // elements per block
static_assert(kChunk % 8 == 0, "chunks begin at multiples of 16 bytes");

// Variables per launch. The parameters of a kernel may have 4,096 bytes, or 32,764 where both the compiler and the
// driver are of CUDA 12.1 or later.
#ifdef TFAV_BATCH
constexpr int kLargeBatch = TFAV_BATCH, kSmallBatch = TFAV_SMALL_BATCH;
#else
constexpr int kLargeBatch = 448, kSmallBatch = 52;
#endif

// Calls f with the size of a batch as a type. Kernels compiled by CUDA 13 need its driver, so they have only one size.
template <typename F>
auto dispatch_batch_size(const F& f) {
#if CUDART_VERSION < 12010
  return f(std::integral_constant<int, kSmallBatch>());
#else
#if CUDART_VERSION < 13000
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver < 12010) {
    return f(std::integral_constant<int, kSmallBatch>());
  }
#endif
  return f(std::integral_constant<int, kLargeBatch>());
#endif
}

int64_t count_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

template <int kBatch>
struct Batch {
  VariableState variables[kBatch];
  uint32_t first_chunk[kBatch + 1];  // of each variable; the last one is the number of all chunks
  int count;

  int64_t chunks() const { return first_chunk[count]; }

  // The number of chunks of the largest variable.
  int64_t max_chunks() const {
    uint32_t result = 0;
    for (int i = 0; i < count; ++i) {
      const uint32_t chunks = first_chunk[i + 1] - first_chunk[i];
      result = chunks > result ? chunks : result;
    }
    return result;
  }

  // The index of the variable that a chunk is part of, by bisection.
  __device__ __forceinline__ int find_variable(uint32_t chunk) const {
    int low = 0, high = count;  // first_chunk[low] <= chunk < first_chunk[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};
static_assert(sizeof(Batch<kSmallBatch>) + sizeof(CoefficientsSource) + 64 <= 4096, "parameters of a kernel");
static_assert(sizeof(Batch<kLargeBatch>) + sizeof(CoefficientsSource) + 64 <= 32764, "parameters of a kernel");

// Calls f with each batch of variables.
template <int kBatch, typename F>
cudaError_t for_each_batch(const VariableState* variables, int64_t count, const F& f) {
  Batch<kBatch> batch;
  for (int64_t i = 0; i < count;) {
    int64_t chunks = 0;
    for (batch.count = 0; i < count && batch.count < kBatch; ++i) {
      const int64_t more = count_chunks(variables[i].size);
      if (more == 0) continue;
      if (chunks + more > INT32_MAX) break;
      batch.variables[batch.count] = variables[i];
      batch.first_chunk[batch.count++] = uint32_t(chunks);
      chunks += more;
    }
    if (batch.count == 0 && i < count) return cudaErrorInvalidValue;  // more than 2^31 chunks
    batch.first_chunk[batch.count] = uint32_t(chunks);
    if (batch.count > 0) {
      if (const cudaError_t error = f(batch)) return error;
    }
  }
  return cudaSuccess;
}

// The part of a variable that a block updates: elements [begin, begin + size).
struct Chunk {
  int variable, size;
  int64_t begin;

  template <int kBatch>
  __device__ __forceinline__ Chunk(const Batch<kBatch>& batch, uint32_t chunk)
      : variable(batch.find_variable(chunk)), begin(int64_t(chunk - batch.first_chunk[variable]) * kChunk) {
    const int64_t left = batch.variables[variable].size - begin;
    size = left < kChunk ? int(left) : kChunk;
  }
};

// norms: one per chunk, written if kPass is kNorms. step_sizes: one per variable, read if kPass is kApply.
template <typename T, typename G, Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, int kBatch>
__global__ void __launch_bounds__(kThreads)
    update_chunks(const __grid_constant__ Batch<kBatch> batch, const __grid_constant__ CoefficientsSource source,
                  Norms* norms, const double* step_sizes) {
  using S = typename SlotType<T>::type;
  constexpr int kPack = 16 / sizeof(S);
  // The second pass begins with the chunks that the first pass updated last: the cache may still hold them.
  const uint32_t block = kPass == Pass::kApply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const Chunk chunk(batch, block);
  const VariableState& state = batch.variables[chunk.variable];
  const Coefficients c = source.get();
  const Formula<S> formula(c);
  const S decay = S(state.weight_decay ? c.weight_decay : 0.0);
  const S step_size = S(kPass == Pass::kApply ? step_sizes[chunk.variable] : 1.0);
  const G* const g = kPass != Pass::kApply ? reinterpret_cast<const G*>(state.g) + chunk.begin : nullptr;
  const Arrays<T, S, G> arrays(state, g, c, chunk.begin);
  Norms sum = {0, 0};
  const int packed = is_aligned(state) ? chunk.size / kPack * kPack : 0;
  const auto update = [&](auto pack, int i) {
    update_elements<kPass, kSquaredGradient, kAmsgrad, kRounding, pack>(formula, decay, step_size, arrays, i, &sum);
  };
  // The packs of many threads are in flight at once; to unroll, for several per thread, would only cost registers.
#pragma unroll 1
  for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) update(std::integral_constant<int, kPack>(), i);
#pragma unroll 1
  for (int i = packed + threadIdx.x; i < chunk.size; i += kThreads) update(std::integral_constant<int, 1>(), i);
  if constexpr (kPass == Pass::kNorms) {
    sum = sum_block(sum);
    if (threadIdx.x == 0) norms[block] = sum;
  }
}

// A large variable has many chunks, each with its norms. There, blocks first sum groups of norms, one norm per thread,
// and then one block sums the groups. The sizes alone decide the groups, so a step is bit-exact each time.
constexpr int kGroup = kThreads;
constexpr int64_t kManyChunks = 16 * kGroup;  // for fewer, the launch costs more time than it saves

__global__ void __launch_bounds__(kThreads) sum_groups(const Norms* norms, Norms* groups) {
  const Norms sum = sum_parts(norms + int64_t(blockIdx.x) * kGroup, kGroup);
  if (threadIdx.x == 0) groups[blockIdx.x] = sum;
}

cudaError_t launch_sum_groups(const Norms* norms, int64_t count, Norms* groups, void* stream) {
  return launch_kernel(sum_groups, count / kGroup, stream, norms, groups);
}

// The sum of norms [begin, end) by one block; thread 0 gets it. groups: null, or the sums of the groups.
__device__ __forceinline__ Norms sum_norms(const Norms* norms, const Norms* groups, int64_t begin, int64_t end) {
  const int64_t first = (begin + kGroup - 1) / kGroup, last = end / kGroup;  // whole groups in between
  Norms mine = {0, 0};
  if (groups != nullptr && first < last) {
    add_parts(norms, begin, first * kGroup, &mine);
    add_parts(groups, first, last, &mine);
    begin = last * kGroup;
  }
  add_parts(norms, begin, end, &mine);
  return sum_block(mine);
}

// LAMB: the step size of each variable, learning_rate times the trust ratio. One block per variable.
template <int kBatch>
__global__ void __launch_bounds__(kThreads)
    compute_step_sizes(const __grid_constant__ Batch<kBatch> batch, const __grid_constant__ CoefficientsSource source,
                       const Norms* norms, const Norms* groups, double* step_sizes) {
  const int variable = blockIdx.x;
  const Norms sum = sum_norms(norms, groups, batch.first_chunk[variable], batch.first_chunk[variable + 1]);
  if (threadIdx.x == 0) {
    const Coefficients c = source.get();
    step_sizes[variable] = c.learning_rate * (batch.variables[variable].layer_adaptation ? trust_ratio(sum, c) : 1.0);
  }
}

template <typename G, int kBatch>
__global__ void __launch_bounds__(kThreads) sum_squares(const __grid_constant__ Batch<kBatch> batch, Norms* norms) {
  constexpr int kPack = 16 / sizeof(G);
  const Chunk chunk(batch, blockIdx.x);
  const G* const g = reinterpret_cast<const G*>(batch.variables[chunk.variable].g) + chunk.begin;
  Norms sum = {0, 0};
  const auto add = [&](G x) { sum.u += double(to_float(x)) * double(to_float(x)); };
  const int packed = reinterpret_cast<uintptr_t>(g) % 16 == 0 ? chunk.size / kPack * kPack : 0;
  for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) {
    const Pack<G, kPack> pack = load<kPack>(g + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k) add(pack.x[k]);
  }
  for (int i = packed + threadIdx.x; i < chunk.size; i += kThreads) add(g[i]);
  sum = sum_block(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_all(const Norms* norms, const Norms* groups, int64_t count, double* result) {
  const Norms sum = sum_norms(norms, groups, 0, count);
  if (threadIdx.x == 0) *result = sum.u;
}

template <typename T, typename G, Rounding kRounding, int kBatch>
cudaError_t launch_adam(const Batch<kBatch>& batch, const GpuLaunch& launch, const CoefficientsSource& source) {
  constexpr Pass kPass = Pass::kAdam;
  const auto kernel = launch.config.squared_gradient
                          ? (launch.config.amsgrad ? update_chunks<T, G, kPass, true, true, kRounding, kBatch>
                                                   : update_chunks<T, G, kPass, true, false, kRounding, kBatch>)
                          : (launch.config.amsgrad ? update_chunks<T, G, kPass, false, true, kRounding, kBatch>
                                                   : update_chunks<T, G, kPass, false, false, kRounding, kBatch>);
  return launch_kernel(kernel, batch.chunks(), launch.stream, batch, source, nullptr, nullptr);
}

// The scratch of LAMB: a step size per variable of a batch, then the norms of the chunks and of their groups.
template <int kBatch>
int64_t lamb_scratch_bytes(int64_t chunks) {
  return kBatch * int64_t(sizeof(double)) + (chunks + chunks / kGroup) * int64_t(sizeof(Norms));
}

template <typename T, typename G, Rounding kRounding, int kBatch>
cudaError_t launch_lamb(const Batch<kBatch>& batch, const GpuLaunch& launch, const CoefficientsSource& source) {
  double* const step_sizes = static_cast<double*>(launch.scratch);
  Norms* const norms = reinterpret_cast<Norms*>(step_sizes + kBatch);
  Norms* const groups = batch.max_chunks() >= kManyChunks ? norms + batch.chunks() : nullptr;
  TFAV_RETURN_ERROR(launch_kernel(update_chunks<T, G, Pass::kNorms, false, false, read_rounding(kRounding), kBatch>,
                                  batch.chunks(), launch.stream, batch, source, norms, nullptr));
  if (groups != nullptr) {
    TFAV_RETURN_ERROR(launch_sum_groups(norms, batch.chunks(), groups, launch.stream));
  }
  TFAV_RETURN_ERROR(
      launch_kernel(compute_step_sizes<kBatch>, batch.count, launch.stream, batch, source, norms, groups, step_sizes));
  // This pass reads no gradient, so the type of the gradient does not matter.
  return launch_kernel(update_chunks<T, T, Pass::kApply, false, false, kRounding, kBatch>, batch.chunks(),
                       launch.stream, batch, source, nullptr, step_sizes);
}

}  // namespace
}  // namespace tfav

using namespace tfav;

int64_t tfav_gpu_dense_scratch(const VariableState* variables, int64_t count, const GpuLaunch* launch) {
  if (!launch->config.trust_ratio) return 0;
  return dispatch_batch_size([&](auto size) {
    int64_t max_chunks = 0;
    for_each_batch<size>(variables, count, [&](const auto& batch) {
      max_chunks = batch.chunks() > max_chunks ? batch.chunks() : max_chunks;
      return cudaSuccess;
    });
    return max_chunks == 0 ? 0 : lamb_scratch_bytes<size>(max_chunks);
  });
}

int tfav_gpu_dense(const VariableState* variables, int64_t count, const GpuLaunch* launch) {
  if (launch->scratch_bytes < tfav_gpu_dense_scratch(variables, count, launch)) return cudaErrorInvalidValue;
  const CoefficientsSource source(*launch);
  return dispatch_dtypes(launch->config.variable, launch->config.gradient, [&](auto variable, auto gradient) {
    using T = typename decltype(variable)::type;
    using G = typename decltype(gradient)::type;
    return dispatch_rounding<T>(launch->config.rounding, [&](auto rounding) {
      return dispatch_batch_size([&](auto size) {
        return for_each_batch<size>(variables, count, [&](const auto& batch) {
          return launch->config.trust_ratio ? launch_lamb<T, G, rounding>(batch, *launch, source)
                                            : launch_adam<T, G, rounding>(batch, *launch, source);
        });
      });
    });
  });
}

int64_t tfav_gpu_squared_norm_scratch(const VariableState* variables, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += count_chunks(variables[i].size);
  return (chunks + chunks / kGroup) * int64_t(sizeof(Norms));
}

int tfav_gpu_squared_norm(const VariableState* variables, int64_t count, double* sum, const GpuLaunch* launch) {
  if (launch->scratch_bytes < tfav_gpu_squared_norm_scratch(variables, count)) return cudaErrorInvalidValue;
  Norms* const norms = static_cast<Norms*>(launch->scratch);
  int64_t chunks = 0;
  TFAV_RETURN_ERROR(dispatch_dtypes(launch->config.gradient, launch->config.gradient, [&](auto gradient, auto) {
    using G = typename decltype(gradient)::type;
    return dispatch_batch_size([&](auto size) {
      return for_each_batch<size>(variables, count, [&](const auto& batch) {
        Norms* const batch_norms = norms + chunks;
        chunks += batch.chunks();
        return launch_kernel(sum_squares<G, size>, batch.chunks(), launch->stream, batch, batch_norms);
      });
    });
  }));
  Norms* const groups = chunks >= kManyChunks ? norms + chunks : nullptr;
  if (groups != nullptr) {
    TFAV_RETURN_ERROR(launch_sum_groups(norms, chunks, groups, launch->stream));
  }
  return launch_kernel(sum_all, 1, launch->stream, norms, groups, chunks, sum);
}

int tfav_gpu_copy(void* to, const void* from, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
}

int tfav_gpu_ready(int device) {
  cudaError_t error = cudaSuccess;
  std::thread([&] {  // the current device is per thread: that of the caller does not change
    cudaFuncAttributes attributes;
    error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, sum_all);
  })
      .join();
  return error;
}

const char* tfav_gpu_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
