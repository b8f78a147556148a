#include "checkpoint/checkpoint.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "base/units.h"
#include "checkpoint/block_scales.h"
#include "checkpoint/nonfinite.h"
#include "checkpoint/safetensors_writer.h"
#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

constexpr const char* kIndex = "model.safetensors.index.json";

void write_shard(const std::string& path, const std::vector<std::string>& names) {
  std::vector<Tensor> owned;
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (const std::string& name : names) {
    owned.push_back(filled(DType::kF32, {3}, static_cast<uint8_t>(owned.size())));
    tensors.emplace_back(name, owned.back().view());
  }
  write_safetensors(path, tensors, {{"format", "pt"}});
}

std::string index_json(const std::vector<std::pair<std::string, std::string>>& weight_map) {
  std::string text = R"({"metadata":{"total_size":1},"weight_map":{)";
  for (size_t i = 0; i < weight_map.size(); ++i) {
    text += fmt::format("{}\"{}\":\"{}\"", i ? "," : "", weight_map[i].first, weight_map[i].second);
  }
  return text + "}}";
}

std::string open_error(const std::string& path) {
  return error_of([&] { Checkpoint::open(path); });
}

TEST(Checkpoint, OpensASingleFileByFolderAndByPath) {
  const TempFolder folder;
  write_shard(folder / "model.safetensors", {"b", "a"});
  for (const std::string& path :
       {folder.path(), folder / "model.safetensors", folder.path() + "/"}) {
    Checkpoint opened = Checkpoint::open(path);
    const TensorView* before = opened.find("a");
    const Checkpoint checkpoint = std::move(opened);
    EXPECT_EQ(checkpoint.path, path);
    EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b"}));
    EXPECT_EQ(checkpoint.total_bytes, 24u);
    EXPECT_EQ(checkpoint.find("a"), before);
    EXPECT_EQ(checkpoint.find("c"), nullptr);
    EXPECT_TRUE(checkpoint.file_of(*before).ends_with("/model.safetensors"));
  }
}

TEST(Checkpoint, HoldsWeightsMadeInMemory) {
  Checkpoint checkpoint;
  for (int i = 0; i < 100; ++i) checkpoint.add(fmt::format("t{}", i), filled(DType::kBF16, {i}, 1));
  EXPECT_EQ(checkpoint.total_bytes, 2u * 99 * 100 / 2);
  EXPECT_TRUE(checkpoint.find("t0")->present());
  Checkpoint moved = std::move(checkpoint);
  EXPECT_EQ(moved.find("t99")->data[0], 1);
  EXPECT_DEATH(moved.add("t5", Tensor()), "CHECK failed");
}

TEST(Checkpoint, ListsWhatAFolderWithoutCheckpointHolds) {
  const TempFolder folder;
  expect_contains(open_error(folder.path()), {folder.path(), "model.safetensors", "it is empty"});
  folder.write("pytorch_model.bin", std::string("PK\x03\x04", 4) + std::string(60, '\0'));
  folder.write("m.gguf", "GGUF" + std::string(60, '\0'));
  folder.write("model-00001-of-00002.safetensors", "");
  expect_contains(open_error(folder.path()),
                  {folder.path(), "pytorch_model.bin (a zip archive", "m.gguf (a GGUF",
                   "model-00001-of-00002.safetensors"});
  for (int i = 0; i < 30; ++i) folder.write(fmt::format("n{}", i), "");
  expect_contains(open_error(folder.path()), {"and 13 more"});
  expect_contains(open_error(folder / "nothing"), {folder / "nothing", "not found"});
  write_shard(folder / "model.safetensors", {"a"});
  write_shard(folder / "model-00001-of-00002.safetensors", {"a"});
  folder.write(kIndex, index_json({{"a", "model-00001-of-00002.safetensors"}}));
  expect_contains(open_error(folder.path()), {folder.path(), "both", kIndex});
  folder.write(kIndex, index_json({{"a", "model.safetensors"}}));
  EXPECT_EQ(Checkpoint::open(folder.path()).names().size(), 1u);
}

