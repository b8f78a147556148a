#include "text/jinja_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "text/code_points.h"
#include "text/utf8.h"

namespace indexcache::jinja {

void Text::append(std::string_view own) {
  bytes += own;
  if (marked()) marks.append(own.size(), '\0');
}

void Text::append(const Text& other) { append_slice(other, 0, other.bytes.size()); }

void Text::append_slice(const Text& other, size_t begin, size_t end) {
  const size_t before = bytes.size();
  bytes.append(other.bytes, begin, end - begin);
  if (other.marked()) {
    marks.resize(before, '\0');
    marks.append(other.marks, begin, end - begin);
  } else if (marked()) {
    marks.resize(bytes.size(), '\0');
  }
}

Text Text::slice(size_t begin, size_t end) const {
  Text out;
  out.append_slice(*this, begin, end);
  return out;
}

Text own_text(std::string bytes) { return {std::move(bytes), {}}; }

Text input_text(std::string bytes) {
  std::string marks(bytes.size(), '\1');
  return {std::move(bytes), std::move(marks)};
}

const Text* Value::text() const {
  const auto* p = get<std::shared_ptr<const Text>>();
  return p ? p->get() : nullptr;
}
const Sequence* Value::sequence() const {
  const auto* p = get<std::shared_ptr<const Sequence>>();
  return p ? p->get() : nullptr;
}
const Dict* Value::dict() const {
  const auto* p = get<std::shared_ptr<const Dict>>();
  return p ? p->get() : nullptr;
}

const Value* Dict::find(const Value& key) const {
  for (const auto& [k, v] : items) {
    if (equal(k, key)) return &v;
  }
  return nullptr;
}

Value undefined(std::string what) {
  return {std::make_shared<const Undefined>(Undefined{std::move(what)})};
}
Value text_value(Text text) { return {std::make_shared<const Text>(std::move(text))}; }
Value text_value(std::string own) { return text_value(own_text(std::move(own))); }

namespace {

int depth_of(const Value& value) {
  if (const Sequence* s = value.sequence()) return s->depth;
  if (const Dict* d = value.dict()) return d->depth;
  return 0;
}

int checked_depth(int depth) {
  if (depth > kMaxValueDepth) fail("lists are nested deeper than {} levels", kMaxValueDepth);
  return depth;
}

}  // namespace

Value sequence_value(std::vector<Value> items, bool tuple) {
  int depth = 0;
  for (const Value& item : items) depth = std::max(depth, depth_of(item));
  return {std::make_shared<const Sequence>(
      Sequence{std::move(items), tuple, checked_depth(depth + 1)})};
}

Value dict_value(std::vector<std::pair<Value, Value>> items) {
  int depth = 0;
  for (const auto& [key, value] : items) depth = std::max(depth, depth_of(value));
  return {std::make_shared<const Dict>(Dict{std::move(items), checked_depth(depth + 1)})};
}

namespace {

Value from_json(const Json& json, bool input, std::string_view trusted_key, int level) {
  switch (json.type()) {
    case Json::value_t::null:
      return {None{}};
    case Json::value_t::boolean:
      return {json.get<bool>()};
    case Json::value_t::number_unsigned:
      if (json.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
        fail("the integer {} is too large", json.dump());
      [[fallthrough]];
    case Json::value_t::number_integer:
      return {json.get<int64_t>()};
    case Json::value_t::number_float:
      return {json.get<double>()};
    case Json::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const Json& item : json) items.push_back(from_json(item, input, trusted_key, level + 1));
      return sequence_value(std::move(items));
    }
    case Json::value_t::object: {
      std::vector<std::pair<Value, Value>> items;
      items.reserve(json.size());
      for (const auto& [key, item] : json.items()) {
        const bool trusted = !trusted_key.empty() && level == 1 && key == trusted_key;
        items.emplace_back(text_value(input ? input_text(key) : own_text(key)),
                           from_json(item, input && !trusted, trusted_key, level + 1));
      }
      return dict_value(std::move(items));
    }
    default: {
      const std::string& text = json.get_ref<const std::string&>();
      return text_value(input ? input_text(text) : own_text(text));
    }
  }
}

}  // namespace

