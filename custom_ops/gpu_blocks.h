// What the kernels on a GPU have in common: how they are launched, how a thread reads and writes elements, and sums
// that are the same to the last bit each time.

#ifndef TF_ADAM_VARIANTS_GPU_BLOCKS_H_
#define TF_ADAM_VARIANTS_GPU_BLOCKS_H_

#include <cuda_runtime.h>

#include <type_traits>

#include "adam_math.h"
#include "gpu.h"
#include "half_types.h"

namespace tfav {

#ifndef TFAV_THREADS
#define TFAV_THREADS 256
#endif
constexpr int kThreads = TFAV_THREADS;  // of every block

// The scalars of the step, in device memory or copied from host memory.
struct StepSource {
  const Step* device;
  Step host;

  explicit StepSource(const GpuLaunch& launch) : device(nullptr), host() {
    const Step* step = reinterpret_cast<const Step*>(launch.step);
    if (launch.step_on_host)
      host = *step;
    else
      device = step;
  }
  __device__ Step get() const { return device != nullptr ? *device : host; }
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments&&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // returned here: cub must not find it after a launch of its own
  return error;
}

#define TFAV_RETURN_ERROR(call) \
  if (const cudaError_t error = (call)) return error

// Calls f with null pointers to the types of the variable and the gradient.
template <typename F>
cudaError_t with_types(Type variable, Type gradient, const F& f) {
  const bool same = gradient == variable;
  if (!same && gradient != state_of(variable)) return cudaErrorInvalidValue;
  switch (variable) {
    case Type::kHalf:
      return same ? f((Half*)nullptr, (Half*)nullptr) : f((Half*)nullptr, (float*)nullptr);
    case Type::kBFloat16:
      return same ? f((BFloat16*)nullptr, (BFloat16*)nullptr) : f((BFloat16*)nullptr, (float*)nullptr);
    case Type::kFloat:
      return f((float*)nullptr, (float*)nullptr);
    case Type::kDouble:
      return f((double*)nullptr, (double*)nullptr);
  }
  return cudaErrorInvalidValue;
}

// Calls f with the rounding as a type. Types of full precision are rounded to nearest.
template <typename T, typename F>
cudaError_t with_rounding(Rounding rounding, const F& f) {
  constexpr bool kHalf = sizeof(T) == 2;
  if (rounding == Rounding::kNearest) return f(std::integral_constant<Rounding, Rounding::kNearest>());
  if (!kHalf) return cudaErrorInvalidValue;
  if (rounding == Rounding::kMaster)
    return f(std::integral_constant<Rounding, kHalf ? Rounding::kMaster : Rounding::kNearest>());
  return f(std::integral_constant<Rounding, kHalf ? Rounding::kStochastic : Rounding::kNearest>());
}

// What a pass needs to know of it that only reads the weights.
constexpr Rounding when_read(Rounding rounding) {
  return rounding == Rounding::kMaster ? Rounding::kMaster : Rounding::kNearest;
}

// N neighbouring elements, read and written at once: 16 bytes of the moments, so that neighbouring threads read
// neighbouring memory, and 8 bytes of half types.
template <typename X, int N>
struct alignas(N * sizeof(X)) Pack {
  X x[N];
};

template <int N, typename X>
__device__ __forceinline__ Pack<X, N> load(const X* from) {
  return *reinterpret_cast<const Pack<X, N>*>(from);
}
template <int N, typename X>
__device__ __forceinline__ void store(const Pack<X, N>& pack, X* to) {
  *reinterpret_cast<Pack<X, N>*>(to) = pack;
}

// Whether packs may be read from all arrays of a variable.
__host__ __device__ __forceinline__ bool aligned(const Parameter& t) {
  const auto at = [](const void* address) { return reinterpret_cast<uintptr_t>(address); };
  return (at(t.w) | at(t.m) | at(t.v) | at(t.v_max) | at(t.master) | at(t.g)) % 16 == 0;
}

// The arrays of a variable and of a gradient, from some element on.
template <typename T, typename S, typename G>
struct Arrays {
  T* w;
  S *m, *v, *v_max, *master;
  const G* g;
  uint32_t key;  // of the element's random number

