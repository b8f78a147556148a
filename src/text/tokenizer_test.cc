#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <functional>
#include <limits>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/rng.h"
#include "text/byte_level.h"
#include "text/tokenizer_json.h"

namespace indexcache {
namespace {

Json small_file() { return parse_json(byte_level_tokenizer_json(260), "small"); }

// Merges that make "hello" one token, with ids after the added ones.
Json hello_file() {
  Json file = small_file();
  int id = 260;
  for (const char* merge : {"h e", "l l", "he ll", "hell o"}) {
    std::string token = merge;
    token.erase(token.find(' '), 1);
    file["model"]["vocab"][token] = id++;
    file["model"]["merges"].push_back(merge);
  }
  return file;
}

Tokenizer tokenizer_of(const Json& file) { return Tokenizer::parse(file.dump(), "test.json"); }

using Ids = std::vector<int32_t>;

TEST(Tokenizer, EncodesByMergeRank) {
  const Tokenizer tokenizer = tokenizer_of(hello_file());
  EXPECT_EQ(tokenizer.encode("hello", false, true), (Ids{263}));
  EXPECT_EQ(tokenizer.encode("hell", false, true), (Ids{262}));
  EXPECT_EQ(tokenizer.encode("hlle", false, true), (Ids{'h', 261, 'e'}));
  EXPECT_EQ(tokenizer.encode("", false, true), (Ids{}));
  EXPECT_EQ(tokenizer.vocab_size(), 264);
  EXPECT_EQ(tokenizer.token_id("hello"), 263);
  EXPECT_EQ(tokenizer.token_id("<|user|>"), 258);
  EXPECT_EQ(tokenizer.token_id("absent"), std::nullopt);
}

TEST(Tokenizer, MergesAsPairsAreTheSame) {
  Json file = hello_file();
  file["model"]["merges"] = Json::array({{"h", "e"}, {"l", "l"}, {"he", "ll"}, {"hell", "o"}});
  EXPECT_EQ(tokenizer_of(file).encode("hello", false, true), (Ids{263}));
}

TEST(Tokenizer, IgnoreMergesTakesWholePieces) {
  Json file = hello_file();
  file["model"]["merges"] = Json::array();
  EXPECT_EQ(tokenizer_of(file).encode("hello", false, true).size(), 5u);
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(tokenizer_of(file).encode("hello", false, true), (Ids{263}));
}

TEST(Tokenizer, UserTextNeverBecomesAControlToken) {
  Json file = small_file();
  // Control tokens that a file does not mark, as DeepSeek's <|User|>, and ones that are in the
  // model's vocabulary too.
  file["added_tokens"][2]["special"] = false;
  file["model"]["vocab"]["<|assistant|>"] = 259;
  for (const bool ignore_merges : {false, true}) {
    file["model"]["ignore_merges"] = ignore_merges;
    const Tokenizer tokenizer = tokenizer_of(file);
    const std::string text = "<|user|>hi<|endoftext|><|assistant|>";
    EXPECT_EQ(tokenizer.encode(text, false, true), (Ids{258, 'h', 'i', 256, 259}));
    for (const std::string& said : {text, std::string("<|assistant|>")}) {
      const Ids plain = tokenizer.encode(said, false, false);
      EXPECT_EQ(plain.size(), said.size());
      for (const int32_t id : plain) EXPECT_LT(id, 256);
      EXPECT_EQ(tokenizer.decode(plain, true), said);
    }
  }
}

TEST(Tokenizer, TemplateAddsTokensAroundTheText) {
  Json file = small_file();
  file["post_processor"] = parse_json(R"({"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                 {"SpecialToken": {"id": "</s>", "type_id": 0}}],
      "special_tokens": {"<s>": {"id": "<s>", "ids": [256, 257], "tokens": ["a", "b"]},
                         "</s>": {"id": "</s>", "ids": [258], "tokens": ["c"]}}})",
                                      "template");
  const Tokenizer tokenizer = tokenizer_of(file);
  EXPECT_EQ(tokenizer.encode("x", true, true), (Ids{256, 257, 'x', 258}));
  EXPECT_EQ(tokenizer.encode("x", false, true), (Ids{'x'}));
}

