// JSON from outside, parsed strictly (RFC 8259, UTF-8, no comments, no duplicate keys, bounded
// depth), and typed access that names the place in its errors.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

// The library's destructor moves a document's parts to a vector first, and where there is no memory
// for that the program ends. Ours takes none: it recurses, no deeper than parse_json lets in.
template <>
void nlohmann::ordered_json::json_value::destroy(value_t type);
template <>
void nlohmann::json::json_value::destroy(value_t type);

namespace indexcache {

using Json = nlohmann::ordered_json;

// `where` (a path) begins every error message. Duplicate keys, depth over `max_depth`, a BOM and
// trailing bytes are errors with a byte offset. Memory is bounded by the text's size.
Json parse_json(std::string_view text, const std::string& where, int max_depth = 64);

// Reads and parses a file; see read_text_file for the size limit.
Json load_json(const std::string& path);

// Typed access to one object. Each getter names the key, what was found and what was expected; a
// missing key is an error unless a fallback is given. An explicit null counts as missing, as it
// does for the engines that read these files.
class JsonObject {
 public:
  JsonObject(const Json& object, std::string where);

  bool has(std::string_view key) const;  // present and not null
  const Json& get(std::string_view key) const;
  const std::string& where() const { return where_; }
  const Json& raw() const { return *object_; }

  int64_t integer(std::string_view key, int64_t min, int64_t max) const;
  int64_t integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const;
  double number(std::string_view key) const;  // finite
  double number_or(std::string_view key, double fallback) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  std::string string(std::string_view key) const;
  std::string string_or(std::string_view key, const std::string& fallback) const;
  JsonObject object(std::string_view key) const;

  [[noreturn]] void wrong(std::string_view key, const std::string& expected) const;

 private:
  const Json* object_;
  std::string where_;
};

// Whether it is this text. The library's == makes a value of the text, in a function that may not
// throw, so that the program would end where there is no memory.
bool is_text(const Json& value, std::string_view text);

// A value as it may be shown in an error message: one line, cut short, escaped.
std::string json_excerpt(const Json& value);

}  // namespace indexcache