  // From element `begin` of the variable on.
  __device__ __forceinline__ Arrays(const Parameter& t, const G* g, const Step& step, int64_t begin)
      : w(reinterpret_cast<T*>(t.w) + begin),
        m(reinterpret_cast<S*>(t.m) + begin),
        v(reinterpret_cast<S*>(t.v) + begin),
        v_max(t.v_max != nullptr ? reinterpret_cast<S*>(t.v_max) + begin : nullptr),
        master(t.master != nullptr ? reinterpret_cast<S*>(t.master) + begin : nullptr),
        g(g),
        key(stream_key(step, t.stream) + uint32_t(begin)) {}
};

// One pass over N elements, from the i-th on.
template <Pass kPass, bool kSquaredGradient, bool kAmsgrad, Rounding kRounding, int N, typename T, typename S,
          typename G>
__device__ __forceinline__ void advance(const Formula<S>& formula, S decay, S step_size, const Arrays<T, S, G>& arrays,
                                        int at, Norms* norms) {
  T* const w = arrays.w + at;
  S *const m = arrays.m + at, *const v = arrays.v + at;
  Pack<T, N> w_pack = load<N>(w);
  Pack<S, N> m_pack = load<N>(m), v_pack = load<N>(v), v_max_pack = {}, master_pack = {};
  Pack<G, N> g_pack = {};
  if constexpr (kAmsgrad) v_max_pack = load<N>(arrays.v_max + at);
  if constexpr (kRounding == Rounding::kMaster) master_pack = load<N>(arrays.master + at);
  if constexpr (kPass != Pass::kApply) g_pack = load<N>(arrays.g + at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    S weight;
    if constexpr (kRounding == Rounding::kMaster)
      weight = followed(w_pack.x[i], master_pack.x[i]);
    else
      weight = widened(w_pack.x[i]);
    const S u = formula.template change<kPass, kSquaredGradient, kAmsgrad>(
        weight, S(widened(g_pack.x[i])), decay, &m_pack.x[i], &v_pack.x[i], &v_max_pack.x[i]);
    if constexpr (kPass == Pass::kNorms) {
      norms->w += double(weight) * double(weight);
      norms->u += double(u) * double(u);
    } else {
      const S new_weight = updated(weight, u, step_size);
      if constexpr (kRounding == Rounding::kMaster) master_pack.x[i] = new_weight;
      if constexpr (kRounding == Rounding::kStochastic)
        narrow_randomly(new_weight, random_bits(arrays.key, uint32_t(at + i)), &w_pack.x[i]);
      else
        narrow(new_weight, &w_pack.x[i]);
    }
  }
  if constexpr (kPass != Pass::kApply) {
    store<N>(m_pack, m);
    store<N>(v_pack, v);
  }
  if constexpr (kAmsgrad) store<N>(v_max_pack, arrays.v_max + at);
  if constexpr (kPass != Pass::kNorms) {
    store<N>(w_pack, w);
    if constexpr (kRounding == Rounding::kMaster) store<N>(master_pack, arrays.master + at);
  }
}

// The sum over the threads of a block, in an order that is always the same; thread 0 has it. All threads must call it,
// and once in a kernel.
__device__ __forceinline__ Norms block_sum(const Norms& mine) {
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

// Adds the block's share of parts `begin` to `end` to each thread's sum.
__device__ __forceinline__ void add_parts(const Norms* parts, int64_t begin, int64_t end, Norms* mine) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    mine->w += parts[i].w;
    mine->u += parts[i].u;
  }
}

// The sum of `count` parts, by one block; thread 0 has it.
__device__ __forceinline__ Norms sum_of(const Norms* parts, int64_t count) {
  Norms mine = {0, 0};
  add_parts(parts, 0, count, &mine);
  return block_sum(mine);
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_GPU_BLOCKS_H_
