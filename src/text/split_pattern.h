// The patterns of a tokenizer.json's Split pre-tokenizers: Oniguruma's Ruby syntax, of which we
// take the part that pre-tokenizers use and in which Oniguruma and PCRE2 mean the same. Everything
// else is refused by name, never guessed.
//
// Taken: characters, '.', classes with ranges and negation, \p{..} \P{..} \p{^..} for general
// categories, \s \S \d \D, \t \n \v \f \r \e \a, \xHH \x{H..} \uHHHH, escaped punctuation, (..)
// (?:..) (?i:..) (?=..) (?!..) (?<=..) (?<!..)
// (?>..), '|', and the quantifiers * + ? {n} {n,} {n,m}, lazy and possessive for the first three.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/code_points.h"

namespace indexcache {

// A pattern with every character reduced to "one code point of set number `set`"; the rest is
// syntax that PCRE2 takes as it stands.
struct SplitPattern {
  struct Part {
    std::string syntax;
    int set = -1;  // when >= 0, `syntax` is empty
  };
  std::vector<Part> parts;
  std::vector<CodePointSet> sets;  // no two are equal
};

inline constexpr size_t kMaxPatternBytes = 16 * 1024;
inline constexpr size_t kMaxPatternSets = 256;
inline constexpr int kMaxPatternRepeat = 1000;

// Errors begin with `where` and show the pattern and the byte at which it could not be taken.
SplitPattern parse_split_regex(std::string_view pattern, const std::string& where);

// The pattern that matches exactly this text.
SplitPattern parse_split_literal(std::string_view text, const std::string& where);

}  // namespace indexcache
