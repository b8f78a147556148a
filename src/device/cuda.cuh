// CUDA for our .cu files: the real one, or the emulation on the CPU (device/cuda_emulation). The
// two have one source, so kernels are started with launch() and take dynamic shared memory from
// dynamic_shared().
#pragma once

#include <type_traits>
#include <utility>

#include "base/error.h"
#include "device/cuda.h"
#include "device/previous_kernel.cuh"

namespace indexcache {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail("the GPU: {}: {}", what, cudaGetErrorString(status));
}

inline cudaStream_t stream_of(const CudaStream& stream) {
  return static_cast<cudaStream_t>(stream.handle());
}

#ifdef INDEXCACHE_CUDA_EMULATION

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            CudaStream& stream, Args&&... args) {
  (void)stream;
  using Values = std::tuple<std::remove_const_t<Params>...>;
  Values values(std::forward<Args>(args)...);
  std::apply([](auto&... value) { (emulation::check_argument(value), ...); }, values);
  emulation::put_on_stream([kernel, values, grid, block, shared_bytes] {
    struct Context {
      void (*kernel)(Params...);
      const Values& values;
    } context{kernel, values};
    emulation::run({grid, block, shared_bytes,
                    [](const void* given) {
                      const Context& c = *static_cast<const Context*>(given);
                      std::apply(c.kernel, c.values);
                    },
                    &context});
  });
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::dynamic_shared_memory());
}

#else

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            CudaStream& stream, Args&&... args) {
  // Beyond this a kernel must ask.
  if (shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "shared memory of a kernel");
  }
  check_cuda(start_kernel(kernel, grid, block, shared_bytes, stream_of(stream),
                          stream.compute_capability() >= 90, std::forward<Args>(args)...),
             "starting a kernel");
}

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char indexcache_dynamic_shared[];
  return reinterpret_cast<T*>(indexcache_dynamic_shared);
}

#endif

}  // namespace indexcache
