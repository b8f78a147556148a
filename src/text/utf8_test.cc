#include "text/utf8.h"

#include <gtest/gtest.h>

namespace indexcache {
namespace {

constexpr char kBad[] = "\xEF\xBF\xBD";

TEST(Utf8, EveryCharacterRoundTrips) {
  for (uint32_t code = 0; code <= 0x10FFFF; ++code) {
    if (code >= 0xD800 && code <= 0xDFFF) continue;
    std::string text;
    append_utf8(code, text);
    const Utf8Step step = utf8_step(text, 0);
    ASSERT_TRUE(step.valid);
    ASSERT_EQ(step.code_point, code);
    ASSERT_EQ(step.length, text.size());
  }
}

TEST(Utf8, OneReplacementForEachBrokenPrefix) {
  const std::string b = kBad;
  // The example of the Unicode standard (table 3-11) and the classic attacks.
  EXPECT_EQ(replace_invalid_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), b + b + b + b + "A");
  EXPECT_EQ(replace_invalid_utf8("\xC0\x80"), b + b);
  EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80"), b + b + b);
  EXPECT_EQ(replace_invalid_utf8("\xF4\x90\x80\x80"), b + b + b + b);
  EXPECT_EQ(replace_invalid_utf8("a\xE4\xBD"), "a" + b);
  EXPECT_EQ(find_invalid_utf8("ab\xE4"), 2u);
  EXPECT_EQ(find_invalid_utf8("ab\xE4\xBD\xA0"), std::nullopt);
}

TEST(Utf8, StreamHoldsBackUnfinishedCharacters) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("a\xF0\x9F"), "a");
  EXPECT_EQ(stream.push("\x98"), "");
  EXPECT_EQ(stream.push("\x80z"), "\xF0\x9F\x98\x80z");
  EXPECT_EQ(stream.push("\xE4\xBD"), "");
  EXPECT_EQ(stream.push("\xE4"), kBad);
  EXPECT_EQ(stream.finish(), kBad);
  EXPECT_EQ(stream.finish(), "");
}

}  // namespace
}  // namespace indexcache