Value input_value(const Json& json, std::string_view trusted_key) {
  return from_json(json, true, trusted_key, 0);
}
Value own_value(const Json& json) { return from_json(json, false, {}, 0); }

const char* type_name(const Value& value) {
  switch (value.data.index()) {
    case 0:
      return "Undefined";
    case 1:
      return "NoneType";
    case 2:
      return "bool";
    case 3:
      return "int";
    case 4:
      return "float";
    case 5:
      return "str";
    case 6:
      return value.sequence()->tuple ? "tuple" : "list";
    case 7:
      return "dict";
    case 8:
      return "Namespace";
    case 9:
      return "Macro";
    case 10:
      return "LoopContext";
    default:
      return "function";
  }
}

bool truthy(const Value& value) {
  switch (value.data.index()) {
    case 0:
    case 1:
      return false;
    case 2:
      return *value.boolean();
    case 3:
      return *value.integer() != 0;
    case 4:
      return *value.floating() != 0;
    case 5:
      return !value.text()->bytes.empty();
    case 6:
      return !value.sequence()->items.empty();
    case 7:
      return !value.dict()->items.empty();
    default:
      return true;
  }
}

double as_double(const Value& number) {
  if (const bool* b = number.boolean()) return *b;
  if (const int64_t* i = number.integer()) return static_cast<double>(*i);
  return *number.floating();
}

namespace {

int64_t as_integer(const Value& v) { return v.boolean() ? *v.boolean() : *v.integer(); }

int order(const auto& a, const auto& b) { return a < b ? -1 : b < a ? 1 : 0; }

int compare_numbers(const Value& a, const Value& b) {
  if (!a.floating() && !b.floating()) return order(as_integer(a), as_integer(b));
  const double x = as_double(a), y = as_double(b);
  return std::isnan(x) || std::isnan(y) ? 2 : order(x, y);
}

}  // namespace

bool equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == 0;
  if (a.data.index() != b.data.index()) return false;
  switch (a.data.index()) {
    case 0:
    case 1:
      return true;
    case 5:
      return a.text()->bytes == b.text()->bytes;
    case 6: {
      const Sequence &x = *a.sequence(), &y = *b.sequence();
      return x.tuple == y.tuple && std::ranges::equal(x.items, y.items, equal);
    }
    case 7: {
      const Dict &x = *a.dict(), &y = *b.dict();
      if (x.items.size() != y.items.size()) return false;
      return std::ranges::all_of(x.items, [&](const auto& item) {
        const Value* other = y.find(item.first);
        return other != nullptr && equal(item.second, *other);
      });
    }
    case 8:
      return *a.get<Namespace*>() == *b.get<Namespace*>();
    case 9:
      return *a.get<const Macro*>() == *b.get<const Macro*>();
    case 10:
      return *a.get<Loop*>() == *b.get<Loop*>();
    default:
      return false;
  }
}

int compare(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return compare_numbers(a, b);
  if (a.text() && b.text()) return order(a.text()->bytes, b.text()->bytes);
  const Sequence *x = a.sequence(), *y = b.sequence();
  if (x && y && x->tuple == y->tuple) {
    for (size_t i = 0; i < std::min(x->items.size(), y->items.size()); ++i) {
      if (!equal(x->items[i], y->items[i])) return compare(x->items[i], y->items[i]);
    }
    return order(x->items.size(), y->items.size());
  }
  if (a.is_undefined()) fail("{}", (*a.get<std::shared_ptr<const Undefined>>())->what);
  if (b.is_undefined()) fail("{}", (*b.get<std::shared_ptr<const Undefined>>())->what);
  fail("'{}' and '{}' have no order", type_name(a), type_name(b));
}

