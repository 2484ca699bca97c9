// The part of CUDA that the kernels need, on a CPU: each thread of a block is a thread of the host, and blocks run one
// after the other. With this header a C++ compiler turns the unchanged .cu files into a library that computes the same
// as on a GPU, slowly. The sanitizers understand it: to ThreadSanitizer a missing __syncthreads is a race.

#ifndef CUDA_ON_CPU_CUDA_RUNTIME_H_
#define CUDA_ON_CPU_CUDA_RUNTIME_H_

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <thread>
#include <vector>

// Small sizes, so that small arrays have many chunks, a few variables several batches, narrow rows several spans, and a
// few indices several windows.
#define TFAV_THREADS 8
#define TFAV_CHUNK 512
#define TFAV_BATCH 60
#define TFAV_SMALL_BATCH 3
#define TFAV_MAX_BLOCKS 5
#define TFAV_SPAN 64
#define TFAV_WINDOW 4

#define CUDART_VERSION 12010
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotSupported = 801,
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() {}
  explicit dim3(unsigned x) : x(x) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Variables that tests set and read.
#define CUDA_ON_CPU_EXPORT inline __attribute__((visibility("default"), used))
extern "C" {
// The blocks before this one do not run: arrays too large for the host are updated in part.
CUDA_ON_CPU_EXPORT int64_t cuda_on_cpu_first_block = 0;
// The version of the driver: before 12.1 it launches no kernel with more than 4,096 bytes of parameters.
CUDA_ON_CPU_EXPORT int cuda_on_cpu_driver = 13000;
// The current device of the calling thread. There are two, and only number 0 has kernels.
CUDA_ON_CPU_EXPORT thread_local int cuda_on_cpu_current_device = 0;
CUDA_ON_CPU_EXPORT int cuda_on_cpu_device() { return cuda_on_cpu_current_device; }
// The number of kernel launches so far.
CUDA_ON_CPU_EXPORT int64_t cuda_on_cpu_launches = 0;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_on_cpu_driver;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  cuda_on_cpu_current_device = device;
  return cudaSuccess;
}

struct cudaFuncAttributes {};
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*) {
  return cuda_on_cpu_current_device == 0 ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

namespace cuda_on_cpu {
inline std::mutex launching;  // one kernel at a time
inline pthread_barrier_t barrier;
inline void wait() { pthread_barrier_wait(&barrier); }
}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
  if (threads == 0 || blocks == 0) return cudaErrorInvalidConfiguration;
  size_t bytes = 0;
  for (const size_t parameter : {sizeof(Parameters)...}) bytes += parameter;
  if (bytes > (cuda_on_cpu_driver < 12010 ? 4096 : 32764)) return cudaErrorNotSupported;
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launching);
  ++cuda_on_cpu_launches;
  pthread_barrier_init(&cuda_on_cpu::barrier, nullptr, threads);
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      threadIdx = dim3(thread), blockDim = dim3(threads), gridDim = dim3(blocks);
      const int64_t first = cuda_on_cpu_first_block < blocks ? cuda_on_cpu_first_block : 0;
      for (unsigned block = unsigned(first); block < blocks; ++block) {
        blockIdx = dim3(block);
        kernel(arguments...);
        cuda_on_cpu::wait();  // the next block has the same shared memory
      }
    });
  }
  for (std::thread& one : running) one.join();
  pthread_barrier_destroy(&cuda_on_cpu::barrier);
  return cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

#endif  // CUDA_ON_CPU_CUDA_RUNTIME_H_
