// Compares with what Hugging Face tokenizers made of the same texts; tools/tokenizer/compare makes
// the cases and runs this.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/json.h"
#include "text/tokenizer.h"

namespace indexcache {
namespace {

struct Tally {
  int encoded = 0;
  int decoded = 0;
  int wrong = 0;
};

void check_case(const Tokenizer& tokenizer, const JsonObject& item, Tally* tally) {
  const auto ids = item.get("ids").get<std::vector<int32_t>>();
  bool same = true;
  if (item.has("text")) {
    const std::string text = item.string("text");
    same = tokenizer.encode(text, item.boolean_or("add_special", false),
                            item.boolean_or("parse_special", false)) == ids;
    ++tally->encoded;
  }
  same = same && tokenizer.decode(ids, false) == item.string("decoded");
  same = same && tokenizer.decode(ids, true) == item.string("decoded_skip");
  ++tally->decoded;

  StreamDecoder stream(tokenizer, true);
  std::string streamed;
  for (const int32_t id : ids) {
    const std::string piece = stream.push(id);
    same = same && !find_invalid_utf8(piece);
    streamed += piece;
  }
  streamed += stream.finish();
  same = same && streamed == item.string("decoded_skip");

  if (same || ++tally->wrong > 5) return;
  ADD_FAILURE() << item.where() << ": " << item.raw().dump();
}

TEST(TokenizerOracle, SameAsHuggingFace) {
  const char* folder = std::getenv("INDEXCACHE_TOKENIZER_CASES");
  if (folder == nullptr)
    GTEST_SKIP() << "INDEXCACHE_TOKENIZER_CASES is not set (run tools/tokenizer/compare)";
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".jsonl") continue;
    ++files;
    const Tokenizer tokenizer =
        Tokenizer::load(std::filesystem::path(entry.path()).replace_extension(".json"));
    std::ifstream in(entry.path());
    Tally tally;
    int number = 0;
    for (std::string line; std::getline(in, line);) {
      const std::string where =
          entry.path().filename().string() + " line " + std::to_string(++number);
      const Json record = parse_json(line, where);
      check_case(tokenizer, JsonObject(record, where), &tally);
    }
    EXPECT_EQ(tally.wrong, 0) << entry.path();
    EXPECT_GT(tally.encoded, 0) << entry.path();
    std::printf("%-32s %6d encoded, %6d decoded, %d different\n", entry.path().filename().c_str(),
                tally.encoded, tally.decoded, tally.wrong);
  }
  EXPECT_GT(files, 0);
}

}  // namespace
}  // namespace indexcache
