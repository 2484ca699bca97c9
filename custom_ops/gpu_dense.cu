// The step of many variables on a GPU. Each variable is cut into chunks, a block takes one chunk, and a launch takes
// the chunks of a batch of variables, whose addresses are in the kernel's parameters: nothing is copied to the device
// before it, and nothing waits.

#include <thread>

#include "gpu_blocks.h"

namespace tfav {
namespace {

#ifndef TFAV_CHUNK
#define TFAV_CHUNK 4096
#endif
constexpr int kChunk = TFAV_CHUNK;  // elements of a block
static_assert(kChunk % 8 == 0, "chunks begin where 16 bytes begin");

// Variables of one launch. A kernel's parameters may be 4,096 bytes, and 32,764 where both the compiler and the driver
// are of CUDA 12.1 or later.
#ifdef TFAV_BATCH
constexpr int kLargeBatch = TFAV_BATCH, kSmallBatch = TFAV_SMALL_BATCH;
#else
constexpr int kLargeBatch = 448, kSmallBatch = 52;
#endif

// Calls f with the size of a batch as a type. What CUDA 13 compiles runs on no driver before it, and has one size.
template <typename F>
auto with_batches(const F& f) {
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

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

template <int kBatch>
struct Batch {
  Parameter variables[kBatch];
  uint32_t first[kBatch + 1];  // chunk of each variable; then how many chunks there are
  int count;

  int64_t chunks() const { return first[count]; }

  int64_t most_chunks() const {
    uint32_t most = 0;
    for (int i = 0; i < count; ++i) most = first[i + 1] - first[i] > most ? first[i + 1] - first[i] : most;
    return most;
  }

  // The variable that a chunk is of.
  __device__ __forceinline__ int owner(uint32_t chunk) const {
    int low = 0, high = count;  // first[low] <= chunk < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= chunk)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};
static_assert(sizeof(Batch<kSmallBatch>) + sizeof(StepSource) + 64 <= 4096, "parameters of a kernel");
static_assert(sizeof(Batch<kLargeBatch>) + sizeof(StepSource) + 64 <= 32764, "parameters of a kernel");

// Calls f with one batch of variables after the other.
template <int kBatch, typename F>
cudaError_t for_batches(const Parameter* variables, int64_t count, const F& f) {
  Batch<kBatch> batch;
  for (int64_t i = 0; i < count;) {
    int64_t chunks = 0;
    for (batch.count = 0; i < count && batch.count < kBatch; ++i) {
      const int64_t more = chunks_of(variables[i].size);
      if (more == 0) continue;
      if (chunks + more > INT32_MAX) break;
      batch.variables[batch.count] = variables[i];
      batch.first[batch.count++] = uint32_t(chunks);
      chunks += more;
    }
    if (batch.count == 0 && i < count) return cudaErrorInvalidValue;  // more than 2^31 chunks
    batch.first[batch.count] = uint32_t(chunks);
    if (batch.count > 0) {
      if (const cudaError_t error = f(batch)) return error;
    }
  }
  return cudaSuccess;
}

// A block's part of its variable: elements `begin` to begin + size.
struct Chunk {
  int variable, size;
  int64_t begin;

  template <int kBatch>
  __device__ __forceinline__ Chunk(const Batch<kBatch>& batch, uint32_t chunk)
      : variable(batch.owner(chunk)), begin(int64_t(chunk - batch.first[variable]) * kChunk) {
    const int64_t left = batch.variables[variable].size - begin;
    size = left < kChunk ? int(left) : kChunk;
  }
};

// norms: of each chunk, written where kPass computes them. step_sizes: of each variable, read where kPass uses them.
template <typename T, typename G, Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, int kBatch>
__global__ void __launch_bounds__(kThreads)
    elements(const __grid_constant__ Batch<kBatch> batch, const __grid_constant__ StepSource source, Norms* norms,
             const double* step_sizes) {
  using S = typename StateOf<T>::type;
  constexpr int kPack = 16 / sizeof(S);
  // The second pass begins with what the first one touched last, which may still be in the cache.
  const uint32_t block = kPass == Pass::kApply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const Chunk chunk(batch, block);
  const Parameter& t = batch.variables[chunk.variable];
  const Step step = source.get();
  const Formula<S> formula(step);
  const S decay = S(t.weight_decay ? step.weight_decay : 0.0);
  const S step_size = S(kPass == Pass::kApply ? step_sizes[chunk.variable] : 1.0);
  const G* const g = kPass != Pass::kApply ? reinterpret_cast<const G*>(t.g) + chunk.begin : nullptr;
  const Arrays<T, S, G> arrays(t, g, step, chunk.begin);
  Norms sum = {0, 0};
  const int packed = aligned(t) ? chunk.size / kPack * kPack : 0;
  const auto take = [&](auto many, int i) {
    advance<kPass, kSquaredGradient, kAmsgrad, kRounding, many>(formula, decay, step_size, arrays, i, &sum);
  };
  // The packs of many threads are in flight at once: several of one thread's would only take registers.
#pragma unroll 1
  for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) take(std::integral_constant<int, kPack>(), i);
#pragma unroll 1
  for (int i = packed + threadIdx.x; i < chunk.size; i += kThreads) take(std::integral_constant<int, 1>(), i);
  if constexpr (kPass == Pass::kNorms) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) norms[block] = sum;
  }
}

// Norms of chunks are many where a variable is large. There, blocks first add up groups of them, one for each thread,
// and then one block the groups. Sizes alone decide which, so that the bits are the same each time.
constexpr int kGroup = kThreads;
constexpr int64_t kManyChunks = 16 * kGroup;  // for fewer, a launch takes longer than it saves

__global__ void __launch_bounds__(kThreads) sum_groups(const Norms* norms, Norms* groups) {
  const Norms sum = sum_of(norms + int64_t(blockIdx.x) * kGroup, kGroup);
  if (threadIdx.x == 0) groups[blockIdx.x] = sum;
}

cudaError_t launch_groups(const Norms* norms, int64_t count, Norms* groups, void* stream) {
  return launch_kernel(sum_groups, count / kGroup, stream, norms, groups);
}

// The sum of norms `begin` to `end`, by one block; thread 0 has it. groups: null, or the sums of the groups.
__device__ __forceinline__ Norms sum_of(const Norms* norms, const Norms* groups, int64_t begin, int64_t end) {
  const int64_t first = (begin + kGroup - 1) / kGroup, last = end / kGroup;  // the groups in between
  Norms mine = {0, 0};
  if (groups != nullptr && first < last) {
    add_parts(norms, begin, first * kGroup, &mine);
    add_parts(groups, first, last, &mine);
    begin = last * kGroup;
  }
  add_parts(norms, begin, end, &mine);
  return block_sum(mine);
}

// LAMB: how far each variable moves along its u. A block takes one variable.
template <int kBatch>
__global__ void __launch_bounds__(kThreads)
    trust_ratios(const __grid_constant__ Batch<kBatch> batch, const __grid_constant__ StepSource source,
                 const Norms* norms, const Norms* groups, double* step_sizes) {
  const int variable = blockIdx.x;
  const Norms sum = sum_of(norms, groups, batch.first[variable], batch.first[variable + 1]);
  if (threadIdx.x == 0) {
    const Step step = source.get();
    step_sizes[variable] =
        step.learning_rate * (batch.variables[variable].layer_adaptation ? trust_ratio(sum, step) : 1.0);
  }
}

template <typename G, int kBatch>
__global__ void __launch_bounds__(kThreads) squares(const __grid_constant__ Batch<kBatch> batch, Norms* norms) {
  constexpr int kPack = 16 / sizeof(G);
  const Chunk chunk(batch, blockIdx.x);
  const G* const g = reinterpret_cast<const G*>(batch.variables[chunk.variable].g) + chunk.begin;
  Norms sum = {0, 0};
  const auto add = [&](G x) { sum.u += double(widened(x)) * double(widened(x)); };
  const int packed = reinterpret_cast<uintptr_t>(g) % 16 == 0 ? chunk.size / kPack * kPack : 0;
  for (int i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) {
    const Pack<G, kPack> pack = load<kPack>(g + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k) add(pack.x[k]);
  }
  for (int i = packed + threadIdx.x; i < chunk.size; i += kThreads) add(g[i]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) total(const Norms* norms, const Norms* groups, int64_t count, double* to) {
  const Norms sum = sum_of(norms, groups, 0, count);
  if (threadIdx.x == 0) *to = sum.u;
}

template <typename T, typename G, Rounding kRounding, int kBatch>
cudaError_t adam(const Batch<kBatch>& batch, const GpuLaunch& launch, const StepSource& source) {
  constexpr Pass kPass = Pass::kAdam;
  const auto kernel = launch.kind.squared_gradient
                          ? (launch.kind.amsgrad ? elements<T, G, kPass, true, true, kRounding, kBatch>
                                                 : elements<T, G, kPass, true, false, kRounding, kBatch>)
                          : (launch.kind.amsgrad ? elements<T, G, kPass, false, true, kRounding, kBatch>
                                                 : elements<T, G, kPass, false, false, kRounding, kBatch>);
  return launch_kernel(kernel, batch.chunks(), launch.stream, batch, source, nullptr, nullptr);
}

// LAMB's scratch: a step size for each variable of a batch, then the norms of the chunks and of their groups.
template <int kBatch>
int64_t lamb_scratch(int64_t chunks) {
  return kBatch * int64_t(sizeof(double)) + (chunks + chunks / kGroup) * int64_t(sizeof(Norms));
}

template <typename T, typename G, Rounding kRounding, int kBatch>
cudaError_t lamb(const Batch<kBatch>& batch, const GpuLaunch& launch, const StepSource& source) {
  double* const step_sizes = static_cast<double*>(launch.scratch);
  Norms* const norms = reinterpret_cast<Norms*>(step_sizes + kBatch);
  Norms* const groups = batch.most_chunks() >= kManyChunks ? norms + batch.chunks() : nullptr;
  TFAV_RETURN_ERROR(launch_kernel(elements<T, G, Pass::kNorms, false, false, when_read(kRounding), kBatch>,
                                  batch.chunks(), launch.stream, batch, source, norms, nullptr));
  if (groups != nullptr) {
    TFAV_RETURN_ERROR(launch_groups(norms, batch.chunks(), groups, launch.stream));
  }
  TFAV_RETURN_ERROR(
      launch_kernel(trust_ratios<kBatch>, batch.count, launch.stream, batch, source, norms, groups, step_sizes));
  // No gradient is read any more: its type does not matter.
  return launch_kernel(elements<T, T, Pass::kApply, false, false, kRounding, kBatch>, batch.chunks(), launch.stream,
                       batch, source, nullptr, step_sizes);
}

}  // namespace
}  // namespace tfav

using namespace tfav;

int64_t tfav_gpu_dense_scratch(const Parameter* variables, int64_t count, const GpuLaunch* launch) {
  if (!launch->kind.trust_ratio) return 0;
  return with_batches([&](auto size) {
    int64_t most = 0;
    for_batches<size>(variables, count, [&](const auto& batch) {
      most = batch.chunks() > most ? batch.chunks() : most;
      return cudaSuccess;
    });
    return most == 0 ? 0 : lamb_scratch<size>(most);
  });
}

int tfav_gpu_dense(const Parameter* variables, int64_t count, const GpuLaunch* launch) {
  if (launch->scratch_bytes < tfav_gpu_dense_scratch(variables, count, launch)) return cudaErrorInvalidValue;
  const StepSource source(*launch);
  return with_types(launch->kind.variable, launch->kind.gradient, [&](auto* w, auto* g) {
    using T = std::remove_pointer_t<decltype(w)>;
    using G = std::remove_pointer_t<decltype(g)>;
    return with_rounding<T>(launch->kind.rounding, [&](auto rounding) {
      return with_batches([&](auto size) {
        return for_batches<size>(variables, count, [&](const auto& batch) {
          return launch->kind.trust_ratio ? lamb<T, G, rounding>(batch, *launch, source)
                                          : adam<T, G, rounding>(batch, *launch, source);
        });
      });
    });
  });
}

int64_t tfav_gpu_squared_norm_scratch(const Parameter* variables, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(variables[i].size);
  return (chunks + chunks / kGroup) * int64_t(sizeof(Norms));
}

int tfav_gpu_squared_norm(const Parameter* variables, int64_t count, double* sum, const GpuLaunch* launch) {
  if (launch->scratch_bytes < tfav_gpu_squared_norm_scratch(variables, count)) return cudaErrorInvalidValue;
  Norms* const norms = static_cast<Norms*>(launch->scratch);
  int64_t chunks = 0;
  TFAV_RETURN_ERROR(with_types(launch->kind.gradient, launch->kind.gradient, [&](auto* g, auto*) {
    using G = std::remove_pointer_t<decltype(g)>;
    return with_batches([&](auto size) {
      return for_batches<size>(variables, count, [&](const auto& batch) {
        Norms* const to = norms + chunks;
        chunks += batch.chunks();
        return launch_kernel(squares<G, size>, batch.chunks(), launch->stream, batch, to);
      });
    });
  }));
  Norms* const groups = chunks >= kManyChunks ? norms + chunks : nullptr;
  if (groups != nullptr) {
    TFAV_RETURN_ERROR(launch_groups(norms, chunks, groups, launch->stream));
  }
  return launch_kernel(total, 1, launch->stream, norms, groups, chunks, sum);
}

int tfav_gpu_copy(void* to, const void* from, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
}

int tfav_gpu_ready(int device) {
  cudaError_t error = cudaSuccess;
  std::thread([&] {  // each thread has a current device, and the caller's stays what it is
    cudaFuncAttributes attributes;
    error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, total);
  })
      .join();
  return error;
}

const char* tfav_gpu_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
