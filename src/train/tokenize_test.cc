#include "train/tokenize.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/json.h"
#include "text/byte_level.h"
#include "train/token_file.h"

namespace indexcache {
namespace {

// Bytes 0 to 255, then the special tokens; nothing before a text.
constexpr int32_t kEnd = 256, kUser = 258, kAssistant = 259;

class Tokenize : public testing::Test {
 protected:
  Tokenize() {
    std::filesystem::create_directories(folder_);
    write_text_file(path("tokenizer.json"), byte_level_tokenizer_json(260));
  }
  ~Tokenize() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::string write(const std::string& name, const std::string& text) const {
    write_text_file(path(name), text);
    return path(name);
  }
  std::string error_of(const std::vector<std::string>& inputs) const {
    try {
      build_token_file(inputs, path("tokenizer.json"), {}, path("out"));
    } catch (const Error& error) {
      EXPECT_FALSE(std::filesystem::exists(path("out")));
      return error.what();
    }
    return "no error";
  }
  DocumentTokens record(const std::string& json) const {
    TokenizeOptions options;
    options.prompt_weight = 2;
    return tokenize_record(json, "here", Tokenizer::load(path("tokenizer.json")), options);
  }

  const std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() /
      ("indexcache-tokenize-" +
       std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
};

using Ids = std::vector<int32_t>;
using Weights = std::vector<uint8_t>;

TEST_F(Tokenize, RecordsAndTheirWeights) {
  const DocumentTokens text = record(R"({"source":"x","text":"ab"})");
  EXPECT_EQ(text.tokens, (Ids{'a', 'b', kEnd}));
  EXPECT_EQ(text.weights, (Weights{1, 1, 1}));

  const DocumentTokens prompt = record(R"({"prompt":"q","completion":"ok"})");
  EXPECT_EQ(prompt.tokens, (Ids{'q', 'o', 'k', kEnd}));
  EXPECT_EQ(prompt.weights, (Weights{2, 10, 10, 1}));

  const DocumentTokens segments = record(
      R"({"segments":[{"text":"a"},{"text":"b","answer":true},{"text":"c","answer":false}]})");
  EXPECT_EQ(segments.tokens, (Ids{'a', 'b', 'c', kEnd}));
  EXPECT_EQ(segments.weights, (Weights{2, 10, 2, 1}));

  const DocumentTokens chat = record(
      R"({"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yo"}]})");
  EXPECT_EQ(chat.tokens, (Ids{kUser, 'h', 'i', kAssistant, 'y', 'o', kEnd}));
  EXPECT_EQ(chat.weights, (Weights{2, 2, 2, 2, 10, 10, 10}));
}

TEST_F(Tokenize, SpecialTokensInTextsAreOnlyText) {
  EXPECT_EQ(record(R"({"text":"<|user|>"})").tokens.size(), 9u);
}

TEST_F(Tokenize, WrongRecordsAreErrors) {
  for (const char* wrong :
       {"", "{", "[]", "{}", R"({"text":"a","prompt":"b"})", R"({"prompt":"b"})", R"({"text":1})",
        R"({"text":""})", R"({"segments":[]})", R"({"segments":{}})", R"({"segments":["a"]})",
        R"({"messages":[{"role":"tool","content":"a"}]})", R"({"messages":[{"role":"user"}]})"})
    EXPECT_THROW(record(wrong), Error) << wrong;
}

TEST_F(Tokenize, FilesInOrderWhateverTheThreads) {
  std::string lines;
  for (int i = 0; i < 5000; ++i)
    lines +=
        Json{{"text", std::string(1 + i % 700, static_cast<char>('a' + i % 26))}}.dump() + "\n";
  const std::vector<std::string> inputs = {write("a.jsonl", lines),
                                           write("b.txt", "plain {text}\n"),
                                           write("c.jsonl", "{\"text\":\"last\"}\n\n")};
  TokenizeOptions options;
  const auto summary =
      build_token_file(inputs, path("tokenizer.json"), options, path("one.tokens"));
  options.num_threads = 5;
  build_token_file(inputs, path("tokenizer.json"), options, path("five.tokens"));
  EXPECT_EQ(read_text_file(path("one.tokens")), read_text_file(path("five.tokens")));

  const TokenFile file = TokenFile::open(path("one.tokens"));
  EXPECT_EQ(file.num_documents(), 5002u);
  EXPECT_EQ(summary.documents, 5002u);
  EXPECT_EQ(summary.tokens, file.num_tokens());
  for (int i = 0; i < 5000; ++i) {
    const uint64_t begin = file.documents()[i], end = file.documents()[i + 1];
    ASSERT_EQ(end - begin, 2u + i % 700);
    ASSERT_EQ(file.token(begin), 'a' + i % 26);
    ASSERT_EQ(file.token(end - 1), kEnd);
  }
  EXPECT_EQ(file.token(file.documents()[5000]), 'p');
  const Json settings = parse_json(file.settings(), "settings");
  EXPECT_EQ(settings["inputs"][0]["documents"], 5000);
  EXPECT_EQ(settings["inputs"][1]["name"], "b.txt");
  EXPECT_EQ(settings["tokenizer_sha256"].get<std::string>().size(), 64u);
}

TEST_F(Tokenize, BadInputsAreNamed) {
  EXPECT_NE(error_of({}).find("no inputs"), std::string::npos);
  EXPECT_NE(error_of({path("absent.jsonl")}).find("absent.jsonl"), std::string::npos);
  EXPECT_NE(error_of({write("empty.txt", "")}).find("empty.txt"), std::string::npos);
  EXPECT_NE(error_of({write("blank.jsonl", "\n\n")}).find("blank.jsonl"), std::string::npos);
  EXPECT_NE(error_of({write("bad.jsonl", "{\"text\":\"a\"}\n\n{\"text\":}\n")}).find("line 3"),
            std::string::npos);
  EXPECT_NE(error_of({write("latin.txt", "caf\xE9")}).find("latin.txt"), std::string::npos);
  EXPECT_NE(error_of({folder_.string()}).find(folder_.string()), std::string::npos);
}

}  // namespace
}  // namespace indexcache
