// Matrices of a checkpoint as products read them.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"

namespace indexcache {

// The type that the operands of a product are rounded to. With kFP8 the input of a product whose
// matrix is e4m3 becomes e4m3 with a scale for each 128 elements (ops/kit/fp8_rows.h), and nothing
// else is rounded; all other products are kBF16's.
enum class Compute : uint8_t { kF32, kBF16, kFP8 };

inline const char* compute_name(Compute compute) {
  return compute == Compute::kF32 ? "f32" : compute == Compute::kBF16 ? "bf16" : "fp8";
}

// A matrix [rows, cols] of a checkpoint, row-major without padding.
struct Weight {
  DType dtype = DType::kF32;
  int64_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;     // null: absent. May be unaligned.
  const float* scale_inv = nullptr;  // fp8 only: [ceil(rows/128), ceil(cols/128)]

  bool present() const { return data != nullptr; }
};

}  // namespace indexcache
