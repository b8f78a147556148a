// Hostile and broken checkpoint files, given to the real program: each is refused by one line that
// says what was wrong, without a crash, within a minute and 4 GiB of address space.
#include "tests/spoil.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

const std::string kIndex = "model.safetensors.index.json";
const std::string kWeights = "model.safetensors";
const std::string kEmbedding = "model.embed_tokens.weight";
const std::string kFirstShard = "model-00001-of-00005.safetensors";

std::vector<Case> checkpoint_cases() {
  const std::string fp8_scale = "model.layers.0.self_attn.o_proj.weight_scale_inv";
  return {
      {"1 empty", file(kWeights, ""), {kWeights, "0 bytes"}},
      {"1 seven bytes", file(kWeights, "1234567"), {kWeights, "7 bytes"}},
      {"2 header of 2^64-1", file(kWeights, std::string(64, '\xFF')), {kWeights, "header"}},
      {"2 header of 2^63", file(kWeights, little_endian64(uint64_t{1} << 63) + "{}"), {"header"}},
      {"2 header too large", file(kWeights, little_endian64(100000001) + "{}"), {"100000001"}},
      {"3 header past the end", file(kWeights, little_endian64(3) + "{}"), {"header"}},
      {"4 not JSON", header_bytes("{]"), {kWeights, "byte"}},
      {"4 not UTF-8", header_bytes("{\"\xFF\":1}"), {kWeights, "byte"}},
      {"4 NUL padding", header_bytes(std::string("{}\0\0", 4)), {kWeights, "byte"}},
      {"4 BOM", header_bytes("\xEF\xBB\xBF{}"), {kWeights}},
      {"5 deep", header_bytes("{\"a\":" + std::string(100000, '[')), {kWeights, "byte"}},
      {"6 cut by one",
       [](const Model& m) { cut(kWeights, m.read(kWeights).size() - 1)(m); },
       {kWeights, "bytes"}},
      {"6 cut by half", cut(kWeights, 2000000), {kWeights, "bytes"}},
      {"6 cut in the header", cut(kWeights, 100), {kWeights, "header"}},
      {"6 cut shard", cut(kFirstShard, 4096), {kFirstShard}, Use::kInspect, Base::kSharded},
      {"7 trailing byte",
       [](const Model& m) { m.write(kWeights, m.read(kWeights) + "x"); },
       {kWeights, "bytes"}},
      {"8 overlap", header("model.norm.weight", "data_offsets", {0, 512}), {"model.norm.weight"}},
      {"8 end before begin", header(kEmbedding, "data_offsets", {8, 4}), {kEmbedding}},
      {"8 negative", header(kEmbedding, "data_offsets", {-1, 4}), {kEmbedding}},
      {"8 float", header(kEmbedding, "data_offsets", {1e30, 4}), {kEmbedding}},
      {"8 string", header(kEmbedding, "data_offsets", {"0", "4"}), {kEmbedding}},
      {"9 shape overflow", header(kEmbedding, "shape", {4294967296, 4294967296, 16}), {kEmbedding}},
      {"9 dim 2^31", header(kEmbedding, "shape", {2147483648, 0}), {kEmbedding}},
      {"10 wrong shape",
       header(kEmbedding, "shape", {256, 512}),
       {kEmbedding, "[256, 512]", "[512, 256]"},
       Use::kBoth},
      {"10 hidden size", config("hidden_size", 257), {"257", "256"}, Use::kBoth},
      {"91 NaN",
       scale("model.norm.weight", NAN),
       {"model.norm.weight", "element 0"},
       Use::kRun,
       Base::kPlain,
       {"--check-tensors", "-p", "x"}},
      {"11 many tensors",
       [](const Model& m) {
         std::string text = "{";
         for (int i = 0; i < 1500000; ++i)
           text += fmt::format("{}\"{}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
                               i ? "," : "", i);
         m.write(kWeights, safetensors_bytes(text + "}"));
       },
       {kWeights, "tensors"}},
      {"12 duplicate tensor",
       header_bytes("{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
                    "\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"),
       {"duplicate", "a"}},
      {"13 missing shard",
       [](const Model& m) { m.remove(kFirstShard); },
       {kFirstShard},
       Use::kInspect,
       Base::kSharded},
      {"13 parent folder",
       json_set(kIndex, "/weight_map/a", "../../etc/passwd"),
       {"../../etc/passwd"},
       Use::kInspect,
       Base::kSharded},
      {"13 absolute",
       json_set(kIndex, "/weight_map/a", "/etc/passwd"),
       {"/etc/passwd"},
       Use::kInspect,
       Base::kSharded},
      {"13 symlink outside",
       [](const Model& m) {
         m.remove(kFirstShard);
         fs::create_symlink("/etc/passwd", m / kFirstShard);
       },
       {kFirstShard},
       Use::kInspect,
       Base::kSharded},
      {"14 tensor not in its shard",
       json_set(kIndex, "/weight_map/extra", kFirstShard),
       {"extra"},
       Use::kInspect,
       Base::kSharded},
      {"14 tensor missing",
       [](const Model& m) {
         m.change_header([](Json& h) {
           Json& t = h["model.norm.weight"];
           h["unrelated"] = t;
           h.erase("model.norm.weight");
         });
       },
       {"model.norm.weight", "missing"},
       Use::kBoth},
      {"14 missing, surplus, wrong shape and wrong type",
       [](const Model& m) {
         m.change_header([](Json& h) {
           h["unrelated"] = h["model.norm.weight"];
           h.erase("model.norm.weight");
           h[kEmbedding]["shape"] = {256, 512};
           h["model.layers.1.self_attn.q_a_layernorm.weight"]["dtype"] = "I32";
         });
       },
       {"1 tensors missing, 2 of wrong shape or dtype, 1 surplus", "model.norm.weight",
        "\"unrelated\": surplus", kEmbedding, "found [256, 512]", "q_a_layernorm", "I32"},
       Use::kBoth},
      {"15 unknown dtype", header(kEmbedding, "dtype", "F4"), {kEmbedding, "F4"}},
      {"15 wrong size", header(kEmbedding, "dtype", "F32"), {kEmbedding}},
      {"15 integers where floats belong",
       header(kEmbedding, "dtype", "I16"),
       {kEmbedding, "I16"},
       Use::kBoth},
      {"15 fp8 where a norm belongs",
       [](const Model& m) {
         m.change_header([](Json& h) {
           h["model.norm.weight"]["dtype"] = "F8_E4M3";
           h["model.norm.weight"]["shape"] = {1024};
         });
       },
       {"model.norm.weight", "[1024] F8_E4M3", "[256] F32 or F16 or BF16"},
       Use::kBoth,
       Base::kFp8},
      {"16 scales missing",
       [](const Model& m) {
         m.change_header([](Json& h) {
           Json& t = h["model.layers.0.self_attn.o_proj.weight_scale_inv"];
           h["unrelated"] = t;
           h.erase("model.layers.0.self_attn.o_proj.weight_scale_inv");
         });
       },
       {fp8_scale},
       Use::kBoth,
       Base::kFp8},
      {"16 wrong tile count",
       header(fp8_scale, "shape", {4, 1}),
       {fp8_scale, "[4, 1]"},
       Use::kBoth,
       Base::kFp8},
      {"16 scale NaN",
       scale(fp8_scale, NAN),
       {"o_proj.weight: the block scale of tile [0, 0]"},
       Use::kRun,
       Base::kFp8},
      {"16 scale infinite",
       scale(fp8_scale, INFINITY),
       {"o_proj.weight: the block scale of tile [0, 0]"},
       Use::kRun,
       Base::kFp8},
      {"16 scale zero",
       scale(fp8_scale, 0),
       {"o_proj.weight: the block scale of tile [0, 0]"},
       Use::kRun,
       Base::kFp8},
      {"16 scale negative",
       scale(fp8_scale, -1),
       {"o_proj.weight: the block scale of tile [0, 0]"},
       Use::kRun,
       Base::kFp8},
      {"17 fp8 stated, bf16 found",
       config("quantization_config", {{"quant_method", "fp8"},
                                      {"fmt", "e4m3"},
                                      {"weight_block_size", {128, 128}},
                                      {"activation_scheme", "dynamic"}}),
       {"quantization_config"},
       Use::kBoth},
      {"17 fp8 found, not stated",
       [](const Model& m) {
         m.change_json("config.json", [](Json& c) { c.erase("quantization_config"); });
       },
       {"quantization_config"},
       Use::kBoth,
       Base::kFp8},
      {"17 other block size",
       config("quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", {64, 64}}}),
       {"weight_block_size"},
       Use::kRun,
       Base::kFp8},
      {"18 git lfs",
       file(kWeights, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
       {"LFS"}},
      {"18 gguf", file(kWeights, "GGUF\3\0\0\0\0\0\0\0\0\0\0\0"), {"GGUF"}},
      {"18 zip", file(kWeights, "PK\3\4aaaaaaaaaaaaaaaaaaaaaaaaa"), {kWeights, "zip"}},
      {"18 pickle", file(kWeights, std::string("\x80\x02}q\0\0\0\0", 8) + "aaaa"), {"pickle"}},
      {"18 only a pickle",
       [](const Model& m) {
         m.remove(kWeights);
         m.write("pytorch_model.bin", "PK\3\4aaaaaaaaaaaaaaaaaaaaaaaaa");
       },
       {"no checkpoint", "pytorch_model.bin (a zip archive"}},
      {"18 html", file(kWeights, "<!DOCTYPE html><html>404</html>"), {"HTML"}},
      {"21 layers 10^9",
       config("num_hidden_layers", 1000000000),
       {"num_hidden_layers", "1000000000"}},
      {"21 no expert", config("n_routed_experts", 0), {"n_routed_experts"}},
      {"21 more kv heads", config("num_key_value_heads", 16), {"num_key_value_heads"}},
      {"21 no vocabulary", config("vocab_size", 0), {"vocab_size"}},
      {"21 huge vocabulary", config("vocab_size", int64_t{1} << 40), {"vocab_size"}},
      {"21 rope theta 0",
       json_set("config.json", "/rope_parameters/rope_theta", 0),
       {"rope_theta"}},
      {"21 rope theta NaN", replaced("config.json", "1000000.0", "NaN"), {"config.json"}},
      {"21 experts per token", config("num_experts_per_tok", 9), {"num_experts_per_tok"}},
      {"22 flipped bit",
       [](const Model& m) {
         m.write("sums", run_program({"inspect", "-m", m.path, "--sha256"}).out);
         std::string bytes = m.read(kWeights);
         bytes[bytes.size() - 1000] ^= 1;
         m.write(kWeights, bytes);
       },
       {"1 of 4 differ, 0 missing, 0 surplus", kWeights},
       Use::kInspect,
       Base::kPlain,
       {"--verify", "sums"}},
      {"23 shrunk to a hole",
       [](const Model& m) {
         fs::resize_file((m.write(kWeights, m.read(kWeights)), m / kWeights), 5000);
       },
       {kWeights}},
      {"24 directory",
       [](const Model& m) {
         m.remove(kWeights);
         fs::create_directory(m / kWeights);
       },
       {kWeights, "directory"}},
      {"24 fifo",
       [](const Model& m) {
         m.remove(kWeights);
         mkfifo((m / kWeights).c_str(), 0600);
       },
       {kWeights}},
      {"24 /dev/zero",
       [](const Model& m) {
         m.remove("config.json");
         fs::create_symlink("/dev/zero", m / "config.json");
       },
       {"config.json"}},
      {"24 loop of links",
       [](const Model& m) {
         m.remove("config.json");
         fs::create_symlink("config.json", m / "config.json");
       },
       {"config.json"}},
  };
}

