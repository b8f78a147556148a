// Matrices of a checkpoint as products read them.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"

namespace indexcache {

enum class Compute : uint8_t { kF32, kBF16 };

// A matrix [rows, cols] of a checkpoint, row-major without padding.
struct Weight {
  DType dtype = DType::kF32;
  int64_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;     // null: absent. May be unaligned.
  const float* scale_inv = nullptr;  // fp8 only: [ceil(rows/128), ceil(cols/128)]

  bool present() const { return data != nullptr; }
};

}  // namespace indexcache
