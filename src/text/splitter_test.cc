#include "text/splitter.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/rng.h"
#include "text/utf8.h"

namespace indexcache {
namespace {

using Pieces = std::vector<std::string_view>;

Splitter splitter_of(const std::string& regex, SplitBehavior behavior = SplitBehavior::kIsolated,
                     bool invert = false) {
  return Splitter({{parse_split_regex(regex, "test"), behavior, invert, "test"}});
}

TEST(Splitter, Behaviors) {
  const std::string text = "the-final--countdown";
  EXPECT_EQ(splitter_of("-", SplitBehavior::kRemoved).split(text),
            (Pieces{"the", "final", "countdown"}));
  EXPECT_EQ(splitter_of("-", SplitBehavior::kIsolated).split(text),
            (Pieces{"the", "-", "final", "-", "-", "countdown"}));
  EXPECT_EQ(splitter_of("-", SplitBehavior::kMergedWithPrevious).split(text),
            (Pieces{"the-", "final-", "-", "countdown"}));
  EXPECT_EQ(splitter_of("-", SplitBehavior::kMergedWithNext).split(text),
            (Pieces{"the", "-final", "-", "-countdown"}));
  EXPECT_EQ(splitter_of("-", SplitBehavior::kContiguous).split(text),
            (Pieces{"the", "-", "final", "--", "countdown"}));
  EXPECT_EQ(splitter_of("-", SplitBehavior::kRemoved, true).split(text), (Pieces{"-", "-", "-"}));
  EXPECT_EQ(splitter_of("-").split(""), (Pieces{}));
}

TEST(Splitter, PatternsMeanWhatOnigurumaMeans) {
  struct {
    const char* regex;
    const char* text;
    Pieces expected;
  } cases[] = {
      {R"(\p{L}+)", "ab1é", {"ab", "1", "é"}},
      {R"(\p{^L})", "a1b", {"a", "1", "b"}},
      {R"(\P{Lu}+)", "abC", {"ab", "C"}},
      {R"([^\s\p{L}]+)", "a12 b", {"a", "12", " b"}},
      {R"([a\-c]+)", "b-ac", {"b", "-ac"}},
      {R"([-a]+)", "b-a", {"b", "-a"}},
      {R"([\x41-\x{43}\u0044]+)", "xABCDy", {"x", "ABCD", "y"}},
      {R"(\s+(?!\S)|\s+)", "a   b", {"a", "  ", " ", "b"}},
      {R"((?i:'s|'k))", "x'S'\u017F'\u212A", {"x", "'S", "'\u017F", "'\u212A"}},
      {R"((?<=a)b)", "abcb", {"a", "b", "cb"}},
      {R"(a{2})", "aaaaa", {"aa", "aa", "a"}},
      {R"(a{1,2}|b{2,})", "aaabbb", {"aa", "a", "bbb"}},
      {R"(.+?c)", "abcabc\nc", {"abc", "abc", "\nc"}},
      {R"((?>a+)b|a++c)", "aabaac", {"aab", "aac"}},
      {"[一-龥]+", "x北京y", {"x", "北京", "y"}},
      // Assigned by Unicode 16, unknown to the system's library.
      {R"(\p{Lo}+)", "x\U00010D4A", {"x", "\U00010D4A"}},
  };
  for (const auto& item : cases) {
    EXPECT_EQ(splitter_of(item.regex).split(item.text), item.expected) << item.regex;
  }
}

TEST(Splitter, RefusesWhatItDoesNotKnow) {
  for (const char* regex :
       {"",        "a*",      "(",           ")",          "a(b",      "[",           "[]",
        "[]a]",    "[a",      "[b-a]",       "[a[b]]",     "[a&&b]",   "[a-\\d]",     "[\\d-z]",
        "[a-c-e]", "\\w",     "\\b",         "\\h",        "\\1",      "\\G",         "\\K",
        "\\",      "\\p",     "\\p{",        "\\p{Greek}", "\\pL",     "\\p{}",       "\\xZZ",
        "\\xFF",   "\\x{}",   "\\x{110000}", "\\uD800",    "^a",       "a$",          "*",
        "a**",     "a{1}{2}", "a{2,1}",      "a{,2}",      "a{1001}",  "a{x",         "a{2}?",
        "a{1,2}+", "{",       "(?i)a",       "(?<n>a)",    "(?#c)",    "(?i:\\p{L})", "(?i:é)",
        "(?i:st)", "(?=a)*",  "(?:a|)",      "a|",         "(?<=a+)b", "(?!a)"}) {
    try {
      splitter_of(regex);
      ADD_FAILURE() << "accepted " << regex;
    } catch (const Error& error) {
      EXPECT_TRUE(std::string(error.what()).starts_with("test")) << error.what();
    }
  }
  std::string deep;
  for (int i = 0; i < 5000; ++i) deep += '(';
  EXPECT_THROW(splitter_of(deep + "a" + std::string(5000, ')')), Error);
  EXPECT_THROW(splitter_of("(((a{1000}){1000}){1000}){1000}"), Error);
  EXPECT_THROW(splitter_of(std::string(kMaxPatternBytes + 1, 'a')), Error);
}

TEST(Splitter, CatastrophicPatternsStop) {
  const std::string text(20'000, 'a');
  for (const char* regex : {"(a+)+b", "(a|a)+b", "(a|aa)+b", "a+a+a+a+b", "(a*)*b"}) {
    EXPECT_THROW(splitter_of(regex).split(text), Error) << regex;
  }
  // Each attempt is cheap, but each reads the rest of the text.
  EXPECT_THROW(splitter_of("a*b").split(std::string(2'000'000, 'a')), Error);
  EXPECT_THROW(splitter_of("a(?=a*b)").split(std::string(2'000'000, 'a')), Error);
}

TEST(Splitter, LongRunsAreOnePiece) {
  const Splitter splitter = splitter_of(
      R"([^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)");
  for (const char c : {'a', ' ', '.', '\n'}) {
    EXPECT_EQ(splitter.split(std::string(3'000'000, c)).size(), 1u) << static_cast<int>(c);
  }
  EXPECT_EQ(splitter.split(std::string(3'000'000, ' ') + "x").size(), 2u);
  EXPECT_EQ(splitter.split(std::string(3'000'000, '7')).size(), 1'000'000u);
}

TEST(Splitter, IsolatedPiecesCoverTheText) {
  const uint64_t seed = 5;
  SCOPED_TRACE(fmt::format("seed {}", seed));
  Rng rng(seed);
  const Splitter splitter = splitter_of(R"(\p{N}{1,3}|[\p{L}\p{M}]+|\s+(?!\S)|(?<=x)\p{P})");
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (int i = 0; i < 300; ++i) {
      append_utf8(
          static_cast<uint32_t>(rng.below(4) ? rng.below(0x80) : 0xE000 + rng.below(0x102000)),
          text);
    }
    std::string joined;
    for (const std::string_view piece : splitter.split(text)) {
      ASSERT_FALSE(piece.empty());
      joined += piece;
    }
    ASSERT_EQ(joined, text);
  }
}

TEST(CodePoints, SetsAreConsistent) {
  const CodePointSet letters = *category_set("L");
  const CodePointSet others = complement(letters);
  EXPECT_EQ(complement(others), letters);
  EXPECT_EQ(unite(letters, others).ranges, (std::vector<CodePointRange>{{0, kMaxCodePoint}}));
  EXPECT_EQ(*category_set("letter"), letters);
  EXPECT_EQ(*category_set("Punctuation"), *category_set("P"));
  CodePointSet all;
  for (const char* group : {"L", "M", "N", "P", "S", "Z", "C"})
    all = unite(all, *category_set(group));
  EXPECT_EQ(all.ranges, (std::vector<CodePointRange>{{0, kMaxCodePoint}}));
  EXPECT_FALSE(category_set("Han"));
  EXPECT_FALSE(category_set(""));
}

}  // namespace
}  // namespace indexcache
