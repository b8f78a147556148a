#include "tensor/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "base/rng.h"
#include "tensor/tensor.h"

namespace indexcache {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(DType, NamesAndSizes) {
  for (int i = 0; i <= static_cast<int>(DType::kF64); ++i) {
    const DType dtype = static_cast<DType>(i);
    EXPECT_EQ(parse_dtype(dtype_name(dtype)), dtype);
    EXPECT_GE(dtype_bytes(dtype), 1);
  }
  EXPECT_STREQ(dtype_name(DType::kF8E4M3), "F8_E4M3");
  EXPECT_EQ(dtype_bytes(DType::kBF16), 2);
  EXPECT_EQ(dtype_bytes(DType::kF64), 8);
  for (const char* name : {"", "f32", "F16 ", "F8", "BFLOAT16", "F4"})
    EXPECT_EQ(parse_dtype(name), std::nullopt) << name;
}

// A 16-bit float of `mantissa_bits` by the definition of the format.
double value_by_definition(int bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits >> (exponent_bits + mantissa_bits) ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

struct Format {
  const char* name;
  int exponent_bits, mantissa_bits;
  float (*to_f32)(uint16_t);
  uint16_t (*from_f32)(float);
};
const Format kFormats[] = {{"bf16", 8, 7, bf16_to_f32, f32_to_bf16},
                           {"f16", 5, 10, f16_to_f32, f32_to_f16}};

TEST(DType, Every16BitPatternHasItsValueAndComesBack) {
  for (const Format& format : kFormats) {
    for (int bits = 0; bits < 65536; ++bits) {
      const float value = format.to_f32(static_cast<uint16_t>(bits));
      const double want = value_by_definition(bits, format.exponent_bits, format.mantissa_bits);
      ASSERT_EQ(std::isnan(value), std::isnan(want)) << format.name << " " << bits;
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(format.to_f32(format.from_f32(value)))) << bits;
        continue;
      }
      ASSERT_EQ(value, want) << format.name << " " << bits;
      ASSERT_EQ(format.from_f32(value), bits) << format.name;
    }
  }
}

// Between any two neighbours: just below the middle goes down, the middle to the even one, just
// above goes up.
TEST(DType, RoundsToNearestTiesToEven) {
  for (const Format& format : kFormats) {
    const int infinity = ((1 << format.exponent_bits) - 1) << format.mantissa_bits;
    for (int bits = 0; bits + 1 < infinity; ++bits) {
      const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
      const double middle =
          (static_cast<double>(format.to_f32(low)) + static_cast<double>(format.to_f32(high))) / 2;
      const float tie = static_cast<float>(middle);
      if (tie != middle) continue;  // bf16's smallest steps are f32's own
      const uint16_t even = bits % 2 == 0 ? low : high;
      for (const int sign : {0, 0x8000}) {
        const float s = sign ? -1.0f : 1.0f;
        ASSERT_EQ(format.from_f32(s * tie), sign | even) << format.name << " " << bits;
        ASSERT_EQ(format.from_f32(s * std::nextafter(tie, 0.0f)), sign | low) << bits;
        ASSERT_EQ(format.from_f32(s * std::nextafter(tie, kInfinity)), sign | high) << bits;
      }
    }
  }
}

TEST(DType, OverflowAndSpecialValues) {
  EXPECT_EQ(f32_to_f16(65504.0f), 0x7BFF);
  EXPECT_EQ(f32_to_f16(65519.996f), 0x7BFF);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7C00);
  EXPECT_EQ(f32_to_f16(-1e30f), 0xFC00);
  EXPECT_EQ(f32_to_f16(-kInfinity), 0xFC00);
  EXPECT_EQ(f32_to_f16(1e-30f), 0);
  EXPECT_EQ(f32_to_bf16(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_EQ(f32_to_bf16(-0.0f), 0x8000);
  // A NaN whose payload lies in the bits that go must not become infinity.
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7F800001u)))));
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(std::bit_cast<float>(0xFF800001u)))));
}

double f8_by_definition(int bits) {
  if ((bits & 0x7F) == 0x7F) return NAN;
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double magnitude =
      exponent == 0 ? mantissa / 512.0 : std::ldexp(1 + mantissa / 8.0, exponent - 7);
  return bits & 0x80 ? -magnitude : magnitude;
}

