// A chat template as a tree. The language is Jinja's as transformers uses it, without include,
// import, extends, blocks, call blocks, recursive loops, autoescape and i18n, which are refused by
// name. Nesting is at most kMaxNesting deep.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja_value.h"

namespace indexcache::jinja {

inline constexpr int kMaxNesting = 200;

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct Expr {
  enum class Kind {
    kConst,
    kName,
    kList,
    kTuple,
    kDict,  // args: key, value, key, value ...
    kNot,
    kNegative,
    kPositive,
    kAnd,
    kOr,
    kConditional,  // args: condition, then, else (may be null)
    kBinary,       // name: the operator
    kCompare,      // args[0] names[0] args[1] names[1] args[2] ...
    kConcat,
    kAttribute,  // args[0] . name
    kItem,       // args[0] [ args[1] ]
    kSlice,      // args: from, to, step; each may be null
    kCall,       // args[0] ( args[1..], keywords )
    kFilter,     // args[0] | name ( args[1..], keywords ); args[0] null: the block's text
    kTest,
  } kind = Kind::kConst;
  int line = 0;
  int depth = 1;
  std::string name;
  Value constant;
  std::vector<ExprPtr> args;
  std::vector<std::pair<std::string, ExprPtr>> keywords;
  std::vector<std::string> names;
};

struct Stmt;
using Block = std::vector<Stmt>;

struct Stmt {
  enum class Kind {
    kData,
    kOutput,
    kIf,        // exprs[i]: bodies[i]; one body more: else
    kFor,       // target in exprs[0] if exprs[1] (may be null): bodies[0], else bodies[1]
    kSet,       // target = exprs[0]
    kSetBlock,  // target = exprs[0] (a filter, may be null) of bodies[0]
    kMacro,     // name, parameters, defaults in exprs (of the last parameters): bodies[0]
    kFilterBlock,
    kWith,  // names = exprs: bodies[0]
    kBreak,
    kContinue,
    kPlain,  // bodies[0], as {% generation %} has
  } kind = Kind::kData;
  int line = 0;
  std::string text;  // kData; the name of a macro
  ExprPtr target;
  std::vector<ExprPtr> exprs;
  std::vector<Block> bodies;
  std::vector<std::string> names;
};

Block parse_template(std::string_view source);

}  // namespace indexcache::jinja
