#include "checkpoint/safetensors.h"

#include "base/json.h"
#include "base/rng.h"
#include "base/units.h"
#include "checkpoint/safetensors_writer.h"
#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

SafetensorsFile parse(const std::string& bytes) {
  return parse_safetensors(as_bytes(bytes), "shard.safetensors");
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

struct BadFile {
  const char* name;
  std::string bytes;
  std::vector<std::string> message;  // must all occur, besides the file's name
};

std::vector<BadFile> bad_files() {
  const std::string one = R"({"a":)" + entry("U8", "[4]", "[0,4]") + "}";
  const auto pair = [](const std::string& a, const std::string& b) {
    return R"({"a":)" + entry("U8", "[4]", a) + R"(,"b":)" + entry("U8", "[4]", b) + "}";
  };
  const auto single = [](const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    return R"({"a":)" + entry(dtype, shape, offsets) + "}";
  };
  return {
      {"empty", "", {"HeaderTooSmall", "0 bytes"}},
      {"seven bytes", std::string(7, '\0'), {"HeaderTooSmall", "7 bytes", "at least 8"}},
      {"length 2^64-1", std::string(8, '\xFF'), {"HeaderTooLarge", "18446744073709551615"}},
      {"length 2^63", little_endian64(1ull << 63) + "{}", {"HeaderTooLarge"}},
      {"length 100000001", little_endian64(100'000'001) + "{}", {"HeaderTooLarge", "100000000"}},
      {"length one too long", little_endian64(3) + "{}", {"InvalidHeaderLength", "3", "2"}},
      {"length at the limit", little_endian64(100'000'000) + "{}", {"InvalidHeaderLength"}},
      {"no header", little_endian64(0), {"InvalidHeaderDeserialization", "byte 8"}},
      {"only spaces", safetensors_bytes("    "), {"InvalidHeaderDeserialization", "byte 12"}},
      {"not UTF-8", safetensors_bytes("{\"\xFF\":1}"), {"byte 10", "0xff", "UTF-8"}},
      {"overlong UTF-8", safetensors_bytes("{\"\xC0\x80\":1}"), {"byte 10", "UTF-8"}},
      {"surrogate in UTF-8", safetensors_bytes("{\"\xED\xA0\x80\":1}"), {"byte 10", "UTF-8"}},
      {"half of a pair", safetensors_bytes(R"({"\ud800":1})"), {"surrogate"}},
      {"not JSON", safetensors_bytes("{nonsense}"), {"InvalidHeaderDeserialization", "byte 9"}},
      {"an array", safetensors_bytes("[]"), {"byte 8", "expected '{'"}},
      {"byte order mark", safetensors_bytes("\xEF\xBB\xBF{}"), {"byte 8"}},
      {"NUL padding", safetensors_bytes(std::string("{}\0\0", 4)), {"byte 10", "end of the text"}},
      {"text after the object", safetensors_bytes("{} {}"), {"byte 11"}},
      {"unclosed", safetensors_bytes(R"({"a":)"), {"InvalidHeaderDeserialization"}},
      {"trailing comma", safetensors_bytes(one.substr(0, one.size() - 1) + ",}", 4), {"','"}},
      {"control byte in a name", safetensors_bytes("{\"a\nb\":1}"), {"control byte 0x0a"}},
      {"trailing byte", safetensors_bytes(one, 5), {"MetadataIncompleteBuffer", "5", "4"}},
      {"one byte short", safetensors_bytes(one, 3), {"MetadataIncompleteBuffer", "cut short"}},
      {"no data", safetensors_bytes(one), {"MetadataIncompleteBuffer"}},
      {"data without tensors", safetensors_bytes("{}", 1), {"MetadataIncompleteBuffer"}},
      {"overlap",
       safetensors_bytes(pair("[0,4]", "[3,7]"), 7),
       {"\"b\"", "InvalidOffset", "[3, 7]"}},
      {"same place", safetensors_bytes(pair("[0,4]", "[0,4]"), 4), {"InvalidOffset"}},
      {"hole", safetensors_bytes(pair("[0,4]", "[5,9]"), 9), {"\"b\"", "InvalidOffset", "at 4"}},
      {"hole at the front", safetensors_bytes(single("U8", "[4]", "[1,5]"), 5), {"InvalidOffset"}},
      {"end before begin",
       safetensors_bytes(pair("[0,4]", "[4,0]"), 8),
       {"\"b\"", "InvalidOffset"}},
      {"negative begin",
       safetensors_bytes(single("U8", "[4]", "[-1,3]"), 4),
       {"\"a\"", "InvalidOffset", "-1"}},
      {"begin 1e30",
       safetensors_bytes(single("U8", "[4]", "[1e30,4]"), 4),
       {"\"a\"", "InvalidOffset", "1e30"}},
      {"begin float",
       safetensors_bytes(single("U8", "[4]", "[0.0,4]"), 4),
       {"\"a\"", "InvalidOffset", "0.0"}},
      {"begin string",
       safetensors_bytes(single("U8", "[4]", R"(["0",4])"), 4),
       {"\"a\"", "InvalidOffset", "\"0\""}},
      {"leading zero",
       safetensors_bytes(single("U8", "[4]", "[00,4]"), 4),
       {"InvalidOffset", "00"}},
      {"offset over 2^64",
       safetensors_bytes(single("U8", "[4]", "[0,18446744073709551616]"), 4),
       {"InvalidOffset"}},
      {"end 2^64-1",
       safetensors_bytes(single("U8", "[4]", "[0,18446744073709551615]"), 4),
       {"TensorInvalidInfo"}},
      {"one offset",
       safetensors_bytes(single("U8", "[4]", "[0]"), 4),
       {"InvalidOffset", "1 items"}},
      {"three offsets", safetensors_bytes(single("U8", "[4]", "[0,4,4]"), 4), {"InvalidOffset"}},
      {"offsets an object",
       safetensors_bytes(single("U8", "[4]", "{}"), 4),
       {"expected an array", "\"a\""}},
      {"product over 2^64",
       safetensors_bytes(single("F32", "[4294967296,4294967296]", "[0,4]"), 4),
       {"\"a\"", "ValidationOverflow"}},
      {"bytes over 2^64",
       safetensors_bytes(single("F64", "[4611686018427387904]", "[0,4]"), 4),
       {"\"a\"", "ValidationOverflow"}},
      {"overflow hidden by 0",
       safetensors_bytes(single("F32", "[4294967296,4294967296,0]", "[0,0]")),
       {"ValidationOverflow"}},
      {"dim 2^63",
       safetensors_bytes(single("U8", "[9223372036854775808]", "[0,4]"), 4),
       {"\"a\"", "ValidationOverflow"}},
      {"dim 2^64",
       safetensors_bytes(single("U8", "[18446744073709551616]", "[0,4]"), 4),
       {"\"a\"", "TensorInvalidInfo"}},
      {"dim 2^31",
       safetensors_bytes(single("U8", "[2147483648]", "[0,4]"), 4),
       {"\"a\"", "TensorInvalidInfo", "2147483648"}},
      {"product over 2^31",
       safetensors_bytes(single("U8", "[65536,65537]", "[0,65536]"), 65536),
       {"TensorInvalidInfo"}},
      {"negative dim",
       safetensors_bytes(single("U8", "[-4]", "[0,4]"), 4),
       {"\"a\"", "shape", "-4"}},
      {"fractional dim",
       safetensors_bytes(single("U8", "[4.0]", "[0,4]"), 4),
       {"\"a\"", "shape", "4.0"}},
      {"65 dimensions",
       safetensors_bytes(single(
                             "U8",
                             "[1" +
                                 [] {
                                   std::string s;
                                   for (int i = 0; i < 64; ++i) s += ",1";
                                   return s;
                                 }() +
                                 "]",
                             "[0,1]"),
                         1),
       {"\"a\"", "64 dimensions"}},
      {"wrong size",
       safetensors_bytes(single("F32", "[4]", "[0,4]"), 4),
       {"\"a\"", "TensorInvalidInfo", "4 bytes", "16", "F32 [4]"}},
      {"unknown dtype",
       safetensors_bytes(single("F4", "[4]", "[0,4]"), 4),
       {"\"a\"", "\"F4\"", "BF16", "F8_E4M3"}},
      {"dtype in lower case", safetensors_bytes(single("f32", "[1]", "[0,4]"), 4), {"\"f32\""}},
      {"dtype a number", safetensors_bytes(R"({"a":{"dtype":1}})"), {"\"a\"", "dtype"}},
      {"missing dtype",
       safetensors_bytes(R"({"a":{"shape":[4],"data_offsets":[0,4]}})", 4),
       {"\"a\"", "\"dtype\" is missing"}},
      {"missing shape",
       safetensors_bytes(R"({"a":{"dtype":"U8","data_offsets":[0,4]}})", 4),
       {"\"shape\" is missing"}},
      {"missing offsets",
       safetensors_bytes(R"({"a":{"dtype":"U8","shape":[4]}})", 4),
       {"\"data_offsets\" is missing"}},
      {"unknown key", safetensors_bytes(R"({"a":{"strides":[1]}})"), {"\"a\"", "\"strides\""}},
      {"repeated key",
       safetensors_bytes(R"({"a":{"dtype":"U8","dtype":"I8"}})"),
       {"\"a\"", "duplicate", "dtype"}},
      {"repeated tensor",
       safetensors_bytes(R"({"a":)" + entry("U8", "[4]", "[0,4]") + R"(,"a":)" +
                             entry("U8", "[4]", "[0,4]") + "}",
                         4),
       {"duplicate tensor \"a\""}},
      {"repeated by escape",
       safetensors_bytes(R"({"a":)" + entry("U8", "[4]", "[0,4]") + R"(,"\u0061":)" +
                             entry("U8", "[4]", "[4,8]") + "}",
                         8),
       {"duplicate tensor \"a\""}},
      {"tensor a number", safetensors_bytes(R"({"a":1})"), {"\"a\"", "found 1", "an object"}},
      {"metadata number", safetensors_bytes(R"({"__metadata__":{"k":1}})"), {"metadata"}},
      {"metadata nested", safetensors_bytes(R"({"__metadata__":{"k":{}}})"), {"metadata"}},
      {"metadata null", safetensors_bytes(R"({"__metadata__":null})"), {"an object"}},
      {"metadata repeated",
       safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})"),
       {"duplicate"}},
      {"metadata key repeated",
       safetensors_bytes(R"({"__metadata__":{"k":"1","k":"1"}})"),
       {"duplicate", "\"k\""}},
      {"nested 100000 deep", safetensors_bytes(R"({"a":)" + std::string(100'000, '[')), {"\"a\""}},
      {"a Git LFS pointer",
       "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
       {"Git LFS pointer"}},
      {"GGUF", std::string("GGUF\x03\0\0\0", 8) + std::string(64, '\0'), {"GGUF"}},
      {"pickle",
       std::string("\x80\x02\x8A\x0A", 4) + std::string(64, 'l'),
       {"pickle", "never opened"}},
      {"pickle, little length",
       std::string("\x80\x02}q\0\0\0\0", 8) + std::string(64, '.'),
       {"pickle"}},
      {"zip", std::string("PK\x03\x04", 4) + std::string(64, '\0'), {"zip", "never opened"}},
      {"HTML", "\n<!DOCTYPE html><html><body>404</body></html>", {"HTML page"}},
      {"gzip", std::string("\x1F\x8B\x08\0\0\0\0\0", 8) + std::string(64, '\0'), {"gzip"}},
      {"error text", "Entry not found", {"text that begins \"Entry not found\""}},
      {"error JSON", R"({"error":"Repository not found"})", {"text that begins"}},
  };
}

TEST(Safetensors, RejectsBadFilesAndSaysWhy) {
  for (const BadFile& bad : bad_files()) {
    SCOPED_TRACE(bad.name);
    const std::string message = error_of([&] { parse(bad.bytes); });
    expect_contains(message, {"shard.safetensors: "});
    expect_contains(message, bad.message);
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_LT(message.size(), 1000u);
  }
}

TEST(Safetensors, NamesFromFilesCannotDriveATerminal) {
  const std::string message = error_of([] {
    parse(safetensors_bytes(R"({"a\u001b[2J\n":)" + entry("F32", "[4]", "[0,4]") + "}", 4));
  });
  expect_contains(message, {"\\x1b[2J\\x0a", "TensorInvalidInfo"});
}

TEST(Safetensors, ReadsWhitespaceAroundTheHeader) {
  const std::string one = R"({"a":)" + entry("U8", "[4]", "[0,4]") + "}";
  for (const std::string& header :
       {one + "   ", "  " + one, "\n\t\r " + one + " \r\n\t",
        R"({ "a" : {"dtype" : "U8" , "shape" : [ 4 ],"data_offsets":[ 0 , 4 ]} })" +
            std::string()}) {
    const std::string bytes = safetensors_bytes(header, 4);
    EXPECT_EQ(parse(bytes).tensors.at("a").num_bytes(), 4) << header;
  }
}

TEST(Safetensors, ReadsEmptyAndScalarTensorsInAnyOrder) {
  const std::string header =
      R"({"last":)" + entry("U8", "[2]", "[4,6]") + R"(,"scalar":)" + entry("F32", "[]", "[0,4]") +
      R"(,"none":)" + entry("F32", "[0,7]", "[4,4]") + R"(,"__metadata__":{"format":"pt"},"end":)" +
      entry("BF16", "[0]", "[6,6]") + "}";
  std::string bytes = safetensors_bytes(header, 6);
  bytes.back() = 9;
  const SafetensorsFile file = parse(bytes);
  ASSERT_EQ(file.tensors.size(), 4u);
  EXPECT_EQ(file.tensors.at("scalar").shape, Shape{});
  EXPECT_EQ(file.tensors.at("last").data[1], 9);
  EXPECT_TRUE(file.tensors.at("none").present());
  EXPECT_TRUE(file.tensors.at("end").present());
  EXPECT_EQ(file.metadata.at("format"), "pt");
  EXPECT_EQ(file.data_bytes, 6u);
  EXPECT_TRUE(parse(safetensors_bytes("{}")).tensors.empty());
}

TEST(Safetensors, ReadsEveryEscape) {
  const std::string header =
      R"({"\"\\\/\b\f\n\r\t\u00e9\u20ac\ud83d\ude00é":)" + entry("U8", "[0]", "[0,0]") + "}";
  EXPECT_EQ(parse(safetensors_bytes(header)).tensors.begin()->first,
            "\"\\/\b\f\n\r\t\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xC3\xA9");
}

std::string sample_file() {
  std::vector<TensorSpec> specs = {{"layer.0.weight", DType::kBF16, {3, 5}},
                                   {"layer.0.bias", DType::kF32, {7}},
                                   {"layer.1.weight", DType::kF8E4M3, {9, 2}},
                                   {"empty", DType::kI64, {0}},
                                   {"scalar", DType::kF64, {}}};
  std::string bytes = safetensors_header(&specs, {{"format", "pt"}}, "sample");
  uint64_t size = 0;
  for (const TensorSpec& spec : specs) size += spec.num_bytes();
  for (uint64_t i = 0; i < size; ++i) bytes.push_back(static_cast<char>(i));
  return bytes;
}

TEST(Safetensors, RejectsEveryTruncation) {
  const std::string whole = sample_file();
  ASSERT_EQ(parse(whole).tensors.size(), 5u);
  for (size_t size = 0; size < whole.size(); ++size) {
    // A copy of exactly that size, so that a sanitizer sees a read past its end.
    const std::vector<uint8_t> part(whole.begin(),
                                    whole.begin() + static_cast<std::ptrdiff_t>(size));
    const std::string message = error_of([&] { parse_safetensors(part, "cut.safetensors"); });
    EXPECT_NE(message.find("cut.safetensors"), std::string::npos) << size << ": " << message;
  }
}

// Every mutation either fails with an Error or yields tensors that lie inside the bytes.
TEST(Safetensors, SurvivesRandomMutations) {
  constexpr uint64_t kSeed = 20240607;
  std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  Rng rng(kSeed);
  const std::string whole = sample_file();
  const std::string bits = "0123456789{}[]\",:-.eEnull \\\x80\xFF";
  int accepted = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string text = whole;
    for (uint64_t change = 1 + rng.below(4); change > 0; --change) {
      const size_t at = rng.below(text.size());
      const char byte = bits[rng.below(bits.size())];
      switch (rng.below(4)) {
        case 0:
          text[at] = byte;
          break;
        case 1:
          text.insert(at, 1, byte);
          break;
        case 2:
          text.erase(at, 1 + rng.below(3));
          break;
        default:
          text[at] = static_cast<char>(rng.next());
          break;
      }
      if (text.empty()) text = "x";
    }
    const std::vector<uint8_t> exact(text.begin(), text.end());
    try {
      const SafetensorsFile file = parse_safetensors(exact, "mutated");
      ++accepted;
      uint64_t total = 0;
      for (const auto& [name, view] : file.tensors) {
        ASSERT_GE(view.data, exact.data());
        ASSERT_LE(view.data + view.num_bytes(), exact.data() + exact.size());
        total += static_cast<uint64_t>(view.num_bytes());
      }
      ASSERT_EQ(total, file.data_bytes);
    } catch (const Error&) {
      continue;
    }
  }
  EXPECT_GT(accepted, 0);
}

// A second parser (a JSON document) must see the same tensors at the same places.
TEST(Safetensors, AgreesWithAJsonDocument) {
  const std::string bytes = sample_file();
  const SafetensorsFile file = parse(bytes);
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), 8);
  const Json document = parse_json(bytes.substr(8, header_bytes), "sample");
  EXPECT_EQ(document.size(), file.tensors.size() + 1);
  for (const auto& [name, view] : file.tensors) {
    const Json& info = document.at(name);
    EXPECT_EQ(info.at("dtype").get<std::string>(), dtype_name(view.dtype));
    EXPECT_EQ(info.at("shape").get<Shape>(), view.shape);
    EXPECT_EQ(
        view.data - as_bytes(bytes).data(),
        static_cast<std::ptrdiff_t>(8 + header_bytes + info.at("data_offsets")[0].get<uint64_t>()));
  }
}

TEST(Safetensors, BoundsTheNumberOfTensors) {
  std::string header = "{";
  for (int i = 0; header.size() < 99'000'000; ++i) {
    header += fmt::format("{}\"{}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}",
                          i ? "," : "", i);
  }
  const std::string bytes = safetensors_bytes(header + "}");
  const uint64_t before = peak_rss_bytes();
  expect_contains(error_of([&] { parse(bytes); }), {"shard.safetensors", "1000000 tensors"});
  EXPECT_LT(peak_rss_bytes() - before, 600u << 20);
}

TEST(Safetensors, BoundsNestingInALargeHeader) {
  const std::string bytes = safetensors_bytes("{\"a\":{\"dtype\":" + std::string(99'000'000, '['));
  expect_contains(error_of([&] { parse(bytes); }), {"shard.safetensors", "\"a\""});
}

TEST(Safetensors, BoundsMetadata) {
  std::string header = R"({"__metadata__":{"x":"")";
  for (int i = 0; i < 100'001; ++i) header += fmt::format(",\"{}\":\"\"", i);
  expect_contains(error_of([&] { parse(safetensors_bytes(header + "}}")); }),
                  {"__metadata__", "100000"});
}

}  // namespace
}  // namespace indexcache