std::vector<size_t> sorted_order(size_t count, const std::function<bool(size_t, size_t)>& less) {
  std::vector<size_t> order(count), merged(count);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t width = 1; width < count; width *= 2) {
    for (size_t begin = 0; begin < count; begin += 2 * width) {
      const auto at = [&](size_t offset) {
        return order.begin() + static_cast<ptrdiff_t>(std::min(begin + offset, count));
      };
      std::merge(at(0), at(width), at(width), at(2 * width),
                 merged.begin() + static_cast<ptrdiff_t>(begin), less);
    }
    order.swap(merged);
  }
  return order;
}

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  // The shortest digits that read back the same, laid out as Python does: an exponent below 1e-4
  // and from 1e16 up.
  char buffer[40];
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  const std::string text(buffer, end);
  const size_t e = text.find('e');
  const int exponent = std::stoi(text.substr(e + 1));
  if (exponent < -4 || exponent >= 16) return text;
  const auto fixed =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed).ptr;
  std::string out(buffer, fixed);
  if (out.find('.') == out.npos) out += ".0";
  return out;
}

namespace {

bool is_printable(uint32_t code_point) {
  if (code_point < 0x7F) return code_point >= 0x20;
  static const CodePointSet hidden = unite(*category_set("C"), *category_set("Z"));
  return !hidden.contains(code_point);
}

void append_escape(std::string& out, uint32_t code_point) {
  if (code_point <= 0xFF) {
    out += fmt::format("\\x{:02x}", code_point);
  } else if (code_point <= 0xFFFF) {
    out += fmt::format("\\u{:04x}", code_point);
  } else {
    out += fmt::format("\\U{:08x}", code_point);
  }
}

std::string text_repr(std::string_view text) {
  const bool single = text.find('\'') != text.npos && text.find('"') == text.npos;
  const char quote = single ? '"' : '\'';
  std::string out(1, quote);
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    const char c = text[at];
    if (c == quote || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (step.valid && is_printable(step.code_point)) {
      out += text.substr(at, step.length);
    } else {
      append_escape(out, step.code_point);
    }
    at += step.length;
  }
  return out += quote;
}

// What has parts becomes input as a whole if any part is: nobody writes control tokens in a repr.
Text all_or_none(std::string bytes, bool marked) {
  return marked ? input_text(std::move(bytes)) : own_text(std::move(bytes));
}

bool any_marked(const Value& value) {
  if (const Text* text = value.text()) return text->marked();
  if (const Sequence* s = value.sequence()) return std::ranges::any_of(s->items, any_marked);
  if (const Dict* d = value.dict()) {
    return std::ranges::any_of(d->items, [](const auto& item) {
      return any_marked(item.first) || any_marked(item.second);
    });
  }
  return false;
}

void append_repr(std::string& out, const Value& value) {
  if (const Text* text = value.text()) {
    out += text_repr(text->bytes);
  } else if (const Sequence* s = value.sequence()) {
    out += s->tuple ? '(' : '[';
    for (size_t i = 0; i < s->items.size(); ++i) {
      if (i > 0) out += ", ";
      append_repr(out, s->items[i]);
    }
    if (s->tuple && s->items.size() == 1) out += ',';
    out += s->tuple ? ')' : ']';
  } else if (const Dict* d = value.dict()) {
    out += '{';
    for (size_t i = 0; i < d->items.size(); ++i) {
      if (i > 0) out += ", ";
      append_repr(out, d->items[i].first);
      out += ": ";
      append_repr(out, d->items[i].second);
    }
    out += '}';
  } else if (value.is_undefined()) {
    out += "Undefined";
  } else if (value.is_none()) {
    out += "None";
  } else if (const bool* b = value.boolean()) {
    out += *b ? "True" : "False";
  } else if (const int64_t* i = value.integer()) {
    out += std::to_string(*i);
  } else if (const double* f = value.floating()) {
    out += float_repr(*f);
  } else {
    fail("a {} cannot be printed", type_name(value));
  }
}

void append_json_text(std::string& out, std::string_view text, bool ensure_ascii) {
  out += '"';
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    const uint32_t c = step.code_point;
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (c < 0x20 || (ensure_ascii && c >= 0x7F && c <= 0xFFFF)) {
          out += fmt::format("\\u{:04x}", c);
        } else if (ensure_ascii && c > 0xFFFF) {
          out += fmt::format("\\u{:04x}\\u{:04x}", 0xD7C0 + (c >> 10), 0xDC00 + (c & 0x3FF));
        } else {
          out += text.substr(at, step.length);
        }
    }
    at += step.length;
  }
  out += '"';
}

