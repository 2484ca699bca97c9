// The step of many variables on a GPU. Each variable is cut into chunks, a block takes one chunk, and a launch takes
// the chunks of a batch of variables, whose addresses are in the kernel's parameters: nothing is copied to the device
// before it, and nothing waits.

#include "gpu_blocks.h"

namespace tfav {
namespace {

#ifndef TFAV_CHUNK
#define TFAV_CHUNK 4096
#endif
constexpr int kChunk = TFAV_CHUNK;  // elements of a block
static_assert(kChunk % 8 == 0, "chunks begin where 16 bytes begin");

// Variables of one launch. From CUDA 12.1 on a kernel's parameters may be 32,764 bytes, before it 4,096.
#ifdef TFAV_BATCH
constexpr int kBatch = TFAV_BATCH;
#else
constexpr int kBatch = CUDART_VERSION >= 12010 ? 448 : 52;
#endif

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

struct Batch {
  Parameter variables[kBatch];
  uint32_t first[kBatch + 1];  // chunk of each variable; then how many chunks there are
  int count;

  int64_t chunks() const { return first[count]; }

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
static_assert(sizeof(Batch) + sizeof(StepSource) + 64 <= (kBatch > 52 ? 32764 : 4096), "parameters of a kernel");

// Calls f with one batch of variables after the other.
template <typename F>
cudaError_t for_batches(const Parameter* variables, int64_t count, const F& f) {
  Batch batch;
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

  __device__ __forceinline__ Chunk(const Batch& batch, uint32_t chunk)
      : variable(batch.owner(chunk)), begin(int64_t(chunk - batch.first[variable]) * kChunk) {
    const int64_t left = batch.variables[variable].size - begin;
    size = left < kChunk ? int(left) : kChunk;
  }
};

// norms: of each chunk, written where kPass computes them. step_sizes: of each variable, read where kPass uses them.
template <typename T, typename G, Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding>
__global__ void __launch_bounds__(kThreads)
    elements(const __grid_constant__ Batch batch, const __grid_constant__ StepSource source, Norms* norms,
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
  const int packed = arrays.aligned() ? chunk.size / kPack * kPack : 0;
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

// LAMB: how far each variable moves along its u. A block takes one variable.
__global__ void __launch_bounds__(kThreads)
    trust_ratios(const __grid_constant__ Batch batch, const __grid_constant__ StepSource source, const Norms* norms,
                 double* step_sizes) {
  const int variable = blockIdx.x;
  const Norms sum = sum_of(norms + batch.first[variable], batch.first[variable + 1] - batch.first[variable]);
  if (threadIdx.x == 0) {
    const Step step = source.get();
    step_sizes[variable] =
        step.learning_rate * (batch.variables[variable].layer_adaptation ? trust_ratio(sum, step) : 1.0);
  }
}

template <typename G>
__global__ void __launch_bounds__(kThreads) squares(const __grid_constant__ Batch batch, Norms* norms) {
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

__global__ void __launch_bounds__(kThreads) total(const Norms* norms, int64_t count, double* to) {
  const Norms sum = sum_of(norms, count);
  if (threadIdx.x == 0) *to = sum.u;
}

template <typename T, typename G, Rounding kRounding>
cudaError_t adam(const Batch& batch, const GpuLaunch& launch, const StepSource& source) {
  const auto kernel = launch.kind.squared_gradient
                          ? (launch.kind.amsgrad ? elements<T, G, Pass::kAdam, true, true, kRounding>
                                                 : elements<T, G, Pass::kAdam, true, false, kRounding>)
                          : (launch.kind.amsgrad ? elements<T, G, Pass::kAdam, false, true, kRounding>
                                                 : elements<T, G, Pass::kAdam, false, false, kRounding>);
  return launch_kernel(kernel, batch.chunks(), launch.stream, batch, source, nullptr, nullptr);
}

template <typename T, typename G, Rounding kRounding>
cudaError_t lamb(const Batch& batch, const GpuLaunch& launch, const StepSource& source) {
  double* step_sizes = static_cast<double*>(launch.scratch);
  Norms* norms = reinterpret_cast<Norms*>(step_sizes + kBatch);
  if (const cudaError_t error = launch_kernel(elements<T, G, Pass::kNorms, false, false, when_read(kRounding)>,
                                              batch.chunks(), launch.stream, batch, source, norms, nullptr)) {
    return error;
  }
  if (const cudaError_t error =
          launch_kernel(trust_ratios, batch.count, launch.stream, batch, source, norms, step_sizes)) {
    return error;
  }
  // No gradient is read any more: its type does not matter.
  return launch_kernel(elements<T, T, Pass::kApply, false, false, kRounding>, batch.chunks(), launch.stream, batch,
                       source, nullptr, step_sizes);
}

}  // namespace
}  // namespace tfav

using namespace tfav;

int64_t tfav_gpu_dense_scratch(const Parameter* variables, int64_t count, const GpuLaunch* launch) {
  if (!launch->kind.trust_ratio) return 0;
  int64_t most = 0;
  for_batches(variables, count, [&](const Batch& batch) {
    most = batch.chunks() > most ? batch.chunks() : most;
    return cudaSuccess;
  });
  return most == 0 ? 0 : kBatch * int64_t(sizeof(double)) + most * int64_t(sizeof(Norms));
}

int tfav_gpu_dense(const Parameter* variables, int64_t count, const GpuLaunch* launch) {
  if (launch->scratch_bytes < tfav_gpu_dense_scratch(variables, count, launch)) return cudaErrorInvalidValue;
  const StepSource source(*launch);
  return with_types(launch->kind.variable, launch->kind.gradient, [&](auto* w, auto* g) {
    using T = std::remove_pointer_t<decltype(w)>;
    using G = std::remove_pointer_t<decltype(g)>;
    return with_rounding<T>(launch->kind.rounding, [&](auto rounding) {
      return for_batches(variables, count, [&](const Batch& batch) {
        return launch->kind.trust_ratio ? lamb<T, G, rounding>(batch, *launch, source)
                                        : adam<T, G, rounding>(batch, *launch, source);
      });
    });
  });
}

int64_t tfav_gpu_squared_norm_scratch(const Parameter* variables, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(variables[i].size);
  return chunks * int64_t(sizeof(Norms));
}

int tfav_gpu_squared_norm(const Parameter* variables, int64_t count, double* sum, const GpuLaunch* launch) {
  if (launch->scratch_bytes < tfav_gpu_squared_norm_scratch(variables, count)) return cudaErrorInvalidValue;
  Norms* const norms = static_cast<Norms*>(launch->scratch);
  Norms* next = norms;
  const cudaError_t error = with_types(launch->kind.gradient, launch->kind.gradient, [&](auto* g, auto*) {
    using G = std::remove_pointer_t<decltype(g)>;
    return for_batches(variables, count, [&](const Batch& batch) {
      Norms* const to = next;
      next += batch.chunks();
      return launch_kernel(squares<G>, batch.chunks(), launch->stream, batch, to);
    });
  });
  return error != cudaSuccess ? error : launch_kernel(total, 1, launch->stream, norms, int64_t(next - norms), sum);
}

int tfav_gpu_copy(void* to, const void* from, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
}

int tfav_gpu_ready() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, total);
  cudaGetLastError();  // returned here: the next launch must not find it
  return error;
}

const char* tfav_gpu_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
