#include "base/json.h"

#include <cmath>
#include <unordered_set>

#include "base/error.h"
#include "base/mapped_file.h"

namespace {

// A part is null where the library found no memory for it after it had set the type.
template <class Parts>
void delete_part(Parts& parts, nlohmann::detail::value_t type) {
  using nlohmann::detail::value_t;
  switch (type) {
    case value_t::object:
      delete parts.object;
      break;
    case value_t::array:
      delete parts.array;
      break;
    case value_t::string:
      delete parts.string;
      break;
    case value_t::binary:
      delete parts.binary;
      break;
    default:
      break;
  }
}

}  // namespace

template <>
void nlohmann::ordered_json::json_value::destroy(value_t type) {
  delete_part(*this, type);
}
template <>
void nlohmann::json::json_value::destroy(value_t type) {
  delete_part(*this, type);
}

namespace indexcache {

namespace {

// Builds the document while it checks what nlohmann's own parser lets pass: duplicate keys and
// depth.
class StrictReader : public nlohmann::json_sax<Json> {
 public:
  StrictReader(Json* root, const std::string& where, int max_depth)
      : root_(root), where_(where), max_depth_(max_depth) {}

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t& text) override {
    if (!std::isfinite(value)) fail("{}: the number {} is out of range", where_, printable(text));
    return add(value);
  }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return false; }

  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& value) override {
    if (!keys_.back().insert(value).second)
      fail("{}: duplicate key \"{}\"", where_, printable(value));
    key_ = std::move(value);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    fail("{}: not valid JSON at byte {}: {}", where_, position, printable(e.what(), 200));
  }

 private:
  template <class Value>
  bool add(Value&& value) {
    place(Json(std::forward<Value>(value)));
    return true;
  }

  Json* place(Json value) {
    if (stack_.empty()) {
      *root_ = std::move(value);
      return root_;
    }
    Json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    // The key is known to be new, so append without ordered_json's linear search.
    auto& members = parent.get_ref<Json::object_t&>();
    static_cast<std::vector<std::pair<const std::string, Json>>&>(members).emplace_back(
        std::move(key_), std::move(value));
    return &members.back().second;
  }

  bool open(Json container) {
    if (static_cast<int>(stack_.size()) >= max_depth_) {
      fail("{}: JSON nested deeper than {} levels", where_, max_depth_);
    }
    stack_.push_back(place(std::move(container)));
    keys_.emplace_back();
    return true;
  }

  bool close() {
    stack_.pop_back();
    keys_.pop_back();
    return true;
  }

  Json* root_;
  const std::string& where_;
  int max_depth_;
  std::string key_;
  std::vector<Json*> stack_;
  std::vector<std::unordered_set<std::string>> keys_;
};

}  // namespace

Json parse_json(std::string_view text, const std::string& where, int max_depth) {
  if (text.starts_with("\xEF\xBB\xBF"))
    fail("{}: begins with a byte order mark, expected JSON", where);
  // nlohmann's lexer takes a NUL byte for the end of the text and would ignore what follows.
  if (const size_t at = text.find('\0'); at != text.npos)
    fail("{}: not valid JSON at byte {}: found a NUL byte", where, at + 1);
  Json root;
  StrictReader reader(&root, where, max_depth);
  if (!Json::sax_parse(text.begin(), text.end(), &reader)) fail("{}: not valid JSON", where);
  return root;
}

Json load_json(const std::string& path) {
  return parse_json(read_text_file(path), printable(path, 400));
}

bool is_text(const Json& value, std::string_view text) {
  return value.is_string() && value.get_ref<const std::string&>() == text;
}

std::string json_excerpt(const Json& value) {
  if (value.is_object() && value.size() > 4)
    return fmt::format("an object of {} members", value.size());
  if (value.is_array() && value.size() > 16)
    return fmt::format("an array of {} items", value.size());
  return printable(value.dump(-1, ' ', false, Json::error_handler_t::replace));
}

JsonObject::JsonObject(const Json& object, std::string where)
    : object_(&object), where_(std::move(where)) {
  if (!object.is_object())
    fail("{}: found {}, expected a JSON object", where_, json_excerpt(object));
}

bool JsonObject::has(std::string_view key) const {
  const auto it = object_->find(std::string(key));
  return it != object_->end() && !it->is_null();
}

const Json& JsonObject::get(std::string_view key) const {
  const auto it = object_->find(std::string(key));
  if (it == object_->end()) fail("{}: key \"{}\" is missing", where_, key);
  return *it;
}

void JsonObject::wrong(std::string_view key, const std::string& expected) const {
  fail("{}: \"{}\" is {}, expected {}", where_, key, json_excerpt(get(key)), expected);
}

int64_t JsonObject::integer(std::string_view key, int64_t min, int64_t max) const {
  const Json& value = get(key);
  const std::string expected = fmt::format("an integer from {} to {}", min, max);
  if (!value.is_number_integer()) wrong(key, expected);
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    wrong(key, expected);
  }
  const int64_t number = value.get<int64_t>();
  if (number < min || number > max) wrong(key, expected);
  return number;
}

int64_t JsonObject::integer_or(std::string_view key, int64_t fallback, int64_t min,
                               int64_t max) const {
  return has(key) ? integer(key, min, max) : fallback;
}

double JsonObject::number(std::string_view key) const {
  const Json& value = get(key);
  if (!value.is_number()) wrong(key, "a number");
  return value.get<double>();
}

double JsonObject::number_or(std::string_view key, double fallback) const {
  return has(key) ? number(key) : fallback;
}

bool JsonObject::boolean_or(std::string_view key, bool fallback) const {
  if (!has(key)) return fallback;
  if (!get(key).is_boolean()) wrong(key, "true or false");
  return get(key).get<bool>();
}

std::string JsonObject::string(std::string_view key) const {
  if (!get(key).is_string()) wrong(key, "a string");
  return get(key).get<std::string>();
}

std::string JsonObject::string_or(std::string_view key, const std::string& fallback) const {
  return has(key) ? string(key) : fallback;
}

JsonObject JsonObject::object(std::string_view key) const {
  return JsonObject(get(key), fmt::format("{}: \"{}\"", where_, key));
}

}  // namespace indexcache
