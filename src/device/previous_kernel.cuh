// How a kernel follows the one before it on its stream. Needs no other header of ours, so that the
// programs of tools/gpu build alone.
//
// Every kernel begins with wait_for_previous(). On compute capability 9.0 it is then started while
// the one before it still runs, as far as there is room for its blocks ("programmatic dependent
// launch"), and starting costs no time between the two: a step of decoding is a thousand kernels of
// a few microseconds. A kernel that does not wait may read what is not written yet; the emulation
// ends the program at one.
#pragma once

#ifdef INDEXCACHE_CUDA_EMULATION
#include "device/cuda_emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>

#include <utility>
#endif

namespace indexcache {

// Until all kernels before this one are done and what they wrote can be read.
__device__ __forceinline__ void wait_for_previous() {
#ifdef INDEXCACHE_CUDA_EMULATION
  emulation::note_wait_for_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifndef INDEXCACHE_CUDA_EMULATION

// Starts a kernel; `early`: on a GPU that can start it before the one before it is done.
template <class... Params, class... Args>
cudaError_t start_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                         cudaStream_t stream, bool early, Args&&... args) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

#endif

}  // namespace indexcache