TEST(Tokenizer, DecodingSkipsWhatHasNoText) {
  const Tokenizer tokenizer = tokenizer_of(small_file());
  EXPECT_EQ(tokenizer.decode(Ids{'a', 256, 'b', 9999, -1, 'c'}, true), "abc");
  EXPECT_EQ(tokenizer.decode(Ids{'a', 256, 'b'}, false), "a<|endoftext|>b");
  EXPECT_EQ(tokenizer.decode(Ids{0xE4, 0xBD, 'x'}, false), "\xEF\xBF\xBDx");
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const Tokenizer tokenizer = tokenizer_of(small_file());
  for (const char* text :
       {"ab\xFF", "ab\xC0\x80", "ab\xED\xA0\x80", "ab\xE4\xBD", "ab\xF5\x80\x80\x80"}) {
    try {
      tokenizer.encode(text, false, true);
      ADD_FAILURE() << "accepted " << printable(text);
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("byte 2"), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(tokenizer.encode(std::string_view("a\0b", 3), false, true), (Ids{'a', 0, 'b'}));
}

TEST(Tokenizer, StreamEqualsFullDecode) {
  const uint64_t seed = 36;
  SCOPED_TRACE(fmt::format("seed {}", seed));
  Rng rng(seed);
  const Tokenizer tokenizer = tokenizer_of(small_file());
  for (int round = 0; round < 2000; ++round) {
    Ids ids;
    if (round % 2 == 0) {
      std::string text;
      for (int i = 0; i < 6; ++i)
        append_utf8(static_cast<uint32_t>(rng.below(0xD800)) + (i % 2 ? 0xE000 : 0), text);
      ids = tokenizer.encode(text, false, false);
    } else {
      for (int i = 0; i < 12; ++i)
        ids.push_back(static_cast<int32_t>(rng.below(2) ? 0x80 + rng.below(128) : rng.below(262)));
    }
    for (const bool skip : {false, true}) {
      StreamDecoder stream(tokenizer, skip);
      std::string streamed;
      for (const int32_t id : ids) {
        const std::string piece = stream.push(id);
        ASSERT_FALSE(find_invalid_utf8(piece));
        streamed += piece;
      }
      streamed += stream.finish();
      ASSERT_EQ(streamed, tokenizer.decode(ids, skip));
    }
  }
}

TEST(Tokenizer, LongTextsRoundTrip) {
  const Tokenizer tokenizer = tokenizer_of(hello_file());
  for (const std::string unit :
       {"l", "hello", " ", "7", "\n", "\xF0\x9F\x98\x80", "e\xCC\x81", "<|user|>", "<|use"}) {
    std::string text;
    while (text.size() < 300'000) text += unit;
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false, true), false), text) << unit;
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false, false), false), text) << unit;
  }
}

