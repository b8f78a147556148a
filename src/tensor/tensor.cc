#include "tensor/tensor.h"

#include <cstring>

namespace indexcache {

int64_t num_elements(const Shape& shape) {
  int64_t count = 1;
  for (int64_t dim : shape) count *= dim;
  return count;
}

std::string shape_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += fmt::format("{}{}", i ? ", " : "", shape[i]);
  return text + "]";
}

Tensor::Tensor(DType dtype_in, Shape shape_in)
    : dtype(dtype_in),
      shape(std::move(shape_in)),
      memory(static_cast<size_t>(num_elements(shape) * dtype_bytes(dtype))) {}

namespace {

template <class T>
T load(const uint8_t* data, int64_t i) {
  T value;
  std::memcpy(&value, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

}  // namespace

float element_as_f32(const TensorView& view, int64_t i) {
  switch (view.dtype) {
    case DType::kF32:
      return load<float>(view.data, i);
    case DType::kF16:
      return f16_to_f32(load<uint16_t>(view.data, i));
    case DType::kBF16:
      return bf16_to_f32(load<uint16_t>(view.data, i));
    case DType::kF8E4M3:
      return f8e4m3_to_f32(view.data[i]);
    case DType::kF64:
      return static_cast<float>(load<double>(view.data, i));
    default:
      break;
  }
  fail("cannot read {} as float", dtype_name(view.dtype));
}

std::vector<float> to_f32(const TensorView& view) {
  std::vector<float> out(static_cast<size_t>(num_elements(view.shape)));
  for (size_t i = 0; i < out.size(); ++i) out[i] = element_as_f32(view, static_cast<int64_t>(i));
  return out;
}

}  // namespace indexcache
