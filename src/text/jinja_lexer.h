// A chat template's text as tokens, split as Jinja does with trim_blocks and lstrip_blocks, which
// is how transformers reads templates: a line break after a block tag is dropped, and so is white
// space between the beginning of a line and a block tag; `-` strips more, `+` strips less.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace indexcache::jinja {

struct Token {
  enum class Kind {
    kData,        // text outside of tags
    kBlockBegin,  // {%
    kBlockEnd,
    kVariableBegin,  // {{
    kVariableEnd,
    kName,
    kString,  // its value, unescaped
    kInteger,
    kFloat,
    kOperator,
    kEnd,
  } kind = Kind::kEnd;
  std::string text;
  int line = 1;
};

// Error with the line for what Jinja refuses too. The last token is kEnd.
std::vector<Token> lex(std::string_view source);

}  // namespace indexcache::jinja
