// Filters and tests. What maps or selects gives a list at once, where Jinja gives a generator.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <unordered_map>

#include "base/error.h"
#include "text/jinja_run.h"
#include "text/jinja_strings.h"

namespace indexcache::jinja {

namespace {

using Filter = Value (*)(Runtime&, const Value&, const Arguments&);
using Test = bool (*)(Runtime&, const Value&, const Arguments&);

void check_defined(const Value& value) {
  if (value.is_undefined()) fail_undefined(value);
}

// "a.b.0": attributes of attributes.
Value attribute_path(Runtime& runtime, Value value, const Value& path) {
  if (!path.text()) return runtime.get_item(value, path);
  for (const Text& part : split(*path.text(), &*text_value(".").text(), -1)) {
    const bool digits = !part.bytes.empty() && std::ranges::all_of(part.bytes, [](char c) {
      return c >= '0' && c <= '9';
    });
    int64_t index = 0;
    if (digits) std::from_chars(part.bytes.data(), part.bytes.data() + part.bytes.size(), index);
    value = runtime.get_item(value, digits ? Value{index} : text_value(part));
  }
  return value;
}

Arguments rest_of(const Arguments& args, size_t skip) {
  Arguments out = args;
  out.positional.erase(
      out.positional.begin(),
      out.positional.begin() + static_cast<ptrdiff_t>(std::min(skip, out.positional.size())));
  return out;
}

// Keys for sorting and finding duplicates ignore the case of text, unless asked not to.
Value sort_key(Runtime& runtime, const Value& item, const Value* attribute, bool case_sensitive) {
  Value key = attribute ? attribute_path(runtime, item, *attribute) : item;
  if (key.text() && !case_sensitive) key = text_value(change_case(*key.text(), LetterCase::kLower));
  return key;
}

std::vector<Value> sorted(Runtime& runtime, const std::vector<Value>& items, const Value* attribute,
                          bool case_sensitive, bool reverse) {
  std::vector<Value> keys;
  for (const Value& item : items)
    keys.push_back(sort_key(runtime, item, attribute, case_sensitive));
  const auto less = [&](size_t a, size_t b) {
    runtime.spend(1);
    return (reverse ? compare(keys[b], keys[a]) : compare(keys[a], keys[b])) == -1;
  };
  std::vector<Value> out;
  for (const size_t i : sorted_order(items.size(), less)) out.push_back(items[i]);
  return out;
}

Value best(Runtime& runtime, const Value& value, const Arguments& args, int sign) {
  args.at_most(2);
  const std::vector<Value> items = runtime.iterate(value);
  if (items.empty()) return undefined("No aggregated item, sequence was empty.");
  const Value* attribute = args.find(1, "attribute");
  const bool case_sensitive = args.truthy_or(0, "case_sensitive", false);
  size_t found = 0;
  for (size_t i = 1; i < items.size(); ++i) {
    if (compare(sort_key(runtime, items[i], attribute, case_sensitive),
                sort_key(runtime, items[found], attribute, case_sensitive)) == sign) {
      found = i;
    }
  }
  return items[found];
}

// select, reject, selectattr, rejectattr.
Value selected(Runtime& runtime, const Value& value, const Arguments& args, bool by_attribute,
               bool wanted) {
  const size_t first = by_attribute ? 1 : 0;
  const bool named = args.positional.size() > first;
  if (by_attribute && args.positional.empty()) fail("{} needs an attribute", args.callee);
  Arguments test_args = rest_of(args, first + 1);
  if (named) test_args.callee = to_text(args.positional[first]).bytes;
  std::vector<Value> out;
  for (const Value& item : runtime.iterate(value)) {
    const Value tested = by_attribute ? attribute_path(runtime, item, args.positional[0]) : item;
    const bool holds_here =
        named ? runtime.call_test(test_args.callee, tested, test_args) : truthy(tested);
    if (holds_here == wanted) out.push_back(item);
  }
  return sequence_value(std::move(out));
}

Value map(Runtime& runtime, const Value& value, const Arguments& args) {
  std::vector<Value> out;
  const Value* attribute = args.find(SIZE_MAX, "attribute");
  const Value* fallback = args.find(SIZE_MAX, "default");
  for (const Value& item : runtime.iterate(value)) {
    if (attribute != nullptr) {
      Value found = attribute_path(runtime, item, *attribute);
      out.push_back(found.is_undefined() && fallback ? *fallback : std::move(found));
    } else {
      Arguments filter_args = rest_of(args, 1);
      filter_args.callee = to_text(args.required(0, "filter")).bytes;
      out.push_back(runtime.call_filter(filter_args.callee, item, filter_args));
    }
  }
  return sequence_value(std::move(out));
}

Value to_json_filter(Runtime& runtime, const Value& value, const Arguments& args) {
  JsonStyle style;
  style.ensure_ascii = args.truthy_or(0, "ensure_ascii", false);
  style.indent = static_cast<int>(std::clamp<int64_t>(args.integer_or(1, "indent", -1), -1, 64));
  if (style.indent >= 0) style.item_separator = ",";
  if (const Value* separators = args.find(2, "separators"); separators && !separators->is_none()) {
    const std::vector<Value> pair = runtime.iterate(*separators);
    if (pair.size() != 2) fail("tojson: expected two separators");
    style.item_separator = to_text(pair[0]).bytes;
    style.key_separator = to_text(pair[1]).bytes;
  }
  style.sort_keys = args.truthy_or(3, "sort_keys", false);
  Text out = to_json(value, style);
  runtime.spend(static_cast<int64_t>(out.bytes.size()) / 8);
  return text_value(std::move(out));
}

std::optional<double> parse_float(const Text& text) {
  const std::string bytes = strip(text, nullptr, true, true).bytes;
  double value = 0;
  const char* begin = bytes.data() + (bytes.starts_with('+') ? 1 : 0);
  const char* end = bytes.data() + bytes.size();
  const auto result = std::from_chars(begin, end, value);
  if (begin == end || result.ec != std::errc() || result.ptr != end) return std::nullopt;
  return value;
}

Value to_integer(Runtime&, const Value& value, const Arguments& args) {
  args.at_most(2);
  if (args.integer_or(1, "base", 10) != 10) fail("int: only base 10 is supported");
  std::optional<double> number;
  if (const Text* text = value.text()) {
    const std::string bytes = strip(*text, nullptr, true, true).bytes;
    int64_t out = 0;
    const char* begin = bytes.data() + (bytes.starts_with('+') ? 1 : 0);
    const char* end = bytes.data() + bytes.size();
    const auto result = std::from_chars(begin, end, out);
    if (begin != end && result.ec == std::errc() && result.ptr == end) return {out};
    number = parse_float(*text);
  } else if (value.is_number()) {
    if (!value.floating()) return {static_cast<int64_t>(as_double(value))};
    number = as_double(value);
  }
  if (!number || std::isnan(*number)) {
    const Value* fallback = args.find(0, "default");
    return fallback ? *fallback : Value{int64_t{0}};
  }
  if (!(std::abs(*number) < 0x1p63)) fail("int: {} does not fit in 64 bits", *number);
  return {static_cast<int64_t>(*number)};
}

Value to_float(Runtime&, const Value& value, const Arguments& args) {
  args.at_most(1);
  if (value.is_number()) return {as_double(value)};
  if (const Text* text = value.text())
    if (const auto number = parse_float(*text)) return {*number};
  const Value* fallback = args.find(0, "default");
  return fallback ? *fallback : Value{0.0};
}

Value round(Runtime&, const Value& value, const Arguments& args) {
  check_defined(value);
  if (!value.is_number()) fail("round: found a {}, expected a number", type_name(value));
  const int64_t digits = std::clamp<int64_t>(args.integer_or(0, "precision", 0), -300, 300);
  const Value* method_value = args.find(1, "method");
  const std::string method = method_value ? to_text(*method_value).bytes : "common";
  const double x = as_double(value);
  if (method == "common") {
    if (!value.floating()) {
      if (digits < 0) fail("round: a negative precision is not supported");
      return value;
    }
    // Correctly rounded decimal digits, half to even, as Python's round().
    if (!std::isfinite(x) || digits > 17) return value;
    if (digits < 0) fail("round: a negative precision is not supported");
    return {std::strtod(fmt::format("{:.{}f}", x, digits).c_str(), nullptr)};
  }
  if (method != "ceil" && method != "floor") fail("method must be common, ceil or floor");
  const double scale = std::pow(10.0, static_cast<double>(digits));
  return {(method == "ceil" ? std::ceil(x * scale) : std::floor(x * scale)) / scale};
}

Value indent(Runtime& runtime, const Value& value, const Arguments& args) {
  const Value* width = args.find(0, "width");
  const Text margin =
      width && width->text()
          ? *width->text()
          : own_text(std::string(
                static_cast<size_t>(std::clamp<int64_t>(args.integer_or(0, "width", 4), 0, 1000)),
                ' '));
  const bool first = args.truthy_or(1, "first", false), blank = args.truthy_or(2, "blank", false);
  Text text = to_text(value);
  text.append("\n");
  Text out;
  if (first) out.append(margin);
  bool is_first = true;
  for (const Text& line : split_lines(text, false)) {
    if (!is_first) {
      out.append("\n");
      if (blank || !line.bytes.empty()) out.append(margin);
    }
    runtime.spend(1 + static_cast<int64_t>(margin.bytes.size()) / 8);
    out.append(line);
    is_first = false;
  }
  return text_value(std::move(out));
}

Value length(Runtime&, const Value& value, const Arguments&) {
  if (value.is_undefined()) return {int64_t{0}};
  if (const Text* text = value.text()) return {code_points(text->bytes)};
  if (const Sequence* s = value.sequence()) return {static_cast<int64_t>(s->items.size())};
  if (const Dict* d = value.dict()) return {static_cast<int64_t>(d->items.size())};
  fail("a {} has no length", type_name(value));
}

Value join(Runtime& runtime, const Value& value, const Arguments& args) {
  args.at_most(2);
  const Value* separator = args.find(0, "d");
  const Value* attribute = args.find(1, "attribute");
  const Text between = separator ? to_text(*separator) : Text{};
  Text out;
  bool first = true;
  for (const Value& item : runtime.iterate(value)) {
    if (!first) out.append(between);
    out.append(to_text(attribute ? attribute_path(runtime, item, *attribute) : item));
    first = false;
  }
  runtime.spend(static_cast<int64_t>(out.bytes.size()) / 8);
  return text_value(std::move(out));
}

Value dict_sort(Runtime& runtime, const Value& value, const Arguments& args) {
  args.at_most(3);
  check_defined(value);
  if (!value.dict()) fail("dictsort: found a {}, expected a dict", type_name(value));
  const Value* by = args.find(1, "by");
  const Value place = {int64_t{by && to_text(*by).bytes == "value" ? 1 : 0}};
  std::vector<Value> pairs;
  for (const auto& [key, item] : value.dict()->items)
    pairs.push_back(sequence_value({key, item}, true));
  return sequence_value(sorted(runtime, pairs, &place, args.truthy_or(0, "case_sensitive", false),
                               args.truthy_or(2, "reverse", false)));
}

Value unique(Runtime& runtime, const Value& value, const Arguments& args) {
  args.at_most(2);
  std::vector<Value> keys, out;
  for (const Value& item : runtime.iterate(value)) {
    Value key = sort_key(runtime, item, args.find(1, "attribute"),
                         args.truthy_or(0, "case_sensitive", false));
    runtime.spend(static_cast<int64_t>(keys.size()));
    if (std::ranges::any_of(keys, [&](const Value& seen) { return equal(seen, key); })) continue;
    keys.push_back(std::move(key));
    out.push_back(item);
  }
  return sequence_value(std::move(out));
}

Value items(Runtime&, const Value& value, const Arguments&) {
  std::vector<Value> out;
  if (!value.is_undefined()) {
    if (!value.dict()) fail("items: found a {}, expected a dict", type_name(value));
    for (const auto& [key, item] : value.dict()->items)
      out.push_back(sequence_value({key, item}, true));
  }
  return sequence_value(std::move(out));
}

Value sum(Runtime& runtime, const Value& value, const Arguments& args) {
  args.at_most(2);
  const Value* attribute = args.find(0, "attribute");
  const Value* start = args.find(1, "start");
  double total = start ? as_double(*start) : 0;
  bool floating = start && start->floating();
  for (const Value& item : runtime.iterate(value)) {
    const Value number = attribute ? attribute_path(runtime, item, *attribute) : item;
    if (!number.is_number()) fail("sum: found a {}, expected a number", type_name(number));
    floating = floating || number.floating();
    total += as_double(number);
  }
  if (floating) return {total};
  if (!(std::abs(total) < 0x1p53)) fail("sum: too large");
  return {static_cast<int64_t>(total)};
}

Value reversed(Runtime& runtime, const Value& value, const Arguments&) {
  std::vector<Value> out = runtime.iterate(value);
  std::ranges::reverse(out);
  if (!value.text()) return sequence_value(std::move(out));
  Text text;
  for (const Value& item : out) text.append(*item.text());
  return text_value(std::move(text));
}

Value escape(Runtime&, const Value& value, const Arguments&) {
  Text out = to_text(value);
  constexpr std::pair<const char*, const char*> kEntities[] = {
      {"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"'", "&#39;"}, {"\"", "&#34;"}};
  for (const auto& [from, to] : kEntities) out = replace(out, from, own_text(to), -1);
  return text_value(std::move(out));
}

Value fallback(Runtime&, const Value& value, const Arguments& args) {
  args.at_most(2);
  const Value* other = args.find(0, "default_value");
  const bool take = value.is_undefined() || (args.truthy_or(1, "boolean", false) && !truthy(value));
  return !take ? value : other ? *other : text_value("");
}

Value end_item(Runtime& runtime, const Value& value, bool first) {
  const std::vector<Value> all = runtime.iterate(value);
  if (all.empty()) return undefined("the sequence was empty");
  return first ? all.front() : all.back();
}

template <LetterCase to>
Value cased(Runtime&, const Value& value, const Arguments& args) {
  args.at_most(0);
  return text_value(change_case(to_text(value), to));
}

const std::unordered_map<std::string, Filter>& filters() {
  static const std::unordered_map<std::string, Filter> table = {
      {"tojson", to_json_filter},
      {"trim",
       [](Runtime&, const Value& v, const Arguments& a) {
         const Value* chars = a.find(0, "chars");
         return text_value(
             strip(to_text(v), chars && chars->text() ? chars->text() : nullptr, true, true));
       }},
      {"upper", cased<LetterCase::kUpper>},
      {"lower", cased<LetterCase::kLower>},
      {"capitalize", cased<LetterCase::kCapitalized>},
      {"title", cased<LetterCase::kTitle>},
      {"length", length},
      {"count", length},
      {"first", [](Runtime& r, const Value& v, const Arguments&) { return end_item(r, v, true); }},
      {"last", [](Runtime& r, const Value& v, const Arguments&) { return end_item(r, v, false); }},
      {"join", join},
      {"default", fallback},
      {"d", fallback},
      {"string", [](Runtime&, const Value& v, const Arguments&) { return text_value(to_text(v)); }},
      {"int", to_integer},
      {"float", to_float},
      {"list",
       [](Runtime& r, const Value& v, const Arguments&) { return sequence_value(r.iterate(v)); }},
      {"map", map},
      {"select", [](Runtime& r, const Value& v,
                    const Arguments& a) { return selected(r, v, a, false, true); }},
      {"reject", [](Runtime& r, const Value& v,
                    const Arguments& a) { return selected(r, v, a, false, false); }},
      {"selectattr", [](Runtime& r, const Value& v,
                        const Arguments& a) { return selected(r, v, a, true, true); }},
      {"rejectattr", [](Runtime& r, const Value& v,
                        const Arguments& a) { return selected(r, v, a, true, false); }},
      {"items", items},
      {"dictsort", dict_sort},
      {"replace",
       [](Runtime& r, const Value& v, const Arguments& a) {
         a.at_most(3);
         const Text text = to_text(v), to = to_text(a.required(1, "new"));
         const std::string from = to_text(a.required(0, "old")).bytes;
         const int64_t matches = from.empty()
                                     ? static_cast<int64_t>(text.bytes.size()) + 1
                                     : static_cast<int64_t>(text.bytes.size() / from.size()) + 1;
         r.spend(matches * static_cast<int64_t>(to.bytes.size() + 8) / 8);
         return text_value(replace(text, from, to, a.integer_or(2, "count", -1)));
       }},
      {"safe", [](Runtime&, const Value& v, const Arguments&) { return text_value(to_text(v)); }},
      {"escape", escape},
      {"e", escape},
      {"indent", indent},
      {"abs",
       [](Runtime&, const Value& v, const Arguments&) -> Value {
         check_defined(v);
         if (!v.is_number()) fail("abs: found a {}, expected a number", type_name(v));
         if (v.floating()) return {std::abs(*v.floating())};
         const int64_t i = v.boolean() ? *v.boolean() : *v.integer();
         if (i == INT64_MIN) fail("abs: an integer does not fit in 64 bits");
         return {std::abs(i)};
       }},
      {"round", round},
      {"min", [](Runtime& r, const Value& v, const Arguments& a) { return best(r, v, a, -1); }},
      {"max", [](Runtime& r, const Value& v, const Arguments& a) { return best(r, v, a, 1); }},
      {"sum", sum},
      {"sort",
       [](Runtime& r, const Value& v, const Arguments& a) {
         a.at_most(3);
         return sequence_value(sorted(r, r.iterate(v), a.find(2, "attribute"),
                                      a.truthy_or(1, "case_sensitive", false),
                                      a.truthy_or(0, "reverse", false)));
       }},
      {"reverse", reversed},
      {"unique", unique},
  };
  return table;
}

bool is_cased(const Value& value, bool upper) {
  bool any = false;
  const std::string text = to_text(value).bytes;
  for (const char c : text) {
    if (static_cast<uint8_t>(c) >= 0x80)
      fail("the case of text that is not ASCII is not supported");
    if (c >= 'a' && c <= 'z') {
      if (upper) return false;
      any = true;
    }
    if (c >= 'A' && c <= 'Z') {
      if (!upper) return false;
      any = true;
    }
  }
  return any;
}

int64_t remainder(const Value& value, int64_t by) {
  check_defined(value);
  if (!value.integer() && !value.boolean())
    fail("found a {}, expected an integer", type_name(value));
  if (by == 0) fail("division by zero");
  return by == -1 ? 0 : (value.boolean() ? int64_t{*value.boolean()} : *value.integer()) % by;
}

bool same_as(const Value& a, const Value& b) {
  if (a.data.index() != b.data.index()) return false;
  if (const Sequence* s = a.sequence()) return s == b.sequence();
  if (const Dict* d = a.dict()) return d == b.dict();
  return equal(a, b);
}

template <int op>
bool compared(Runtime& runtime, const Value& value, const Arguments& args) {
  constexpr const char* kNames[] = {"==", "!=", "<", "<=", ">", ">=", "in"};
  args.at_most(1);
  return holds(runtime, kNames[op], value, args.required(0, "other"));
}

const std::unordered_map<std::string, Test>& tests() {
  static const std::unordered_map<std::string, Test> table = {
      {"defined", [](Runtime&, const Value& v, const Arguments&) { return !v.is_undefined(); }},
      {"undefined", [](Runtime&, const Value& v, const Arguments&) { return v.is_undefined(); }},
      {"none", [](Runtime&, const Value& v, const Arguments&) { return v.is_none(); }},
      {"string", [](Runtime&, const Value& v, const Arguments&) { return v.text() != nullptr; }},
      {"mapping", [](Runtime&, const Value& v, const Arguments&) { return v.dict() != nullptr; }},
      {"iterable", [](Runtime&, const Value& v, const Arguments&) { return is_iterable(v); }},
      {"sequence",
       [](Runtime&, const Value& v, const Arguments&) {
         return v.is_undefined() || v.text() || v.sequence() || v.dict();
       }},
      {"number", [](Runtime&, const Value& v, const Arguments&) { return v.is_number(); }},
      {"integer",
       [](Runtime&, const Value& v, const Arguments&) { return v.integer() != nullptr; }},
      {"float", [](Runtime&, const Value& v, const Arguments&) { return v.floating() != nullptr; }},
      {"boolean",
       [](Runtime&, const Value& v, const Arguments&) { return v.boolean() != nullptr; }},
      {"true",
       [](Runtime&, const Value& v, const Arguments&) { return v.boolean() && *v.boolean(); }},
      {"false",
       [](Runtime&, const Value& v, const Arguments&) { return v.boolean() && !*v.boolean(); }},
      {"callable",
       [](Runtime&, const Value& v, const Arguments&) {
         return v.get<const Macro*>() || v.get<Method>() ||
                v.get<std::shared_ptr<const Function>>();
       }},
      {"odd", [](Runtime&, const Value& v, const Arguments&) { return remainder(v, 2) != 0; }},
      {"even", [](Runtime&, const Value& v, const Arguments&) { return remainder(v, 2) == 0; }},
      {"divisibleby",
       [](Runtime&, const Value& v, const Arguments& a) {
         return remainder(v, a.integer_or(0, "num", 0)) == 0;
       }},
      {"lower", [](Runtime&, const Value& v, const Arguments&) { return is_cased(v, false); }},
      {"upper", [](Runtime&, const Value& v, const Arguments&) { return is_cased(v, true); }},
      {"sameas", [](Runtime&, const Value& v,
                    const Arguments& a) { return same_as(v, a.required(0, "other")); }},
      {"filter", [](Runtime&, const Value& v,
                    const Arguments&) { return v.text() && filters().contains(v.text()->bytes); }},
      {"test", [](Runtime&, const Value& v,
                  const Arguments&) { return v.text() && tests().contains(v.text()->bytes); }},
      {"==", compared<0>},
      {"eq", compared<0>},
      {"equalto", compared<0>},
      {"!=", compared<1>},
      {"ne", compared<1>},
      {"<", compared<2>},
      {"lt", compared<2>},
      {"lessthan", compared<2>},
      {"<=", compared<3>},
      {"le", compared<3>},
      {">", compared<4>},
      {"gt", compared<4>},
      {"greaterthan", compared<4>},
      {">=", compared<5>},
      {"ge", compared<5>},
      {"in", compared<6>},
  };
  return table;
}

}  // namespace

Value apply_filter(Runtime& runtime, const std::string& name, const Value& value,
                   const Arguments& args) {
  const auto it = filters().find(name);
  if (it == filters().end()) fail("the filter {} is not supported", printable(name, 60));
  return it->second(runtime, value, args);
}

bool apply_test(Runtime& runtime, const std::string& name, const Value& value,
                const Arguments& args) {
  const auto it = tests().find(name);
  if (it == tests().end()) fail("the test {} is not supported", printable(name, 60));
  return it->second(runtime, value, args);
}

bool holds(Runtime& runtime, const std::string& op, const Value& a, const Value& b) {
  if (op == "==") return equal(a, b);
  if (op == "!=") return !equal(a, b);
  if (op == "not in") return !holds(runtime, "in", a, b);
  if (op == "in") {
    if (const Text* text = b.text()) {
      check_defined(a);
      if (!a.text()) fail("'in' a text needs a text, found a {}", type_name(a));
      return text->bytes.find(a.text()->bytes) != std::string::npos;
    }
    if (const Dict* dict = b.dict()) return dict->find(a) != nullptr;
    return std::ranges::any_of(runtime.iterate(b),
                               [&](const Value& item) { return equal(item, a); });
  }
  const int order = compare(a, b);
  if (order == 2) return false;
  return op == "<" ? order < 0 : op == "<=" ? order <= 0 : op == ">" ? order > 0 : order >= 0;
}

}  // namespace indexcache::jinja
