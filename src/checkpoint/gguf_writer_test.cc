#include "checkpoint/gguf_writer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/rng.h"
#include "checkpoint/test_files.h"
#include "tests/gguf_reader.h"

namespace indexcache {
namespace {

ReadGguf read_back(const std::string& path) {
  const std::string bytes = read_file(path);
  return GgufReader(bytes).read();
}

// Rows of one tensor out of a table.
RowSource rows_of(const std::vector<std::vector<float>>& tables) {
  return [tables, next = size_t{0}](const GgufTensor& tensor, const RowSink& sink) mutable {
    const std::vector<float>& table = tables[next++];
    const auto width = static_cast<size_t>(tensor.row_elements());
    for (size_t i = 0; i < table.size(); i += width) sink(std::span(table).subspan(i, width));
  };
}

std::vector<float> random_values(Rng& rng, size_t count, float scale) {
  std::vector<float> values(count);
  for (float& value : values)
    value = scale * (static_cast<float>(rng.below(1 << 24)) / float(1 << 23) - 1.0f);
  return values;
}

TEST(GgufWriter, EveryValueTypeComesBack) {
  const TempFolder temp;
  const GgufMetadata metadata = {{"a.u32", uint32_t{4000000000}},
                                 {"a.i32", int32_t{-5}},
                                 {"a.f32", 0.25f},
                                 {"a.bool", true},
                                 {"a.text", std::string("naïve\n\0x", 9)},
                                 {"a.ints", std::vector<int32_t>{1, -2}},
                                 {"a.floats", std::vector<float>{0.5f}},
                                 {"a.bools", std::vector<bool>{true, false, true}},
                                 {"a.texts", std::vector<std::string>{"", "b"}},
                                 {"a.none", std::vector<std::string>{}}};
  write_gguf(temp / "x.gguf", metadata, {}, rows_of({}));
  const ReadGguf file = read_back(temp / "x.gguf");
  EXPECT_EQ(file.version, 3u);
  EXPECT_EQ(file.metadata, Json({{"a.u32", 4000000000u},
                                 {"a.i32", -5},
                                 {"a.f32", 0.25},
                                 {"a.bool", true},
                                 {"a.text", std::string("naïve\n\0x", 9)},
                                 {"a.ints", {1, -2}},
                                 {"a.floats", {0.5}},
                                 {"a.bools", {true, false, true}},
                                 {"a.texts", {"", "b"}},
                                 {"a.none", Json::array()}}));
}

TEST(GgufWriter, TensorsAreExactOrWithinTheirBound) {
  const uint64_t seed = 11;
  SCOPED_TRACE(seed);
  Rng rng(seed);
  const TempFolder temp;
  std::vector<GgufTensor> tensors;
  std::vector<std::vector<float>> tables;
  const float scales[] = {1.0f, 1e-3f, 300.0f, 1e-6f};
  for (const GgmlType type : {GgmlType::kF32, GgmlType::kF16, GgmlType::kBF16, GgmlType::kQ8_0}) {
    for (const Shape& shape : {Shape{3, 5, 64}, Shape{7, 32}, Shape{96}, Shape{5, 3}}) {
      if (type == GgmlType::kQ8_0 && shape.back() % 32 != 0) continue;
      const size_t index = tensors.size();
      tensors.push_back({fmt::format("t{}", index), type, shape});
      tables.push_back(
          random_values(rng, static_cast<size_t>(num_elements(shape)), scales[index % 4]));
    }
  }
  tables.back()[3] = 0;
  write_gguf(temp / "x.gguf", {}, tensors, rows_of(tables));
  EXPECT_EQ(std::filesystem::file_size(temp / "x.gguf"), gguf_file_bytes({}, tensors));
  const ReadGguf file = read_back(temp / "x.gguf");
  ASSERT_EQ(file.order.size(), tensors.size());
  for (size_t t = 0; t < tensors.size(); ++t) {
    const ReadTensor& tensor = file.tensors.at(tensors[t].name);
    EXPECT_EQ(tensor.type, static_cast<uint32_t>(tensors[t].type));
    EXPECT_EQ(std::vector<int64_t>(tensor.dims.rbegin(), tensor.dims.rend()), tensors[t].shape);
    for (size_t i = 0; i < tables[t].size(); ++i) {
      const float value = tables[t][i], found = tensor.values[i];
      switch (tensors[t].type) {
        case GgmlType::kF32:
          ASSERT_EQ(found, value);
          break;
        case GgmlType::kF16:
          ASSERT_EQ(found, f16_to_f32(f32_to_f16(value)));
          break;
        case GgmlType::kBF16:
          ASSERT_EQ(found, bf16_to_f32(f32_to_bf16(value)));
          break;
        case GgmlType::kQ8_0: {
          double largest = 0;
          for (size_t j = i / 32 * 32; j < i / 32 * 32 + 32; ++j)
            largest = std::max(largest, std::abs(static_cast<double>(tables[t][j])));
          // ggml_types.h; the last factor is for the float arithmetic on the way.
          const double bound = (largest / 254 + largest * 0x1p-11 + 127 * 0x1p-25) * (1 + 0x1p-20);
          ASSERT_LE(std::abs(static_cast<double>(found) - value), bound) << t << " " << i;
          break;
        }
      }
    }
  }
}

TEST(GgufWriter, ZerosAndHugeValuesInQ8) {
  std::vector<float> row(32, 0.0f);
  std::vector<uint8_t> out(34, 0xFF);
  EXPECT_TRUE(encode_ggml_row(GgmlType::kQ8_0, row, out.data()));
  EXPECT_EQ(out, std::vector<uint8_t>(34, 0));
  row[5] = 1e-44f;  // its scale's inverse overflows
  EXPECT_TRUE(encode_ggml_row(GgmlType::kQ8_0, row, out.data()));
  EXPECT_EQ(out, std::vector<uint8_t>(34, 0));
  row[5] = -8e6f;
  EXPECT_TRUE(encode_ggml_row(GgmlType::kQ8_0, row, out.data()));
  EXPECT_EQ(static_cast<int8_t>(out[7]), -127);
  row[5] = 9e6f;  // 9e6 / 127 > 65504
  EXPECT_FALSE(encode_ggml_row(GgmlType::kQ8_0, row, out.data()));
}

TEST(GgufWriter, FaultsLeaveNothingBehind) {
  const TempFolder temp;
  const std::vector<GgufTensor> tensors = {{"w", GgmlType::kF16, {2, 2}}};
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {inf, -inf, std::nanf(""), 65520.0f}) {
    expect_contains(error_of([&] {
                      write_gguf(temp / "x.gguf", {}, tensors, rows_of({{1, 2, 3, bad}}));
                    }),
                    {"x.gguf", "row 1 of w", "f16"});
  }
  EXPECT_TRUE(std::filesystem::is_empty(temp.path()));
  temp.write("there.gguf", "kept");
  expect_contains(error_of([&] {
                    write_gguf(temp / "there.gguf", {}, tensors, rows_of({{1, 2, 3, 4}}));
                  }),
                  {"there.gguf", "already there"});
  EXPECT_EQ(read_file(temp / "there.gguf"), "kept");
  EXPECT_THROW(write_gguf(temp / "no/x.gguf", {}, tensors, rows_of({{1, 2, 3, 4}})), Error);
}

}  // namespace
}  // namespace indexcache
