#include "checkpoint/safetensors_writer.h"

#include "base/rng.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

TEST(SafetensorsWriter, WritesTheStrictForm) {
  const TempFolder folder;
  const Tensor half = filled(DType::kBF16, {3}, 1), wide = filled(DType::kF64, {1}, 50);
  const Tensor word = filled(DType::kF32, {2, 1}, 100), byte = filled(DType::kU8, {5}, 200);
  const std::string path = folder / "out.safetensors";
  write_safetensors(path,
                    {{"b", byte.view()},
                     {"z", half.view()},
                     {"m", word.view()},
                     {"a", half.view()},
                     {"y", wide.view()}},
                    {{"format", "pt"}});
  const std::string bytes = read_file(path);
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), 8);
  EXPECT_EQ(bytes[8], '{');
  EXPECT_EQ(header_bytes % 8, 0u);
  EXPECT_EQ(bytes.size(), 8 + header_bytes + 8 + 8 + 6 + 6 + 5);
  const std::string header = bytes.substr(8, header_bytes);
  const std::string expected =
      R"({"__metadata__":{"format":"pt"},"y":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)"
      R"("m":{"dtype":"F32","shape":[2, 1],"data_offsets":[8,16]},)"
      R"("a":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},)"
      R"("z":{"dtype":"BF16","shape":[3],"data_offsets":[22,28]},)"
      R"("b":{"dtype":"U8","shape":[5],"data_offsets":[28,33]}})";
  EXPECT_EQ(header.substr(0, expected.size()), expected);
  EXPECT_EQ(header.find_first_not_of(' ', expected.size()), std::string::npos);
}

TEST(SafetensorsWriter, RoundTripsEveryDtypeAndIsDeterministic) {
  const TempFolder folder;
  constexpr uint64_t kSeed = 7;
  std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  Rng rng(kSeed);
  std::vector<Tensor> owned;
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (int round = 0; round < 64; ++round) {
    Shape shape;
    for (uint64_t rank = rng.below(4); rank > 0; --rank)
      shape.push_back(static_cast<int64_t>(rng.below(6)));
    owned.push_back(
        filled(static_cast<DType>(round % 16), shape, static_cast<uint8_t>(rng.next())));
    tensors.emplace_back(fmt::format("t\"\\\n\xC3\xA9{}", round), owned.back().view());
  }
  const Metadata metadata = {{"k\t", "v\"\\ \xE2\x82\xAC"}, {"", ""}};
  write_safetensors(folder / "a.safetensors", tensors, metadata);
  std::reverse(tensors.begin(), tensors.end());
  write_safetensors(folder / "b.safetensors", tensors, metadata);
  EXPECT_EQ(read_file(folder / "a.safetensors"), read_file(folder / "b.safetensors"));

  const Checkpoint back = Checkpoint::open(folder / "a.safetensors");
  EXPECT_EQ(back.metadata, metadata);
  ASSERT_EQ(back.tensors().size(), tensors.size());
  for (const auto& [name, view] : tensors) {
    const TensorView* found = back.find(name);
    ASSERT_NE(found, nullptr) << name;
    EXPECT_TRUE(same_bytes(*found, view)) << name;
    EXPECT_EQ(
        reinterpret_cast<uintptr_t>(found->data) % static_cast<uintptr_t>(dtype_bytes(view.dtype)),
        0u)
        << name;
  }
}

