#include "checkpoint/block_scales.h"

#include <cmath>
#include <limits>

#include "base/checked.h"
#include "base/error.h"

namespace indexcache {

namespace {

float scale_as_f32(const TensorView& scales, int64_t i) {
  if (scales.dtype != DType::kF8E8M0) return element_as_f32(scales, i);
  const uint8_t bits = scales.data[i];
  return bits == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, bits - 127);
}

}  // namespace

std::string scale_name(const std::string& weight_name) { return weight_name + "_scale_inv"; }

Shape scale_shape(const Shape& weight_shape) {
  Shape shape;
  // Not ceil_div: a dimension from a file may be close to 2^63.
  for (const int64_t dim : weight_shape) {
    shape.push_back(dim / kScaleBlock + (dim % kScaleBlock != 0));
  }
  return shape;
}

std::vector<float> read_block_scales(const TensorView& weight, const TensorView& scales,
                                     const std::string& where) {
  if (weight.dtype != DType::kF8E4M3 || weight.shape.size() != 2) {
    fail("{}: found {} {}, expected F8_E4M3 of two dimensions for block scales", where,
         dtype_name(weight.dtype), shape_string(weight.shape));
  }
  if (!scales.present()) fail("{}: the block scales (_scale_inv) are missing", where);
  if (scales.dtype != DType::kF32 && scales.dtype != DType::kBF16 &&
      scales.dtype != DType::kF8E8M0) {
    fail("{}: the block scales are {}, expected F32, BF16 or F8_E8M0", where,
         dtype_name(scales.dtype));
  }
  const Shape expected = scale_shape(weight.shape);
  if (scales.shape != expected) {
    fail("{}: the block scales have shape {}, expected {} for a weight of {} in tiles of {}x{}",
         where, shape_string(scales.shape), shape_string(expected), shape_string(weight.shape),
         kScaleBlock, kScaleBlock);
  }
  std::vector<float> values(static_cast<size_t>(num_elements(expected)));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = scale_as_f32(scales, static_cast<int64_t>(i));
    if (!(values[i] > 0) || !std::isfinite(values[i])) {
      const int64_t tile = static_cast<int64_t>(i);
      fail("{}: the block scale of tile [{}, {}] is {}, expected a finite number above 0", where,
           tile / expected[1], tile % expected[1], values[i]);
    }
  }
  return values;
}

std::vector<float> dequantize_blocks(const TensorView& weight, std::span<const float> scales) {
  CHECK_EQ(weight.shape.size(), 2u);
  CHECK(weight.dtype == DType::kF8E4M3);
  const int64_t rows = weight.shape[0], columns = weight.shape[1];
  const int64_t tile_columns = ceil_div(columns, kScaleBlock);
  CHECK_EQ(static_cast<int64_t>(scales.size()), ceil_div(rows, kScaleBlock) * tile_columns);
  std::vector<float> out(static_cast<size_t>(rows * columns));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = r * columns + c;
      const int64_t tile = (r / kScaleBlock) * tile_columns + c / kScaleBlock;
      out[static_cast<size_t>(i)] =
          f8e4m3_to_f32(weight.data[i]) * scales[static_cast<size_t>(tile)];
    }
  }
  return out;
}

}  // namespace indexcache