// The nearest of all 127 magnitudes by search; the even pattern of two equally near.
uint8_t nearest_f8(float value) {
  const double magnitude = std::abs(static_cast<double>(value));
  int best = 0;
  for (int bits = 1; bits < 0x7F; ++bits) {
    const double d = std::abs(f8_by_definition(bits) - magnitude);
    const double best_d = std::abs(f8_by_definition(best) - magnitude);
    if (d < best_d || (d == best_d && bits % 2 == 0)) best = bits;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

TEST(F8E4M3, EveryPatternHasItsValueAndComesBack) {
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<uint8_t>(bits);
    const float value = f8e4m3_to_f32(byte);
    const double want = f8_by_definition(bits);
    EXPECT_EQ(std::isnan(value), std::isnan(want)) << bits;
    if (!std::isnan(want)) {
      EXPECT_EQ(value, want) << bits;
    }
    EXPECT_EQ(f32_to_f8e4m3(value), bits) << bits;
    EXPECT_EQ(std::bit_cast<uint32_t>(f8e4m3_table()[bits]), std::bit_cast<uint32_t>(value));
  }
}

TEST(F8E4M3, RoundsToTheNearest) {
  for (int bits = 0; bits < 0x7E; ++bits) {
    const float middle =
        static_cast<float>((f8_by_definition(bits) + f8_by_definition(bits + 1)) / 2);
    for (const float s : {1.0f, -1.0f}) {
      for (const float x :
           {s * middle, s * std::nextafter(middle, 0.0f), s * std::nextafter(middle, kInfinity)})
        EXPECT_EQ(f32_to_f8e4m3(x), nearest_f8(x)) << x;
    }
  }
  Rng rng(4);
  for (int i = 0; i < 20000; ++i) {
    const float x = std::ldexp(rng.normal(), static_cast<int>(rng.below(24)) - 14);
    ASSERT_EQ(f32_to_f8e4m3(x), nearest_f8(x)) << x;
  }
}

TEST(F8E4M3, SaturatesAndKeepsNan) {
  for (const float x : {448.0f, 449.0f, 464.0f, 480.0f, 1e30f, kInfinity}) {
    EXPECT_EQ(f32_to_f8e4m3(x), 0x7E) << x;
    EXPECT_EQ(f32_to_f8e4m3(-x), 0xFE) << x;
  }
  EXPECT_EQ(f32_to_f8e4m3(kNan) & 0x7F, 0x7F);
  EXPECT_EQ(f32_to_f8e4m3(1e-30f), 0);
  EXPECT_EQ(f32_to_f8e4m3(-1e-30f), 0x80);
}

TEST(Tensor, ShapesAndSizes) {
  EXPECT_EQ(num_elements({}), 1);
  EXPECT_EQ(num_elements({3, 0, 5}), 0);
  EXPECT_EQ(num_elements({3, 128}), 384);
  EXPECT_EQ(shape_string({}), "[]");
  EXPECT_EQ(shape_string({3, 128}), "[3, 128]");
  Tensor tensor(DType::kBF16, {3, 5});
  EXPECT_EQ(tensor.memory.num_bytes(), 30u);
  EXPECT_EQ(tensor.view().num_bytes(), 30);
  EXPECT_TRUE(tensor.view().present());
  EXPECT_FALSE(TensorView().present());
  tensor.as<uint16_t>()[14] = f32_to_bf16(2.5f);
  const std::vector<float> values = to_f32(tensor.view());
  ASSERT_EQ(values.size(), 15u);
  EXPECT_EQ(values[14], 2.5f);
  EXPECT_EQ(values[0], 0);
}

TEST(Tensor, ReadsFloatsAtAnyAddress) {
  uint8_t bytes[40] = {};
  const double d = 1.5;
  const float f = -2.25f;
  const uint16_t half = f32_to_f16(0.5f), brain = f32_to_bf16(-8);
  std::copy_n(reinterpret_cast<const uint8_t*>(&d), 8, bytes + 9);
  EXPECT_EQ(element_as_f32({DType::kF64, {2}, bytes + 1}, 1), 1.5f);
  std::copy_n(reinterpret_cast<const uint8_t*>(&f), 4, bytes + 7);
  EXPECT_EQ(element_as_f32({DType::kF32, {2}, bytes + 3}, 1), -2.25f);
  std::copy_n(reinterpret_cast<const uint8_t*>(&half), 2, bytes + 3);
  EXPECT_EQ(element_as_f32({DType::kF16, {2}, bytes + 1}, 1), 0.5f);
  std::copy_n(reinterpret_cast<const uint8_t*>(&brain), 2, bytes + 3);
  EXPECT_EQ(element_as_f32({DType::kBF16, {2}, bytes + 1}, 1), -8);
  bytes[2] = f32_to_f8e4m3(448);
  EXPECT_EQ(element_as_f32({DType::kF8E4M3, {2}, bytes + 1}, 1), 448);
  for (const DType dtype : {DType::kI32, DType::kBool, DType::kF8E5M2})
    EXPECT_THROW(element_as_f32({dtype, {2}, bytes}, 0), Error);
}

TEST(TensorDeathTest, WrongElementSizeIsABug) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Tensor tensor(DType::kBF16, {3});
  EXPECT_DEATH(tensor.as<float>(), "CHECK failed");
}

}  // namespace
}  // namespace indexcache
