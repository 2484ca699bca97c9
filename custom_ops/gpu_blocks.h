// What the kernels on a GPU have in common: how they are launched, how a thread reads and writes elements, and sums
// that are the same to the last bit each time.

#ifndef TF_ADAM_VARIANTS_GPU_BLOCKS_H_
#define TF_ADAM_VARIANTS_GPU_BLOCKS_H_

#include <cuda_runtime.h>

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

// N neighbouring elements, read and written at once, 16 bytes at a time.
template <typename X, int N>
struct alignas(N == 1 ? sizeof(X) : 16) Pack {
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

// One pass over N elements.
template <Pass kPass, bool kSquaredGradient, bool kAmsgrad, int N, typename T, typename G, typename S>
__device__ __forceinline__ void advance(const Formula<S>& formula, S decay, S step_size, T* w, S* m, S* v, S* v_max,
                                        const G* g, Norms* norms) {
  Pack<T, N> w_pack = load<N>(w);
  Pack<S, N> m_pack = load<N>(m), v_pack = load<N>(v), v_max_pack = {};
  Pack<G, N> g_pack = {};
  if constexpr (kAmsgrad) v_max_pack = load<N>(v_max);
  if constexpr (kPass != Pass::kApply) g_pack = load<N>(g);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const S weight = widened(w_pack.x[i]);
    const S u = formula.template change<kPass, kSquaredGradient, kAmsgrad>(
        weight, S(widened(g_pack.x[i])), decay, &m_pack.x[i], &v_pack.x[i], &v_max_pack.x[i]);
    if constexpr (kPass == Pass::kNorms) {
      norms->w += double(weight) * double(weight);
      norms->u += double(u) * double(u);
    } else {
      narrow(updated(weight, u, step_size), &w_pack.x[i]);
    }
  }
  if constexpr (kPass != Pass::kApply) {
    store<N>(m_pack, m);
    store<N>(v_pack, v);
  }
  if constexpr (kAmsgrad) store<N>(v_max_pack, v_max);
  if constexpr (kPass != Pass::kNorms) store<N>(w_pack, w);
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

// The sum of `count` parts, by one block; thread 0 has it.
__device__ __forceinline__ Norms sum_of(const Norms* parts, int64_t count) {
  Norms mine = {0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    mine.w += parts[i].w;
    mine.u += parts[i].u;
  }
  return block_sum(mine);
}

}  // namespace tfav

#endif  // TF_ADAM_VARIANTS_GPU_BLOCKS_H_