// What looks odd and is right: it runs, and says what it ignored.
TEST_F(BadInput, OddButGood) {
  const auto ignored = [](const Model& m) {
    m.change_json("config.json", [](Json& c) {
      c["auto_map"] = {{"AutoModel", "evil--code.Model"}};
    });
  };
  const auto spaces = [](const Model& m) {
    const std::string bytes = m.read(kWeights);
    uint64_t size;
    std::memcpy(&size, bytes.data(), 8);
    m.write(kWeights, little_endian64(size + 5) + " \n\t" + bytes.substr(8, size) + "\r " +
                          bytes.substr(8 + size));
  };
  const auto all_full = config("index_topk_pattern", "FF");
  const std::vector<std::string> args = {"run", "-m", *folder_ / "spoiled", "-p", "x", "-n", "4"};
  std::vector<std::string> outputs;
  for (const Spoil& change :
       {Spoil([](const Model&) {}), Spoil(ignored), Spoil(spaces), all_full}) {
    copy_base(Base::kPlain);
    change({*folder_ / "spoiled"});
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    outputs.push_back(result.out);
    EXPECT_EQ(outputs.back(), outputs.front());
    EXPECT_EQ(result.err.find("auto_map") != std::string::npos, outputs.size() == 2) << result.err;
  }
}

// 24, EIO. What is mapped fails as in 23: the kernel has one signal for both.
TEST_F(BadInput, ReadsThatFail) {
  if (prctl(PR_GET_SECCOMP) < 0) GTEST_SKIP() << "needs a kernel with seccomp";
  const Model model = copy_base(Base::kSharded);
  for (const std::string& name :
       {std::string("config.json"), std::string("tokenizer.json"), kIndex}) {
    const auto size = static_cast<uint32_t>(fs::file_size(model / name));
    const ProgramResult result =
        run_program({"run", "-m", model.path, "-p", "x", "-n", "1"}, {.failing_read = size});
    expect_failure(result, 1);
    EXPECT_NE(result.err.find(name + ": read stopped"), std::string::npos) << result.err;
    EXPECT_NE(result.err.find("Input/output error"), std::string::npos) << result.err;
  }
}

TEST_F(BadInput, Checkpoints) { run_cases(checkpoint_cases()); }

}  // namespace
}  // namespace indexcache
