// Shared by the kernels on a GPU: launches, reads and writes of elements, the update of elements, and sums over a block
// that are bit-exact each time.

#ifndef TF_ADAM_VARIANTS_GPU_BLOCKS_H_
#define TF_ADAM_VARIANTS_GPU_BLOCKS_H_

#include <cuda_runtime.h>

#include <type_traits>

#include "adam_math.h"
#include "gpu.h"
#include "update_element.h"

namespace tfav {

#ifndef TFAV_THREADS
#define TFAV_THREADS 256
#endif
constexpr int kThreads = TFAV_THREADS;  // per block

// The coefficients of the step, in device memory or copied from host memory.
struct CoefficientsSource {
  const Coefficients* device;
  Coefficients host;

  explicit CoefficientsSource(const GpuLaunch& launch) : device(nullptr), host() {
    const Coefficients* given = reinterpret_cast<const Coefficients*>(launch.coefficients);
    if (launch.coefficients_on_host)
      host = *given;
    else
      device = given;
  }
  __device__ Coefficients get() const { return device != nullptr ? *device : host; }
};

template <typename... KernelParameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(KernelParameters...), int64_t blocks, void* stream, Arguments&&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // returned here; cub must not find it after its next launch
  return error;
}

#define TFAV_RETURN_ERROR(call) \
  if (const cudaError_t error = (call)) return error

// A type as a value.
template <typename T>
struct Tag {
  using type = T;
};

// Calls f with the types of the variable and the gradient as tags.
template <typename F>
cudaError_t dispatch_dtypes(DType variable, DType gradient, const F& f) {
  const bool same = gradient == variable;
  if (!same && gradient != slot_dtype(variable)) return cudaErrorInvalidValue;
  switch (variable) {
    case DType::kHalf:
      return same ? f(Tag<Half>(), Tag<Half>()) : f(Tag<Half>(), Tag<float>());
    case DType::kBFloat16:
      return same ? f(Tag<BFloat16>(), Tag<BFloat16>()) : f(Tag<BFloat16>(), Tag<float>());
    case DType::kFloat:
      return f(Tag<float>(), Tag<float>());
    case DType::kDouble:
      return f(Tag<double>(), Tag<double>());
  }
  return cudaErrorInvalidValue;
}

// Calls f with the rounding as a type. Full precision has no other than kNearest.
template <typename T, typename F>
cudaError_t dispatch_rounding(Rounding rounding, const F& f) {
  constexpr bool kHalf = sizeof(T) == 2;
  if (rounding == Rounding::kNearest) return f(std::integral_constant<Rounding, Rounding::kNearest>());
  if (!kHalf) return cudaErrorInvalidValue;
  if (rounding == Rounding::kMaster)
    return f(std::integral_constant<Rounding, kHalf ? Rounding::kMaster : Rounding::kNearest>());
  return f(std::integral_constant<Rounding, kHalf ? Rounding::kStochastic : Rounding::kNearest>());
}

// The rounding that matters to a pass that reads weights but does not write them.
constexpr Rounding read_rounding(Rounding rounding) {
  return rounding == Rounding::kMaster ? Rounding::kMaster : Rounding::kNearest;
}

// N neighbouring elements that a thread reads and writes at once: 16 bytes of the slots, so that neighbouring threads
// access neighbouring memory, and 8 bytes of half-precision weights.
template <typename X, int N>
struct alignas(N * sizeof(X)) Pack {
  X x[N];
};

template <int N, typename X>
__device__ __forceinline__ Pack<X, N> load(const X* address) {
  return *reinterpret_cast<const Pack<X, N>*>(address);
}
template <int N, typename X>
__device__ __forceinline__ void store(const Pack<X, N>& pack, X* address) {
  *reinterpret_cast<Pack<X, N>*>(address) = pack;
}

// Whether packs can be read from all arrays of a variable.
__host__ __device__ __forceinline__ bool is_aligned(const VariableState& s) {
  const auto at = [](const void* address) { return reinterpret_cast<uintptr_t>(address); };
  return (at(s.w) | at(s.m) | at(s.v) | at(s.v_max) | at(s.master) | at(s.g)) % 16 == 0;
}

