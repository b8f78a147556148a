// Runs a chat template. It can reach nothing but the values it is given, and it stops: steps,
// output and depth are bounded, and steps are charged for the bytes that an operation touches.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja_parser.h"
#include "text/jinja_value.h"

namespace indexcache::jinja {

struct Limits {
  int64_t steps = 20'000'000;
  size_t output_bytes = size_t{64} << 20;
};

using Variables = std::vector<std::pair<std::string, Value>>;

// Error with the template's line, or with what the template says through raise_exception.
Text run(const Block& block, const Variables& variables, const Limits& limits, int64_t unix_time);

struct Scope {
  Scope* parent = nullptr;
  Variables variables;
  bool captured = false;  // a macro refers to it
};

struct Macro {
  const Stmt* definition;
  Scope* scope;
};

struct Loop {
  std::vector<Value> items;
  size_t index = 0;
  int depth = 0;
  Value last_changed;
  bool has_changed = false;
};

// What a call was given. Builtins take arguments by position or by name and refuse the rest.
struct Arguments {
  std::string callee;
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keywords;

  // The argument at `position` or of this name; null when it was not given.
  const Value* find(size_t position, const char* name) const;
  const Value& required(size_t position, const char* name) const;
  int64_t integer_or(size_t position, const char* name, int64_t fallback) const;
  bool truthy_or(size_t position, const char* name, bool fallback) const;
  void at_most(size_t count) const;
};

// The parts of the interpreter that builtins need.
class Runtime {
 public:
  virtual ~Runtime() = default;
  virtual void spend(int64_t steps) = 0;
  virtual Value get_attribute(const Value& value, const std::string& name) = 0;
  virtual Value get_item(const Value& value, const Value& key) = 0;
  virtual Value call_filter(const std::string& name, const Value& value, const Arguments& args) = 0;
  virtual bool call_test(const std::string& name, const Value& value, const Arguments& args) = 0;
  virtual Namespace* new_namespace() = 0;
  virtual int64_t unix_time() const = 0;

  // What iterating gives: items, keys, characters; nothing for undefined. Error for the rest.
  std::vector<Value> iterate(const Value& value);
};

bool is_iterable(const Value& value);
[[noreturn]] void fail_undefined(const Value& value);

// jinja_builtins.cc
bool is_function(const std::string& name);
Value call_function(Runtime& runtime, const std::string& name, const Arguments& args);
bool has_method(const Value& self, const std::string& name);
Value call_method(Runtime& runtime, const Value& self, const std::string& name,
                  const Arguments& args);
// jinja_filters.cc
Value apply_filter(Runtime& runtime, const std::string& name, const Value& value,
                   const Arguments& args);
bool apply_test(Runtime& runtime, const std::string& name, const Value& value,
                const Arguments& args);
// Whether `a op b` holds; op is ==, !=, <, <=, >, >=, in, not in.
bool holds(Runtime& runtime, const std::string& op, const Value& a, const Value& b);

}  // namespace indexcache::jinja
