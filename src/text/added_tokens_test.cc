#include "text/added_tokens.h"

#include <gtest/gtest.h>

namespace indexcache {
namespace {

std::string sections(const std::vector<AddedToken>& tokens, std::string_view text) {
  std::string out;
  for (const auto& section : AddedTokenFinder(tokens).split(text)) {
    out += section.id >= 0 ? "<" + std::to_string(section.id) + ":" : "(";
    out += section.text;
    out += section.id >= 0 ? ">" : ")";
  }
  return out;
}

AddedToken token(int id, const char* content) {
  AddedToken out;
  out.id = id;
  out.content = content;
  return out;
}

TEST(AddedTokens, LongestAtTheLeftmostPlace) {
  const std::vector<AddedToken> tokens = {token(1, "ab"), token(2, "abcd"), token(3, "bc"),
                                          token(4, "c")};
  EXPECT_EQ(sections(tokens, "xabcdx"), "(x)<2:abcd>(x)");
  EXPECT_EQ(sections(tokens, "abc"), "<1:ab><4:c>");
  EXPECT_EQ(sections(tokens, "bcab"), "<3:bc><1:ab>");
  EXPECT_EQ(sections(tokens, ""), "");
  EXPECT_EQ(sections({}, "abc"), "(abc)");
}

TEST(AddedTokens, NormalizedTokensComeSecond) {
  AddedToken early = token(1, "bc");
  AddedToken late = token(2, "abcd");
  late.normalized = true;
  EXPECT_EQ(sections({early, late}, "abcd"), "(a)<1:bc>(d)");
  EXPECT_EQ(sections({late}, "abcd"), "<2:abcd>");
}

TEST(AddedTokens, StripsSpace) {
  AddedToken left = token(1, "[L]");
  left.lstrip = true;
  AddedToken right = token(2, "[R]");
  right.rstrip = true;
  const std::vector<AddedToken> tokens = {left, right};
  EXPECT_EQ(sections(tokens, "a \n\u3000[L] b"), "(a)<1: \n\u3000[L]>( b)");
  EXPECT_EQ(sections(tokens, "a [R]\t\u00a0b"), "(a )<2:[R]\t\u00a0>(b)");
  EXPECT_EQ(sections(tokens, "[R] [L]"), "<2:[R] ><1:[L]>");
}

TEST(AddedTokens, SingleWord) {
  AddedToken word = token(1, "cat");
  word.single_word = true;
  EXPECT_EQ(sections({word}, "cat concat cats cat."), "<1:cat>( concat cats )<1:cat>(.)");
  EXPECT_EQ(sections({word}, "écat"), "(écat)");
}

}  // namespace
}  // namespace indexcache
