// The NVIDIA GPUs of this machine. CPU-only builds link gpus_none.cc, CUDA builds gpus_cuda.cu.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace indexcache {

struct Gpu {
  std::string name;
  int compute_capability = 0;  // 90 for Hopper
  uint64_t memory_bytes = 0;
};

// Empty, with `why` filled in, where there is no driver, no GPU, or no CUDA in this build.
std::vector<Gpu> list_gpus(std::string* why);

// Why `--device cuda` cannot be had, as a sentence for an error message.
std::string cuda_unavailable_reason();

}  // namespace indexcache
