#include "checkpoint/ggml_types.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "tensor/dtype.h"

namespace indexcache {

namespace {

constexpr size_t kQ8BlockBytes = 2 + kQ8Block;
constexpr uint16_t kF16Exponent = 0x7C00;

struct TypeName {
  GgmlType type;
  const char* name;
};
constexpr TypeName kNames[] = {{GgmlType::kF32, "f32"},
                               {GgmlType::kF16, "f16"},
                               {GgmlType::kBF16, "bf16"},
                               {GgmlType::kQ8_0, "q8_0"}};

void put_u16(uint16_t bits, uint8_t* out) { std::memcpy(out, &bits, sizeof(bits)); }

bool encode_q8_block(const float* values, uint8_t* out) {
  float largest = 0;
  for (int64_t i = 0; i < kQ8Block; ++i) largest = std::max(largest, std::abs(values[i]));
  const float scale = largest / 127.0f;
  // A scale so small that its inverse overflows stands for values that f16 rounds to 0 anyway.
  const float inverse = scale > 0 && std::isfinite(1.0f / scale) ? 1.0f / scale : 0.0f;
  const uint16_t scale_bits = f32_to_f16(scale);
  if ((scale_bits & kF16Exponent) == kF16Exponent) return false;
  put_u16(scale_bits, out);
  for (int64_t i = 0; i < kQ8Block; ++i)
    out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::lround(values[i] * inverse)));
  return true;
}

}  // namespace

const char* ggml_type_name(GgmlType type) {
  for (const TypeName& entry : kNames) {
    if (entry.type == type) return entry.name;
  }
  CHECK(false);
  return "";
}

std::optional<GgmlType> parse_ggml_type(std::string_view name) {
  for (const TypeName& entry : kNames) {
    if (name == entry.name) return entry.type;
  }
  return std::nullopt;
}

int64_t ggml_block(GgmlType type) { return type == GgmlType::kQ8_0 ? kQ8Block : 1; }

uint64_t ggml_row_bytes(GgmlType type, int64_t elements) {
  CHECK_EQ(elements % ggml_block(type), 0);
  const auto count = static_cast<uint64_t>(elements);
  switch (type) {
    case GgmlType::kF32:
      return count * 4;
    case GgmlType::kF16:
    case GgmlType::kBF16:
      return count * 2;
    case GgmlType::kQ8_0:
      return count / kQ8Block * kQ8BlockBytes;
  }
  CHECK(false);
  return 0;
}

bool encode_ggml_row(GgmlType type, std::span<const float> values, uint8_t* out) {
  for (const float value : values) {
    if (!std::isfinite(value)) return false;
  }
  switch (type) {
    case GgmlType::kF32:
      std::memcpy(out, values.data(), values.size_bytes());
      return true;
    case GgmlType::kF16:
      for (size_t i = 0; i < values.size(); ++i) {
        const uint16_t bits = f32_to_f16(values[i]);
        if ((bits & kF16Exponent) == kF16Exponent) return false;
        put_u16(bits, out + 2 * i);
      }
      return true;
    case GgmlType::kBF16:
      for (size_t i = 0; i < values.size(); ++i) {
        const uint16_t bits = f32_to_bf16(values[i]);
        if ((bits & 0x7F80) == 0x7F80) return false;
        put_u16(bits, out + 2 * i);
      }
      return true;
    case GgmlType::kQ8_0:
      for (size_t i = 0; i < values.size(); i += kQ8Block) {
        if (!encode_q8_block(values.data() + i, out + i / kQ8Block * kQ8BlockBytes)) return false;
      }
      return true;
  }
  CHECK(false);
  return false;
}

}  // namespace indexcache
