// Element types, and exact scalar conversions between them and float32.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string_view>

namespace indexcache {

// Those that the safetensors format names. The engine computes with kF32, kF16, kBF16 and kF8E4M3;
// the rest can be read and written as data.
enum class DType : uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E4M3,
  kF8E5M2,
  kF8E8M0,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kI64,
  kU64,
  kF64,
};

int dtype_bytes(DType dtype);
const char* dtype_name(DType dtype);  // safetensors spelling: "F32", "BF16", "F8_E4M3"
std::optional<DType> parse_dtype(std::string_view name);

inline float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest, ties to even; NaN stays NaN (quiet).
inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float value);  // round to nearest even, overflow to infinity

// e4m3fn: no infinities, 0x7F and 0xFF are NaN, largest finite 448.
float f8e4m3_to_f32(uint8_t bits);
uint8_t f32_to_f8e4m3(float value);  // round to nearest even, saturates at 448; NaN stays NaN

// The 256 values of e4m3 in order of their bits.
const float* f8e4m3_table();

}  // namespace indexcache
