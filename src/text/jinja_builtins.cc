// Global functions, and the methods of text, lists and dicts that do not change them: templates run
// in transformers' immutable sandbox, where append() and its like are refused.
#include <algorithm>
#include <ctime>

#include "base/error.h"
#include "text/jinja_run.h"
#include "text/jinja_strings.h"

namespace indexcache::jinja {

namespace {

constexpr int64_t kMaxRange = 100'000;  // Jinja's sandbox has the same

constexpr const char* kTextMethods[] = {
    "strip",      "lstrip",       "rstrip",       "split", "rsplit", "splitlines",
    "startswith", "endswith",     "upper",        "lower", "title",  "capitalize",
    "replace",    "find",         "rfind",        "count", "join",   "isdigit",
    "isspace",    "removeprefix", "removesuffix", "index"};
constexpr const char* kDictMethods[] = {"get", "items", "keys", "values"};
constexpr const char* kListMethods[] = {"index", "count"};
constexpr const char* kChangingMethods[] = {"append",  "extend",  "insert",     "pop",
                                            "remove",  "clear",   "setdefault", "update",
                                            "popitem", "reverse", "sort"};

template <size_t n>
bool contains(const char* const (&names)[n], const std::string& name) {
  return std::ranges::any_of(names, [&](const char* known) { return name == known; });
}

const Text& text_of(const Arguments& args, size_t position, const char* name) {
  const Value& value = args.required(position, name);
  if (value.is_undefined()) fail_undefined(value);
  const Text* text = value.text();
  if (text == nullptr)
    fail("{}: '{}' is a {}, expected text", printable(args.callee, 60), name, type_name(value));
  return *text;
}

// Text, or none for the default.
const Text* optional_text(const Arguments& args, size_t position, const char* name) {
  const Value* value = args.find(position, name);
  return value == nullptr || value->is_none() ? nullptr : &text_of(args, position, name);
}

Value texts(Runtime& runtime, std::vector<Text> parts) {
  runtime.spend(static_cast<int64_t>(parts.size()));
  std::vector<Value> items;
  for (Text& part : parts) items.push_back(text_value(std::move(part)));
  return sequence_value(std::move(items));
}

// A text or a tuple of texts.
template <class Matches>
bool matches_any(const Arguments& args, Matches matches) {
  const Value& value = args.required(0, "prefix");
  if (const Sequence* s = value.sequence(); s && s->tuple) {
    return std::ranges::any_of(
        s->items, [&](const Value& item) { return item.text() && matches(item.text()->bytes); });
  }
  return matches(text_of(args, 0, "prefix").bytes);
}

int64_t find_text(const Text& self, const Arguments& args, bool last) {
  args.at_most(1);
  const std::string& wanted = text_of(args, 0, "sub").bytes;
  const size_t at = last ? self.bytes.rfind(wanted) : self.bytes.find(wanted);
  return at == std::string::npos ? -1 : code_points(std::string_view(self.bytes).substr(0, at));
}

int64_t count_text(const Text& self, const std::string& wanted) {
  if (wanted.empty()) return code_points(self.bytes) + 1;
  int64_t count = 0;
  for (size_t at = 0; (at = self.bytes.find(wanted, at)) != std::string::npos; at += wanted.size())
    ++count;
  return count;
}

Value join(Runtime& runtime, const Text& self, const Arguments& args) {
  Text out;
  bool first = true;
  for (const Value& item : runtime.iterate(args.required(0, "iterable"))) {
    if (!item.text()) fail("join: found a {}, expected text", type_name(item));
    if (!first) out.append(self);
    out.append(*item.text());
    first = false;
  }
  runtime.spend(static_cast<int64_t>(out.bytes.size()) / 8);
  return text_value(std::move(out));
}

Value text_method(Runtime& runtime, const Text& self, const std::string& name,
                  const Arguments& args) {
  const std::string_view bytes = self.bytes;
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    args.at_most(1);
    return text_value(
        strip(self, optional_text(args, 0, "chars"), name != "rstrip", name != "lstrip"));
  }
  if (name == "split" || name == "rsplit") {
    args.at_most(2);
    const Text* separator = optional_text(args, 0, "sep");
    const int64_t max_splits = args.integer_or(1, "maxsplit", -1);
    return texts(runtime, name == "split" ? split(self, separator, max_splits)
                                          : rsplit(self, separator, max_splits));
  }
  if (name == "splitlines") {
    args.at_most(1);
    return texts(runtime, split_lines(self, args.truthy_or(0, "keepends", false)));
  }
  if (name == "startswith" || name == "endswith") {
    args.at_most(1);
    return {matches_any(args, [&](const std::string& part) {
      return name == "startswith" ? bytes.starts_with(part) : bytes.ends_with(part);
    })};
  }
  if (name == "replace") {
    args.at_most(3);
    const Text& to = text_of(args, 1, "new");
    const int64_t cost =
        count_text(self, text_of(args, 0, "old").bytes) * static_cast<int64_t>(to.bytes.size() + 8);
    runtime.spend(cost / 8);
    return text_value(
        replace(self, text_of(args, 0, "old").bytes, to, args.integer_or(2, "count", -1)));
  }
  if (name == "find" || name == "rfind" || name == "index") {
    const int64_t at = find_text(self, args, name == "rfind");
    if (name == "index" && at < 0) fail("substring not found");
    return {at};
  }
  if (name == "count") {
    args.at_most(1);
    return {count_text(self, text_of(args, 0, "sub").bytes)};
  }
  if (name == "join") {
    args.at_most(1);
    return join(runtime, self, args);
  }
  if (name == "removeprefix" || name == "removesuffix") {
    args.at_most(1);
    const std::string& part = text_of(args, 0, "prefix").bytes;
    if (name == "removeprefix" && bytes.starts_with(part))
      return text_value(self.slice(part.size(), bytes.size()));
    if (name == "removesuffix" && bytes.ends_with(part))
      return text_value(self.slice(0, bytes.size() - part.size()));
    return text_value(self);
  }
  args.at_most(0);
  if (name == "upper") return text_value(change_case(self, LetterCase::kUpper));
  if (name == "lower") return text_value(change_case(self, LetterCase::kLower));
  if (name == "title") return text_value(change_case(self, LetterCase::kTitle));
  if (name == "capitalize") return text_value(change_case(self, LetterCase::kCapitalized));
  if (name == "isdigit") {
    return {!bytes.empty() &&
            std::ranges::all_of(bytes, [](char c) { return c >= '0' && c <= '9'; })};
  }
  size_t at = 0;  // isspace
  while (at < bytes.size() && space_length(bytes, at) > 0) at += space_length(bytes, at);
  return {!bytes.empty() && at == bytes.size()};
}

Value dict_method(Runtime& runtime, const Dict& self, const std::string& name,
                  const Arguments& args) {
  runtime.spend(static_cast<int64_t>(self.items.size()));
  if (name == "get") {
    args.at_most(2);
    if (const Value* found = self.find(args.required(0, "key"))) return *found;
    const Value* fallback = args.find(1, "default");
    return fallback ? *fallback : Value{None{}};
  }
  args.at_most(0);
  std::vector<Value> out;
  for (const auto& [key, value] : self.items) {
    out.push_back(name == "items"  ? sequence_value({key, value}, true)
                  : name == "keys" ? key
                                   : value);
  }
  return sequence_value(std::move(out));
}

Value list_method(Runtime& runtime, const Sequence& self, const std::string& name,
                  const Arguments& args) {
  args.at_most(1);
  runtime.spend(static_cast<int64_t>(self.items.size()));
  const Value& wanted = args.required(0, "value");
  if (name == "count")
    return {int64_t{
        std::ranges::count_if(self.items, [&](const Value& item) { return equal(item, wanted); })}};
  const auto it =
      std::ranges::find_if(self.items, [&](const Value& item) { return equal(item, wanted); });
  if (it == self.items.end()) fail("index: the value is not in the list");
  return {int64_t{it - self.items.begin()}};
}

Value range(Runtime& runtime, const Arguments& args) {
  args.at_most(3);
  const bool one = args.positional.size() == 1;
  const int64_t begin = one ? 0 : args.integer_or(0, "start", 0);
  const int64_t end = one ? args.integer_or(0, "stop", 0) : args.integer_or(1, "stop", 0);
  const int64_t step = args.integer_or(2, "step", 1);
  if (args.positional.empty()) fail("range needs an end");
  if (step == 0) fail("range: the step is 0");
  std::vector<Value> items;
  for (int64_t i = begin; step > 0 ? i < end : i > end;) {
    if (static_cast<int64_t>(items.size()) >= kMaxRange)
      fail("range: more than {} items", kMaxRange);
    items.push_back({i});
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  runtime.spend(static_cast<int64_t>(items.size()));
  return sequence_value(std::move(items));
}

Value strftime_now(Runtime& runtime, const Arguments& args) {
  args.at_most(1);
  const std::string& format = text_of(args, 0, "format").bytes;
  if (format.size() > 200) fail("strftime_now: the format has more than 200 bytes");
  const time_t now = runtime.unix_time();
  tm local = {};
  localtime_r(&now, &local);
  char buffer[2048];
  // A format that gives nothing and one that gives too much both return 0.
  return text_value(std::string(buffer, strftime(buffer, sizeof buffer, format.c_str(), &local)));
}

}  // namespace

bool is_function(const std::string& name) {
  return name == "range" || name == "namespace" || name == "dict" || name == "raise_exception" ||
         name == "strftime_now";
}

Value call_function(Runtime& runtime, const std::string& name, const Arguments& args) {
  if (name == "range") return range(runtime, args);
  if (name == "strftime_now") return strftime_now(runtime, args);
  if (name == "raise_exception") {
    args.at_most(1);
    fail("{}", printable(to_text(args.required(0, "message")).bytes, 400));
  }
  std::vector<std::pair<Value, Value>> items;
  if (!args.positional.empty()) {
    const Dict* base = args.positional[0].dict();
    if (base == nullptr || args.positional.size() > 1)
      fail("{}: expected keywords or one dict", name);
    items = base->items;
  }
  for (const auto& [key, value] : args.keywords) {
    const Value name_of_item = text_value(key);
    std::erase_if(items, [&](const auto& item) { return equal(item.first, name_of_item); });
    items.emplace_back(name_of_item, value);
  }
  runtime.spend(static_cast<int64_t>(items.size()));
  if (name == "dict") return dict_value(std::move(items));
  Namespace* space = runtime.new_namespace();
  for (const auto& [key, value] : items) space->attributes.emplace_back(to_text(key).bytes, value);
  return {space};
}

bool has_method(const Value& self, const std::string& name) {
  if (self.text()) return contains(kTextMethods, name);
  if (self.sequence()) return contains(kListMethods, name) || contains(kChangingMethods, name);
  if (self.dict()) return contains(kDictMethods, name) || contains(kChangingMethods, name);
  return self.get<Loop*>() && (name == "cycle" || name == "changed");
}

Value call_method(Runtime& runtime, const Value& self, const std::string& name,
                  const Arguments& args) {
  if (const auto* loop = self.get<Loop*>()) {
    if (name == "cycle") {
      if (args.positional.empty()) fail("cycle needs values");
      return args.positional[(*loop)->index % args.positional.size()];
    }
    const Value now = sequence_value(args.positional, true);
    const bool changed = !(*loop)->has_changed || !equal((*loop)->last_changed, now);
    (*loop)->has_changed = true;
    (*loop)->last_changed = now;
    return {changed};
  }
  if (!self.text() && contains(kChangingMethods, name))
    fail("{}: lists and dicts cannot be changed by a template", name);
  if (const Text* text = self.text()) return text_method(runtime, *text, name, args);
  if (const Dict* dict = self.dict()) return dict_method(runtime, *dict, name, args);
  return list_method(runtime, *self.sequence(), name, args);
}

}  // namespace indexcache::jinja