void append_break(std::string& out, const JsonStyle& style, int level) {
  if (style.indent < 0) return;
  out += '\n';
  out.append(static_cast<size_t>(style.indent) * static_cast<size_t>(level), ' ');
}

std::string json_key(const Value& key) {
  if (const Text* text = key.text()) return text->bytes;
  if (key.is_none()) return "null";
  if (const bool* b = key.boolean()) return *b ? "true" : "false";
  if (key.is_number()) return to_text(key).bytes;
  fail("keys of JSON must be text, not '{}'", type_name(key));
}

void append_json(std::string& out, const Value& value, const JsonStyle& style, int level) {
  if (const Text* text = value.text()) {
    append_json_text(out, text->bytes, style.ensure_ascii);
  } else if (const Sequence* s = value.sequence()) {
    if (s->items.empty()) {
      out += "[]";
      return;
    }
    out += '[';
    for (size_t i = 0; i < s->items.size(); ++i) {
      if (i > 0) out += style.item_separator;
      append_break(out, style, level + 1);
      append_json(out, s->items[i], style, level + 1);
    }
    append_break(out, style, level);
    out += ']';
  } else if (const Dict* d = value.dict()) {
    if (d->items.empty()) {
      out += "{}";
      return;
    }
    std::vector<size_t> order(d->items.size());
    std::iota(order.begin(), order.end(), size_t{0});
    if (style.sort_keys) {
      order = sorted_order(order.size(), [&](size_t x, size_t y) {
        return compare(d->items[x].first, d->items[y].first) == -1;
      });
    }
    out += '{';
    for (size_t i = 0; i < order.size(); ++i) {
      const auto& [key, item] = d->items[order[i]];
      if (i > 0) out += style.item_separator;
      append_break(out, style, level + 1);
      append_json_text(out, json_key(key), style.ensure_ascii);
      out += style.key_separator;
      append_json(out, item, style, level + 1);
    }
    append_break(out, style, level);
    out += '}';
  } else if (value.is_none()) {
    out += "null";
  } else if (const bool* b = value.boolean()) {
    out += *b ? "true" : "false";
  } else if (const int64_t* i = value.integer()) {
    out += std::to_string(*i);
  } else if (const double* f = value.floating()) {
    out += std::isnan(*f)   ? "NaN"
           : std::isinf(*f) ? (*f > 0 ? "Infinity" : "-Infinity")
                            : float_repr(*f);
  } else {
    fail("Object of type {} is not JSON serializable", type_name(value));
  }
}

}  // namespace

Text to_text(const Value& value) {
  if (const Text* text = value.text()) return *text;
  if (value.is_undefined()) return {};
  return repr(value);
}

Text repr(const Value& value) {
  std::string out;
  append_repr(out, value);
  return all_or_none(std::move(out), any_marked(value));
}

Text to_json(const Value& value, const JsonStyle& style) {
  std::string out;
  append_json(out, value, style, 0);
  return all_or_none(std::move(out), any_marked(value));
}

}  // namespace indexcache::jinja