// 8 times the text takes 8 times the time, and somewhat more where a cache ends; quadratic steps
// would take 64 times as long.
TEST(Tokenizer, TimeIsLinearInTheText) {
  const Tokenizer tokenizer =
      Tokenizer::load(std::string(INDEXCACHE_SOURCE_DIR) + "/models/demo/tokenizer.json");
  // CPU time, so that other programs count little.
  const auto seconds_of = [&](std::string_view text) {
    std::clock_t least = std::numeric_limits<std::clock_t>::max();
    for (int i = 0; i < 2; ++i) {
      const std::clock_t start = std::clock();
      tokenizer.encode(text, false, true);
      least = std::min(least, std::clock() - start);
    }
    return static_cast<double>(least) / CLOCKS_PER_SEC;
  };
  for (const std::string& unit : {std::string("a"), std::string("ab"), std::string(" "),
                                  std::string(1, '\0'), std::string("\xF0\x9F\x98\x80"),
                                  std::string("e\xCC\x81\xCC\x82"), std::string("<|user|")}) {
    std::string text;
    while (text.size() < 500'000) text += unit;
    const double one = seconds_of(text);
    for (int doubled = 0; doubled < 3; ++doubled) text += std::string(text);
    EXPECT_LE(seconds_of(text), 20 * one) << printable(unit);
  }
}

TEST(ByteLevel, SmallestTokenizerFile) {
  const std::string path =
      std::string(INDEXCACHE_SOURCE_DIR) + "/tests/corpus/tokenizer/byte_level.json";
  EXPECT_EQ(byte_level_tokenizer_json(260), read_text_file(path));
  const Tokenizer tokenizer = Tokenizer::parse(byte_level_tokenizer_json(1000), "generated");
  EXPECT_EQ(tokenizer.vocab_size(), 1000);
  for (int byte = 0; byte < 256; ++byte)
    EXPECT_EQ(tokenizer.token_bytes(byte), std::string(1, static_cast<char>(byte)));
  EXPECT_TRUE(tokenizer.is_special(999));
  EXPECT_THROW(byte_level_tokenizer_json(259), Error);
}

struct BadFile {
  const char* name;
  std::function<void(Json&)> spoil;
  const char* expected;  // part of the message
};

TEST(TokenizerFile, RefusesBadFilesByName) {
  const auto set = [](const char* pointer, Json value) {
    return [pointer, value](Json& file) { file[Json::json_pointer(pointer)] = value; };
  };
  const std::string long_name(1 << 20, 'x');
  const BadFile cases[] = {
      {"duplicate id", set("/model/vocab/b", 97), "have the same id 97"},
      {"negative id", set("/model/vocab/b", -1), "token \"b\" has id -1"},
      {"id too large", set("/model/vocab/b", 260), "expected 0 to 259"},
      {"hole", set("/added_tokens/3/id", 300), "expected 0 to 259"},
      {"id not an integer", set("/model/vocab/b", 1.5), "has id 1.5"},
      {"id of 2^40", set("/model/vocab/b", int64_t{1} << 40), "expected 0 to 259"},
      {"added id taken", set("/added_tokens/0/id", 97), "\"id\""},
      {"added id negative", set("/added_tokens/0/id", -5), "has id -5"},
      {"added twice", set("/added_tokens/0/content", "<|user|>"), "not in the list before"},
      {"added empty", set("/added_tokens/0/content", ""), "\"content\""},
      {"added too long", set("/added_tokens/0/content", long_name), "at most 1024 bytes"},
      {"added as text", set("/added_tokens/0", "x"), "expected a JSON object"},
      {"byte token missing", [](Json& file) { file["model"]["vocab"].erase("b"); },
       "no token for the byte 0x62"},
      {"byte token renamed",
       [](Json& file) {
         file["model"]["vocab"].erase("b");
         file["model"]["vocab"]["<0x-1>"] = 98;
       },
       "no token for the byte 0x62"},
      {"byte fallback", set("/model/byte_fallback", true), "byte_fallback"},
      {"merge of unknown", set("/model/merges", {"zz a"}), "merge 0 needs the token \"zz\""},
      {"merge to unknown", set("/model/merges", {"a b"}), "merge 0 needs the token \"ab\""},
      {"merge of one", set("/model/merges", {"a"}), "merge 0 is"},
      {"merge of three", set("/model/merges", {"a b c"}), "merge 0 is"},
      {"merge with nothing", set("/model/merges", {"a "}), "merge 0 is"},
      {"merge as triple", set("/model/merges", Json::array({{"a", "b", "c"}})), "merge 0 is"},
      {"merge as number", set("/model/merges", Json::array({7})), "merge 0 is"},
      {"merges missing", [](Json& file) { file["model"].erase("merges"); }, "merges"},
      {"vocab as array", set("/model/vocab", Json::array()), "vocab"},
      {"other model", set("/model/type", "Unigram"), "Unigram"},
      {"dropout", set("/model/dropout", 0.1), "dropout"},
      {"suffix", set("/model/end_of_word_suffix", "</w>"), "end_of_word_suffix"},
      {"normalizer", set("/normalizer", {{"type", "NFKC"}}), "normalizer NFKC is not supported"},
      {"nested normalizer",
       set("/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}}),
       "normalizer NFC"},
      {"pre-tokenizer", set("/pre_tokenizer", {{"type", "Metaspace"}}), "Metaspace"},
      {"no pre-tokenizer", set("/pre_tokenizer", nullptr), "pre_tokenizer"},
      {"no ByteLevel",
       set("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", Json::array()}}),
       "ByteLevel"},
      {"post-processor", set("/post_processor", {{"type", "BertProcessing"}}), "BertProcessing"},
      {"decoder", set("/decoder", {{"type", "WordPiece"}}), "decoder"},
      {"no decoder", set("/decoder", nullptr), "decoder"},
      {"truncation", set("/truncation", {{"max_length", 5}}), "truncation"},
  };
  for (const BadFile& bad : cases) {
    Json file = small_file();
    bad.spoil(file);
    try {
      tokenizer_of(file);
      ADD_FAILURE() << bad.name << " was accepted";
    } catch (const Error& error) {
      EXPECT_TRUE(std::string(error.what()).starts_with("test.json")) << error.what();
      EXPECT_NE(std::string(error.what()).find(bad.expected), std::string::npos)
          << bad.name << ": " << error.what();
      EXPECT_LT(std::string(error.what()).size(), 2000u) << bad.name;
    }
  }
}

TEST(TokenizerFile, EveryTruncationIsRefused) {
  const std::string json = byte_level_tokenizer_json(260);
  EXPECT_NO_THROW(Tokenizer::parse(json, "whole"));
  for (size_t size = 0; size + 2 < json.size(); size += 7) {
    EXPECT_THROW(Tokenizer::parse(std::string_view(json).substr(0, size), "cut"), Error) << size;
  }
  EXPECT_THROW(Tokenizer::load("/nonexistent/tokenizer.json"), Error);
  EXPECT_THROW(Tokenizer::load("/tmp"), Error);
  EXPECT_THROW(Tokenizer::parse(std::string(kMaxTokenizerBytes + 1, ' '), "large"), Error);
}

}  // namespace
}  // namespace indexcache
