// A tensor somebody else owns (TensorView) and one that owns its memory (Tensor). Dense, row-major,
// CPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/memory.h"
#include "tensor/dtype.h"

namespace indexcache {

using Shape = std::vector<int64_t>;

int64_t num_elements(const Shape& shape);
std::string shape_string(const Shape& shape);  // "[3, 128]"

struct TensorView {
  DType dtype = DType::kF32;
  Shape shape;
  const uint8_t* data =
      nullptr;  // may be unaligned: safetensors promises nothing; null means "absent"

  bool present() const { return data != nullptr; }
  int64_t num_bytes() const { return num_elements(shape) * dtype_bytes(dtype); }
};

struct Tensor {
  DType dtype = DType::kF32;
  Shape shape;
  HostMemory memory;

  Tensor() = default;
  Tensor(DType dtype, Shape shape);

  TensorView view() const { return {dtype, shape, memory.data()}; }

  template <class T>
  T* as() {
    CHECK_EQ(static_cast<int>(sizeof(T)), dtype_bytes(dtype));
    return reinterpret_cast<T*>(memory.data());
  }
};

// Element `i` of any float tensor (F32, F16, BF16, F8_E4M3, F64) as float32, without block scales.
float element_as_f32(const TensorView& view, int64_t i);

// All elements of a float tensor as float32.
std::vector<float> to_f32(const TensorView& view);

}  // namespace indexcache
