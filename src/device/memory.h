// Large host memory: zero-filled, 64-byte aligned, taken from the kernel page by page as it is
// first touched, so that a cache reserved for 200K tokens costs nothing until the tokens come.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/cuda.h"

namespace indexcache {

class HostMemory {
 public:
  HostMemory() = default;
  explicit HostMemory(size_t num_bytes);  // Error with the size if the kernel refuses
  ~HostMemory();
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  uint8_t* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t num_bytes_ = 0;
};

// Memory for what runs on a device: zero-filled on the CPU, undefined on a GPU.
class Memory {
 public:
  Memory() = default;
  Memory(Device device, size_t num_bytes) {
    if (device == Device::kCuda) {
      cuda_ = CudaMemory(num_bytes);
    } else {
      host_ = HostMemory(num_bytes);
    }
  }

  uint8_t* data() const { return host_.data() != nullptr ? host_.data() : cuda_.data(); }
  size_t num_bytes() const { return host_.num_bytes() + cuda_.num_bytes(); }

 private:
  HostMemory host_;
  CudaMemory cuda_;
};

}  // namespace indexcache