// The arrays of a variable from element `begin` on; g begins there already.
template <typename T, typename S, typename G>
struct Arrays {
  T* w;
  S *m, *v, *v_max, *master;
  const G* g;
  uint32_t stream_key;  // for the random number of element 0 of these arrays

  __device__ __forceinline__ Arrays(const VariableState& s, const G* g, const Coefficients& c, int64_t begin)
      : w(reinterpret_cast<T*>(s.w) + begin),
        m(reinterpret_cast<S*>(s.m) + begin),
        v(reinterpret_cast<S*>(s.v) + begin),
        v_max(s.v_max != nullptr ? reinterpret_cast<S*>(s.v_max) + begin : nullptr),
        master(s.master != nullptr ? reinterpret_cast<S*>(s.master) + begin : nullptr),
        g(g),
        stream_key(rng_stream_key(c, s.rng_stream) + uint32_t(begin)) {}
};

// One pass over N elements, from index `begin` of the arrays on.
template <Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, int N, typename T, typename S,
          typename G>
__device__ __forceinline__ void update_elements(const Formula<S>& formula, S decay, S step_size,
                                                const Arrays<T, S, G>& arrays, int begin, Norms* norms) {
  T* const w = arrays.w + begin;
  S *const m = arrays.m + begin, *const v = arrays.v + begin;
  Pack<T, N> w_pack = load<N>(w);
  Pack<S, N> m_pack = load<N>(m), v_pack = load<N>(v), v_max_pack = {}, master_pack = {};
  Pack<G, N> g_pack = {};
  if constexpr (kAmsgrad) v_max_pack = load<N>(arrays.v_max + begin);
  if constexpr (kRounding == Rounding::kMaster) master_pack = load<N>(arrays.master + begin);
  if constexpr (kPass != Pass::kApply) g_pack = load<N>(arrays.g + begin);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Norms element = update_element<kPass, kSquaredGradient, kAmsgrad, kRounding>(
        formula, S(to_float(g_pack.x[i])), decay, step_size, arrays.stream_key, uint32_t(begin + i), &w_pack.x[i],
        &m_pack.x[i], &v_pack.x[i], &v_max_pack.x[i], &master_pack.x[i]);
    if constexpr (kPass == Pass::kNorms) {
      norms->w += element.w;
      norms->u += element.u;
    }
  }
  if constexpr (kPass != Pass::kApply) {
    store<N>(m_pack, m);
    store<N>(v_pack, v);
  }
  if constexpr (kAmsgrad) store<N>(v_max_pack, arrays.v_max + begin);
  if constexpr (kPass != Pass::kNorms) {
    store<N>(w_pack, w);
    if constexpr (kRounding == Rounding::kMaster) store<N>(master_pack, arrays.master + begin);
  }
}

// The sum over the threads of a block, always in the same order; thread 0 gets it. All threads must call it, once per
// kernel.
__device__ __forceinline__ Norms sum_block(const Norms& mine) {
  __shared__ Norms parts[kThreads];
  parts[threadIdx.x] = mine;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      parts[threadIdx.x].w += parts[threadIdx.x + half].w;
      parts[threadIdx.x].u += parts[threadIdx.x + half].u;
    }
  }
  return parts[threadIdx.x];
}

// Adds parts [begin, end) to the sums of the threads of the block, a share to each.
__device__ __forceinline__ void add_parts(const Norms* parts, int64_t begin, int64_t end, Norms* mine) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    mine->w += parts[i].w;
    mine->u += parts[i].u;
  }
}

// The sum of `count` parts by one block; thread 0 gets it.
__device__ __forceinline__ Norms sum_parts(const Norms* parts, int64_t count) {
  Norms mine = {0, 0};
  add_parts(parts, 0, count, &mine);
  return sum_block(mine);
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_GPU_BLOCKS_H_