TEST(Checkpoint, NamesTheFileThatIsNotSafetensors) {
  const TempFolder folder;
  folder.write("model.safetensors",
               "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  expect_contains(open_error(folder.path()), {folder / "model.safetensors", "Git LFS pointer"});
}

TEST(Checkpoint, RejectsShardNamesThatLeaveTheFolder) {
  const TempFolder folder;
  for (const char* name : {"../../etc/passwd", "/etc/passwd", "..", ".", "", "sub/a.safetensors",
                           "../a.safetensors", "/abs.safetensors", "a\\\\b.safetensors",
                           "a\\u0000.safetensors", ".hidden.safetensors", "passwd"}) {
    folder.write(kIndex, index_json({{"weight", name}}));
    expect_contains(open_error(folder.path()), {folder / kIndex, "\"weight\"", "plain name"});
  }
}

TEST(Checkpoint, RejectsBadIndexFiles) {
  const TempFolder folder;
  const std::pair<std::string, std::string> cases[] = {
      {"", "byte 0"},
      {"{}", "weight_map"},
      {R"({"weight_map":{}})", "empty"},
      {R"({"weight_map":[]})", "an object"},
      {R"({"weight_map":{"a":1}})", "a file name"},
      {R"({"weight_map":{"a":"x.safetensors","a":"x.safetensors"}})", "duplicate tensor"},
      {R"({"weight_map":{"a":"x.safetensors"},"weight_map":{}})", "duplicate key"},
      {R"({"metadata":)" + std::string(100'000, '[') + "}", "nested deeper"},
      {R"({"metadata":{"total_size":01},"weight_map":{}})", "byte 27"},
      {std::string("{\"weight_map\":{\"a\":\"x.safetensors\"}}\0", 37), "byte 36"},
      {"version https://git-lfs.github.com/spec/v1\n", "byte 0"},
  };
  for (const auto& [text, expected] : cases) {
    folder.write(kIndex, text);
    expect_contains(open_error(folder.path()), {folder / kIndex, expected});
  }
}

TEST(Checkpoint, ListsEveryMissingShard) {
  const TempFolder folder;
  write_shard(folder / "s1.safetensors", {"t1"});
  std::vector<std::pair<std::string, std::string>> map;
  for (int i = 0; i < 200; ++i)
    map.emplace_back(fmt::format("t{}", i), fmt::format("s{}.safetensors", i));
  folder.write(kIndex, index_json(map));
  const std::string message = open_error(folder.path());
  expect_contains(message, {folder / kIndex, "199 of 200 shards"});
  for (int i = 0; i < 200; ++i) {
    EXPECT_EQ(message.find(fmt::format(" s{}.safetensors", i)) != std::string::npos, i != 1) << i;
  }
}

TEST(Checkpoint, NamesTheBrokenShard) {
  const TempFolder folder;
  write_shard(folder / "s1.safetensors", {"a"});
  write_shard(folder / "s2.safetensors", {"b"});
  folder.write(kIndex, index_json({{"a", "s1.safetensors"}, {"b", "s2.safetensors"}}));
  fs::resize_file(folder / "s2.safetensors", fs::file_size(folder / "s2.safetensors") - 1);
  expect_contains(open_error(folder.path()),
                  {folder / "s2.safetensors", "MetadataIncompleteBuffer"});
}

TEST(Checkpoint, ReportsTensorsThatIndexAndShardsDisagreeAbout) {
  const TempFolder folder;
  write_shard(folder / "s1.safetensors", {"a", "twice"});
  write_shard(folder / "s2.safetensors", {"b", "twice"});
  folder.write(kIndex, index_json({{"a", "s1.safetensors"},
                                   {"b", "s2.safetensors"},
                                   {"twice", "s1.safetensors"},
                                   {"gone", "s2.safetensors"}}));
  expect_contains(open_error(folder.path()),
                  {folder / kIndex, "2 tensors", "\"twice\" is in s2.safetensors",
                   "only in s1.safetensors", "\"gone\" is not in s2.safetensors"});
}

TEST(Checkpoint, LeavesOutWhatTheIndexDoesNotNameWithOneWarning) {
  const TempFolder folder;
  write_shard(folder / "s1.safetensors", {"a", "extra1"});
  write_shard(folder / "s2.safetensors", {"b", "extra2"});
  folder.write(kIndex, index_json({{"a", "s1.safetensors"}, {"b", "s2.safetensors"}}));
  testing::internal::CaptureStderr();
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(checkpoint.total_bytes, 24u);
  expect_contains(log, {"warning: ", "2 tensors", "\"extra1\" in s1.safetensors"});
  EXPECT_EQ(std::count(log.begin(), log.end(), '\n'), 1);
}

TEST(Checkpoint, FollowsLinksOnlyInsideTheFolderAndTheHubCache) {
  const TempFolder root;
  const std::string repo = root / "models--org--name", snapshot = repo + "/snapshots/abc";
  fs::create_directories(snapshot);
  fs::create_directories(repo + "/blobs");
  fs::create_directories(root / "models--org--other/blobs");
  write_shard(repo + "/blobs/hash", {"a"});
  fs::create_symlink("../../blobs/hash", snapshot + "/model.safetensors");
  EXPECT_EQ(Checkpoint::open(snapshot).names().size(), 1u);
  fs::create_directory_symlink(snapshot, root / "alias");
  EXPECT_EQ(Checkpoint::open(root / "alias").names().size(), 1u);
  EXPECT_EQ(Checkpoint::open(snapshot + "/model.safetensors").names().size(), 1u);

  const auto relink = [&](const std::string& target) {
    fs::remove(snapshot + "/model.safetensors");
    fs::create_symlink(target, snapshot + "/model.safetensors");
    return open_error(snapshot);
  };
  write_shard(root / "outside", {"a"});
  write_shard(root / "models--org--other/blobs/hash", {"a"});
  for (const std::string& target :
       {root / "outside", std::string("../../../models--org--other/blobs/hash"),
        std::string("/etc/passwd")}) {
    expect_contains(relink(target),
                    {snapshot + "/model.safetensors", "outside the model's folder"});
  }
  expect_contains(relink("../../blobs/absent"), {snapshot, "no checkpoint"});

  // A plain folder: inside is fine, outside is not, for the index and for shards alike.
  const TempFolder plain;
  fs::create_directory(plain / "real");
  write_shard(plain / "real/s1.safetensors", {"a"});
  fs::create_symlink("real/s1.safetensors", plain / "s1.safetensors");
  plain.write(kIndex, index_json({{"a", "s1.safetensors"}}));
  EXPECT_EQ(Checkpoint::open(plain.path()).names().size(), 1u);
  fs::remove(plain / "s1.safetensors");
  fs::create_symlink(root / "outside", plain / "s1.safetensors");
  expect_contains(open_error(plain.path()),
                  {plain / "s1.safetensors", "outside the model's folder"});
  fs::rename(plain / kIndex, root / "index");
  fs::create_symlink(root / "index", plain / kIndex);
  expect_contains(open_error(plain.path()), {plain / kIndex, "outside the model's folder"});
}

TEST(Checkpoint, RefusesWhatIsNotAFile) {
  const TempFolder folder;
  fs::create_directory(folder / "model.safetensors");
  expect_contains(open_error(folder.path()), {folder / "model.safetensors", "a directory"});
  fs::remove(folder / "model.safetensors");
  ASSERT_EQ(mkfifo((folder / "model.safetensors").c_str(), 0600), 0);
  expect_contains(open_error(folder.path()), {folder / "model.safetensors", "not a regular file"});
  expect_contains(open_error("/dev/zero"), {"/dev/zero", "not a regular file"});
  fs::remove(folder / "model.safetensors");
  write_shard(folder / "model.safetensors", {"a"});
  fs::permissions(folder / "model.safetensors", fs::perms::none);
  fs::permissions(folder.path(), fs::perms{0755});
  const uid_t user = geteuid();
  ASSERT_EQ(seteuid(user == 0 ? 65534 : user), 0);  // root may read everything
  const std::string message = open_error(folder.path());
  ASSERT_EQ(seteuid(user), 0);
  expect_contains(message, {folder / "model.safetensors", "cannot open: Permission denied"});
}

TEST(Checkpoint, LoadsFromAReadOnlyFolder) {
  const TempFolder folder;
  write_shard(folder / "model.safetensors", {"a"});
  fs::permissions(folder.path(), fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_EQ(Checkpoint::open(folder.path()).names().size(), 1u);
  fs::permissions(folder.path(), fs::perms::owner_all);
}

TEST(CheckpointDeathTest, AFileCutWhileInUseEndsTheProgramWithAMessage) {
  const TempFolder folder;
  const Tensor large = filled(DType::kF32, {1 << 18}, 0);
  write_safetensors(folder / "model.safetensors", {{"a", large.view()}});
  EXPECT_EXIT(
      {
        const Checkpoint checkpoint = Checkpoint::open(folder.path());
        fs::resize_file(folder / "model.safetensors", 4096);
        const Nonfinite found = count_nonfinite(*checkpoint.find("a"));
        _exit(found.count == 0 ? 0 : 3);
      },
      testing::ExitedWithCode(1), "model.safetensors: the file was truncated");
}

TEST(Checkpoint, OpensAnIndexAsLargeAsGlm5) {
  const TempFolder folder;
  constexpr int kTensors = 118'629, kShards = 64;
  std::vector<TensorSpec> specs;
  for (int i = 0; i < kTensors; ++i) {
    specs.push_back(
        {fmt::format("model.layers.{}.mlp.experts.{}.down_proj.weight", i / 1600, i % 1600),
         DType::kU8,
         {1}});
  }
  const uint8_t byte = 5;
  write_sharded_safetensors(folder.path(), specs, {}, (kTensors + kShards - 1) / kShards,
                            [&](const TensorSpec&, const ByteSink& sink) {
                              sink({&byte, 1});
                            });
  const double start = monotonic_seconds();
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  std::printf("opened %d tensors in %s\n", kTensors,
              format_seconds(monotonic_seconds() - start).c_str());
  EXPECT_EQ(checkpoint.tensors().size(), static_cast<size_t>(kTensors));
  EXPECT_EQ(checkpoint.total_bytes, static_cast<uint64_t>(kTensors));
}

std::string golden_folder() {
  const char* from_environment = getenv("INDEXCACHE_GOLDEN");
  return from_environment != nullptr ? from_environment
                                     : std::string(INDEXCACHE_SOURCE_DIR) + "/../shared/golden";
}

TEST(CheckpointGolden, LoadsEveryCase) {
  const fs::path golden = golden_folder();
  if (!fs::is_directory(golden)) GTEST_SKIP() << golden << " is absent; set INDEXCACHE_GOLDEN";
  for (const char* name :
       {"glm-dsa-full", "glm-dsa-shared", "glm-dsa-pattern", "deepseek-v32-yarn", "glm-dsa-fp8"}) {
    SCOPED_TRACE(name);
    const Checkpoint checkpoint = Checkpoint::open((golden / name).string());
    const Checkpoint expected = Checkpoint::open((golden / name / "expected.safetensors").string());
    EXPECT_NO_THROW(check_finite(checkpoint));
    ASSERT_NE(checkpoint.find("model.embed_tokens.weight"), nullptr);
    ASSERT_NE(expected.find("logits"), nullptr);
    EXPECT_EQ(expected.find("logits")->shape.at(0), expected.find("input_ids")->shape.at(0));
    EXPECT_EQ(expected.find("mean_nll")->dtype, DType::kF64);
    size_t num_scaled = 0;
    for (const auto& [tensor, view] : checkpoint.tensors()) {
      if (view.dtype != DType::kF8E4M3) continue;
      const TensorView* scales = checkpoint.find(scale_name(tensor));
      ASSERT_NE(scales, nullptr) << tensor;
      EXPECT_FALSE(read_block_scales(view, *scales, tensor).empty());
      ++num_scaled;
    }
    EXPECT_EQ(num_scaled > 0, std::string(name) == "glm-dsa-fp8");
  }
}

}  // namespace
}  // namespace indexcache
