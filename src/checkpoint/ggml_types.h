// The number formats of GGUF files that we write, and float32 rows in them.
//
//   F32, F16, BF16  round to nearest, ties to even
//   Q8_0            blocks of 32: an f16 scale d and 32 int8 q, value d * q, with
//                   d = max |x| / 127 before it is rounded to f16, and q = round(x / d)
//
// A value differs from its Q8_0 by at most d / 2 for the choice of q, and by at most max |x| *
// 2^-11 for the rounding of d (plus 2^-25 * 127 where d is subnormal in f16).
//
// Source: ggml's ggml.h (numbers of the types) and ggml-quants.c (quantize_row_q8_0_ref).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace indexcache {

enum class GgmlType : uint32_t { kF32 = 0, kF16 = 1, kQ8_0 = 8, kBF16 = 30 };

const char* ggml_type_name(GgmlType type);  // "q8_0"
std::optional<GgmlType> parse_ggml_type(std::string_view name);

constexpr int64_t kQ8Block = 32;

// Elements of a row come in whole blocks of this many.
int64_t ggml_block(GgmlType type);
uint64_t ggml_row_bytes(GgmlType type, int64_t elements);

// Writes one row. False if a value is NaN or infinite, or too large for the type.
bool encode_ggml_row(GgmlType type, std::span<const float> values, uint8_t* out);

}  // namespace indexcache