TEST(SafetensorsWriter, RefusesBadNames) {
  const TempFolder folder;
  const Tensor tensor = filled(DType::kU8, {1}, 0);
  const auto message = [&](const std::vector<std::string>& names) {
    std::vector<std::pair<std::string, TensorView>> tensors;
    for (const std::string& name : names) tensors.emplace_back(name, tensor.view());
    return error_of([&] { write_safetensors(folder / "o.safetensors", tensors); });
  };
  expect_contains(message({"a", "b", "a"}), {"o.safetensors", "two tensors", "\"a\""});
  expect_contains(message({"__metadata__"}), {"o.safetensors", "__metadata__"});
  expect_contains(message({"a\xFF"}), {"o.safetensors", "UTF-8"});
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(SafetensorsWriter, AFailedSourceLeavesTheOldFile) {
  const TempFolder folder;
  const std::string path = folder.write("o.safetensors", "old");
  const std::string message = error_of([&] {
    stream_safetensors(path, {{"a", DType::kU8, {1 << 22}}}, {},
                       [](const TensorSpec&, const ByteSink& sink) {
                         sink(std::vector<uint8_t>(1 << 21));
                         fail("the source broke");
                       });
  });
  EXPECT_EQ(message, "the source broke");
  EXPECT_EQ(read_file(path), "old");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

std::vector<TensorSpec> ten_specs() {
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 10; ++i)
    specs.push_back({fmt::format("layers.{}.weight", i), DType::kF32, {25}});
  return specs;
}

// Every element is the number in the tensor's name; given in pieces.
void give_numbers(const TensorSpec& spec, const ByteSink& sink) {
  const float value = std::stof(spec.name.substr(7));
  for (int64_t i = 0; i < num_elements(spec.shape); ++i) {
    sink({reinterpret_cast<const uint8_t*>(&value), sizeof(value)});
  }
}

TEST(SafetensorsWriter, ShardsAndReadsBack) {
  const TempFolder folder;
  const auto files =
      write_sharded_safetensors(folder.path(), ten_specs(), {{"format", "pt"}}, 300, give_numbers);
  EXPECT_EQ(files, (std::vector<std::string>{
                       "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors",
                       "model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors",
                       "model.safetensors.index.json"}));
  const std::string index = read_file(folder / "model.safetensors.index.json");
  expect_contains(
      index, {"\"total_size\": 1000", "\"layers.9.weight\": \"model-00004-of-00004.safetensors\""});
  const Checkpoint back = Checkpoint::open(folder.path());
  EXPECT_EQ(back.total_bytes, 1000u);
  EXPECT_EQ(back.metadata.at("format"), "pt");
  EXPECT_EQ(back.names().size(), 10u);
  for (int i = 0; i < 10; ++i) {
    const TensorView* view = back.find(fmt::format("layers.{}.weight", i));
    ASSERT_NE(view, nullptr);
    EXPECT_EQ(to_f32(*view), std::vector<float>(25, static_cast<float>(i)));
  }
}

TEST(SafetensorsWriter, OneShardNeedsNoIndexAndATensorOverTheLimitStandsAlone) {
  const TempFolder one, many;
  EXPECT_EQ(write_sharded_safetensors(one.path(), ten_specs(), {}, 1000, give_numbers),
            std::vector<std::string>{"model.safetensors"});
  EXPECT_EQ(Checkpoint::open(one.path()).total_bytes, 1000u);
  EXPECT_EQ(write_sharded_safetensors(many.path(), ten_specs(), {}, 1, give_numbers).size(), 11u);
  EXPECT_EQ(Checkpoint::open(many.path()).total_bytes, 1000u);

  expect_contains(
      error_of([&] { write_sharded_safetensors(one.path(), ten_specs(), {}, 300, give_numbers); }),
      {one.path(), "already holds model.safetensors"});
  expect_contains(error_of([&] {
                    write_sharded_safetensors(many.path(), ten_specs(), {}, 1000, give_numbers);
                  }),
                  {many.path(), "already holds model.safetensors.index.json"});
}

TEST(SafetensorsWriter, ANameInTwoShardsIsRefusedBeforeAnyWrite) {
  const TempFolder folder;
  auto specs = ten_specs();
  specs.back().name = specs.front().name;
  expect_contains(
      error_of([&] { write_sharded_safetensors(folder.path(), specs, {}, 300, give_numbers); }),
      {"two tensors", "layers.0.weight"});
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace indexcache
