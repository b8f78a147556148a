#include "checkpoint/block_scales.h"

#include <limits>

#include "base/rng.h"
#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

constexpr const char* kWhere = "m.safetensors: \"x.weight\"";

Tensor scales_of(const std::vector<float>& values, const Shape& shape) {
  Tensor tensor(DType::kF32, shape);
  std::copy(values.begin(), values.end(), tensor.as<float>());
  return tensor;
}

TEST(BlockScales, NamesAndShapes) {
  EXPECT_EQ(scale_name("layers.0.wq.weight"), "layers.0.wq.weight_scale_inv");
  EXPECT_EQ(scale_shape({1, 128}), (Shape{1, 1}));
  EXPECT_EQ(scale_shape({129, 0}), (Shape{2, 0}));
  EXPECT_EQ(scale_shape({INT64_MAX, 256}), (Shape{(1ll << 56), 2}));
}

TEST(BlockScales, DequantizesTilesAtTheEdges) {
  constexpr uint64_t kSeed = 99;
  std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  Rng rng(kSeed);
  for (const Shape& shape : {Shape{1, 1}, Shape{128, 128}, Shape{130, 257}, Shape{127, 129},
                             Shape{0, 5}, Shape{300, 64}}) {
    Tensor weight(DType::kF8E4M3, shape);
    for (size_t i = 0; i < weight.memory.num_bytes(); ++i)
      weight.memory.data()[i] = static_cast<uint8_t>(rng.below(0x7F));
    const Shape tiles = scale_shape(shape);
    std::vector<float> values;
    for (int64_t i = 0; i < num_elements(tiles); ++i)
      values.push_back(static_cast<float>(i + 1) * 0.25f);
    const TensorView empty_ok{DType::kF8E4M3, shape, reinterpret_cast<const uint8_t*>("")};
    const TensorView view = weight.memory.num_bytes() ? weight.view() : empty_ok;
    const Tensor stored = scales_of(values, tiles);
    const TensorView scales{DType::kF32, tiles,
                            stored.memory.data() ? stored.memory.data() : empty_ok.data};
    EXPECT_EQ(read_block_scales(view, scales, kWhere), values);
    const std::vector<float> out = dequantize_blocks(view, values);
    for (int64_t r = 0; r < shape[0]; ++r) {
      for (int64_t c = 0; c < shape[1]; ++c) {
        const float scale = static_cast<float>((r / 128) * tiles[1] + c / 128 + 1) * 0.25f;
        ASSERT_EQ(out[static_cast<size_t>(r * shape[1] + c)],
                  f8e4m3_to_f32(view.data[r * shape[1] + c]) * scale);
      }
    }
  }
}

TEST(BlockScales, ConvertsBf16AndE8m0) {
  const Tensor weight = filled(DType::kF8E4M3, {1, 256}, 0);
  Tensor halves(DType::kBF16, {1, 2});
  halves.as<uint16_t>()[0] = f32_to_bf16(0.5f);
  halves.as<uint16_t>()[1] = f32_to_bf16(3.0f);
  EXPECT_EQ(read_block_scales(weight.view(), halves.view(), kWhere),
            (std::vector<float>{0.5f, 3.0f}));
  Tensor powers(DType::kF8E8M0, {1, 2});
  powers.memory.data()[0] = 0;
  powers.memory.data()[1] = 130;
  EXPECT_EQ(read_block_scales(weight.view(), powers.view(), kWhere),
            (std::vector<float>{0x1p-127f, 8.0f}));
  powers.memory.data()[1] = 255;
  expect_contains(error_of([&] { read_block_scales(weight.view(), powers.view(), kWhere); }),
                  {kWhere, "[0, 1]", "nan"});
}

TEST(BlockScales, RejectsBadScalesAndNamesTheTile) {
  const Tensor weight = filled(DType::kF8E4M3, {256, 384}, 0);
  for (const float bad :
       {0.0f, -0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(),
        std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    const Tensor scales = scales_of({1, 1, 1, 1, bad, 1}, {2, 3});
    expect_contains(error_of([&] { read_block_scales(weight.view(), scales.view(), kWhere); }),
                    {kWhere, "tile [1, 1]", "above 0"});
  }
}

TEST(BlockScales, RejectsWrongShapesAndDtypes) {
  const Tensor weight = filled(DType::kF8E4M3, {256, 384}, 0);
  const auto message = [&](const TensorView& w, const TensorView& s) {
    return error_of([&] { read_block_scales(w, s, kWhere); });
  };
  expect_contains(message(weight.view(), {}), {kWhere, "missing"});
  for (const Shape& shape : {Shape{3, 2}, Shape{2, 2}, Shape{6}, Shape{2, 3, 1}}) {
    const Tensor scales = scales_of({}, shape);
    expect_contains(message(weight.view(), scales.view()), {kWhere, shape_string(shape), "[2, 3]"});
  }
  const Tensor good = scales_of({1, 1, 1, 1, 1, 1}, {2, 3});
  expect_contains(message(weight.view(), filled(DType::kF16, {2, 3}, 1).view()),
                  {kWhere, "F16", "F8_E8M0"});
  expect_contains(message(filled(DType::kBF16, {256, 384}, 0).view(), good.view()),
                  {kWhere, "BF16", "F8_E4M3"});
  expect_contains(message(filled(DType::kF8E4M3, {256}, 0).view(), good.view()),
                  {kWhere, "two dimensions"});
}

}  // namespace
}  // namespace indexcache
