// Values of a chat template, with Python's meaning of them: truth, equality, str(), repr(), JSON.
//
// Every piece of text knows which of its bytes came from a request (`marks`) and which the template
// wrote itself, through concatenation, slicing and replacing, so that "<|user|>" in a message never
// becomes a control token.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/json.h"

namespace indexcache::jinja {

struct Text {
  std::string bytes;
  std::string marks;  // empty: nothing came from a request; else a byte a byte, 1: it did

  bool marked() const { return !marks.empty(); }
  void append(std::string_view own);  // written by the template
  void append(const Text& other);
  void append_slice(const Text& other, size_t begin, size_t end);
  Text slice(size_t begin, size_t end) const;
};

Text own_text(std::string bytes);
Text input_text(std::string bytes);

struct None {};
struct Undefined {
  std::string what;  // the error when it is used
};
struct Value;
struct Sequence;
struct Dict;
struct Namespace;  // these three are owned by the running template
struct Macro;
struct Loop;
struct Function {  // a global one
  std::string name;
};
struct Method {
  std::shared_ptr<const Value> self;
  std::string name;
};

struct Value {
  using Data = std::variant<std::shared_ptr<const Undefined>, None, bool, int64_t, double,
                            std::shared_ptr<const Text>, std::shared_ptr<const Sequence>,
                            std::shared_ptr<const Dict>, Namespace*, const Macro*, Loop*,
                            std::shared_ptr<const Function>, Method>;
  Data data = None{};

  template <class T>
  const T* get() const {
    return std::get_if<T>(&data);
  }
  bool is_undefined() const { return data.index() == 0; }
  bool is_none() const { return data.index() == 1; }
  const bool* boolean() const { return get<bool>(); }
  const int64_t* integer() const { return get<int64_t>(); }
  const double* floating() const { return get<double>(); }
  const Text* text() const;
  const Sequence* sequence() const;
  const Dict* dict() const;
  bool is_number() const { return boolean() || integer() || floating(); }
};

struct Sequence {
  std::vector<Value> items;
  bool tuple = false;
  int depth = 1;
};

struct Dict {
  std::vector<std::pair<Value, Value>> items;  // in order; keys are hashable and all different
  int depth = 1;
  const Value* find(const Value& key) const;
};

struct Namespace {
  std::vector<std::pair<std::string, Value>> attributes;
};

Value undefined(std::string what);
Value text_value(Text text);
Value text_value(std::string own);
// Error when nested deeper than kMaxValueDepth.
Value sequence_value(std::vector<Value> items, bool tuple = false);
Value dict_value(std::vector<std::pair<Value, Value>> items);
inline constexpr int kMaxValueDepth = 100;

// A value of a request. All of its text is marked, except the text of `trusted_key` in objects one
// level below the top ("role" of messages, which the server has checked).
Value input_value(const Json& json, std::string_view trusted_key = {});
Value own_value(const Json& json);

const char* type_name(const Value& value);  // Python's: 'str', 'int'
bool truthy(const Value& value);
bool equal(const Value& a, const Value& b);
// -1, 0, 1; Error for types that have no order. NaN compares as 2.
int compare(const Value& a, const Value& b);
double as_double(const Value& number);
// 0 to count - 1 in order, equals as they were. An order that contradicts itself, as NaN's does,
// gives some order. (std::sort may then leave its range; clang warns of std::stable_sort.)
std::vector<size_t> sorted_order(size_t count, const std::function<bool(size_t, size_t)>& less);

Text to_text(const Value& value);  // Python's str()
Text repr(const Value& value);
std::string float_repr(double value);

struct JsonStyle {
  bool ensure_ascii = false;
  int indent = -1;  // none
  std::string item_separator = ", ", key_separator = ": ";
  bool sort_keys = false;
};
Text to_json(const Value& value, const JsonStyle& style);  // Python's json.dumps

}  // namespace indexcache::jinja
