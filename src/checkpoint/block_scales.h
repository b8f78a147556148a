// Block-scaled fp8 weights as DeepSeek publishes them: `<name>` F8_E4M3 [r, c] with
// `<name>_scale_inv` [ceil(r/128), ceil(c/128)], and
//
//   W[i, j] = e4m3(q[i, j]) * scale_inv[i / 128, j / 128]
//
// so the tiles of the last row and column may be smaller. Scales are F32, BF16 or F8_E8M0 (2^(bits
// - 127)) in the file and f32 here. Errors: another dtype or shape, and a scale that is zero,
// negative, NaN or infinite, with tensor and tile. Source: DeepSeek-V3 inference/fp8_cast_bf16.py
// (weight_dequant), config.json weight_block_size [128, 128].
#pragma once

#include <span>
#include <string>
#include <vector>

#include "tensor/tensor.h"

namespace indexcache {

constexpr int64_t kScaleBlock = 128;

std::string scale_name(const std::string& weight_name);  // "x.weight" to "x.weight_scale_inv"
Shape scale_shape(const Shape& weight_shape);            // [ceil(r/128), ceil(c/128)]

// Checked scales, row-major. `where` (file and tensor) begins every error message.
std::vector<float> read_block_scales(const TensorView& weight, const TensorView& scales,
                                     const std::string& where);

// The meaning of it all, for tests and small weights: f32 [r, c].
std::vector<float> dequantize_blocks(const TensorView& weight, std::span<const float> scales);

}  // namespace indexcache
