// The NVIDIA GPUs of this machine. CPU-only builds link gpus_none.cc, CUDA builds gpus_cuda.cu.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device/cuda.h"

namespace indexcache {

struct Gpu {
  std::string name;
  int compute_capability = 0;  // 90 for Hopper
  uint64_t memory_bytes = 0;
};

// Empty, with `why` filled in, where there is no driver, no GPU, or no CUDA in this build.
std::vector<Gpu> list_gpus(std::string* why);

// What a device is, for reports, and which kernels it gets.
std::string hardware_name(Device device);  // "AMD EPYC 9554", "NVIDIA H100 80GB HBM3"
std::string kernel_names(Device device);   // "avx2 avx512", "cuda 9.0"

// Whether kernels for sm_90a run; false where there is no GPU.
bool first_gpu_is_hopper();

// Why `--device cuda` cannot be had, for an error message; empty when it can. The first GPU is the
// one that is used.
std::string cuda_unavailable_reason();

}  // namespace indexcache
