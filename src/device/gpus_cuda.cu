#include "device/cuda.cuh"
#include "device/gpus.h"

namespace indexcache {

std::vector<Gpu> list_gpus(std::string* why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    *why = status == cudaErrorInsufficientDriver
               ? "found no NVIDIA driver, or one too old for this program's CUDA " +
                     std::to_string(CUDART_VERSION / 1000) + "." +
                     std::to_string(CUDART_VERSION % 1000 / 10)
           : status == cudaSuccess || status == cudaErrorNoDevice
               ? "found no GPU"
               : std::string("no usable GPU: ") + cudaGetErrorString(status);
    return {};
  }
  std::vector<Gpu> gpus;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    gpus.push_back(
        {properties.name, properties.major * 10 + properties.minor, properties.totalGlobalMem});
  }
  if (gpus.empty()) *why = "the GPUs of this machine cannot be examined";
  return gpus;
}

}  // namespace indexcache
