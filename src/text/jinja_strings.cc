#include "text/jinja_strings.h"

#include <algorithm>

#include "base/error.h"
#include "text/utf8.h"

namespace indexcache::jinja {

namespace {

// str.isspace(): Unicode's White_Space and the four separators of ASCII.
bool is_python_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

size_t step_back(std::string_view text, size_t at) {
  do --at;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80);
  return at;
}

bool contains_character(std::string_view chars, std::string_view character) {
  return chars.find(character) != chars.npos;  // UTF-8 is self-synchronizing
}

bool parse_hex(std::string_view text, size_t digits, uint32_t& value) {
  if (text.size() < digits) return false;
  value = 0;
  for (const char c : text.substr(0, digits)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) return false;
    value = value * 16 + static_cast<uint32_t>(digit);
  }
  return true;
}

}  // namespace

size_t space_length(std::string_view text, size_t at) {
  const Utf8Step step = utf8_step(text, at);
  return step.valid && is_python_space(step.code_point) ? step.length : 0;
}

size_t strip_end(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    const size_t before = step_back(text, end);
    if (space_length(text, before) == 0) break;
    end = before;
  }
  return end;
}

bool unescape(std::string_view literal, std::string& out) {
  constexpr std::string_view kNames = "\\'\"abfnrtv", kValues = "\\'\"\a\b\f\n\r\t\v";
  for (size_t i = 0; i < literal.size(); ++i) {
    if (literal[i] != '\\' || i + 1 >= literal.size()) {
      out += literal[i];
      continue;
    }
    const char c = literal[++i];
    if (const size_t name = kNames.find(c); name != kNames.npos) {
      out += kValues[name];
    } else if (c == '\n') {
      continue;
    } else if (c == 'x' || c == 'u' || c == 'U') {
      const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
      uint32_t value = 0;
      if (!parse_hex(literal.substr(i + 1), digits, value) || value > 0x10FFFF ||
          (value >= 0xD800 && value <= 0xDFFF)) {
        return false;
      }
      append_utf8(value, out);
      i += digits;
    } else if (c >= '0' && c <= '7') {
      uint32_t value = 0;
      size_t end = i;
      for (; end < std::min(i + 3, literal.size()) && literal[end] >= '0' && literal[end] <= '7';
           ++end) {
        value = value * 8 + static_cast<uint32_t>(literal[end] - '0');
      }
      append_utf8(value, out);
      i = end - 1;
    } else if (c == 'N') {
      return false;
    } else {
      out += '\\';
      out += c;
    }
  }
  return true;
}

Text strip(const Text& text, const Text* chars, bool left, bool right) {
  const std::string_view bytes = text.bytes;
  const auto stripped = [&](size_t at) -> size_t {
    if (chars == nullptr) return space_length(bytes, at);
    const uint32_t length = utf8_step(bytes, at).length;
    return contains_character(chars->bytes, bytes.substr(at, length)) ? length : 0;
  };
  size_t begin = 0, end = bytes.size();
  while (left && begin < end) {
    const size_t length = stripped(begin);
    if (length == 0) break;
    begin += length;
  }
  while (right && end > begin) {
    const size_t before = step_back(bytes, end);
    if (stripped(before) == 0) break;
    end = before;
  }
  return text.slice(begin, end);
}

std::vector<Text> split(const Text& text, const Text* separator, int64_t max_splits) {
  const std::string_view bytes = text.bytes;
  std::vector<Text> parts;
  const auto more = [&] {
    return max_splits < 0 || static_cast<int64_t>(parts.size()) < max_splits;
  };
  size_t at = 0;
  if (separator != nullptr) {
    if (separator->bytes.empty()) fail("empty separator");
    for (size_t found; more() && (found = bytes.find(separator->bytes, at)) != bytes.npos;) {
      parts.push_back(text.slice(at, found));
      at = found + separator->bytes.size();
    }
    parts.push_back(text.slice(at, bytes.size()));
    return parts;
  }
  while (true) {
    while (at < bytes.size() && space_length(bytes, at) > 0) at += space_length(bytes, at);
    if (at >= bytes.size()) return parts;
    if (!more()) {
      parts.push_back(text.slice(at, strip_end(bytes)));
      return parts;
    }
    const size_t begin = at;
    while (at < bytes.size() && space_length(bytes, at) == 0) at += utf8_step(bytes, at).length;
    parts.push_back(text.slice(begin, at));
  }
}

std::vector<Text> rsplit(const Text& text, const Text* separator, int64_t max_splits) {
  if (max_splits < 0) return split(text, separator, -1);
  if (separator == nullptr) fail("rsplit() with a count needs a separator here");
  if (separator->bytes.empty()) fail("empty separator");
  std::vector<Text> parts;
  size_t end = text.bytes.size();
  while (static_cast<int64_t>(parts.size()) < max_splits && end >= separator->bytes.size()) {
    const size_t found = text.bytes.rfind(separator->bytes, end - separator->bytes.size());
    if (found == std::string::npos) break;
    parts.push_back(text.slice(found + separator->bytes.size(), end));
    end = found;
  }
  parts.push_back(text.slice(0, end));
  std::ranges::reverse(parts);
  return parts;
}

std::vector<Text> split_lines(const Text& text, bool keep_ends) {
  const std::string_view bytes = text.bytes;
  std::vector<Text> lines;
  size_t begin = 0;
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Step step = utf8_step(bytes, at);
    const uint32_t c = step.code_point;
    const bool ends = (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 ||
                      c == 0x2028 || c == 0x2029;
    size_t next = at + step.length;
    if (!ends) {
      at = next;
      continue;
    }
    if (c == '\r' && next < bytes.size() && bytes[next] == '\n') ++next;
    lines.push_back(text.slice(begin, keep_ends ? next : at));
    begin = at = next;
  }
  if (begin < bytes.size()) lines.push_back(text.slice(begin, bytes.size()));
  return lines;
}

Text replace(const Text& text, std::string_view from, const Text& to, int64_t max_count) {
  Text out;
  size_t at = 0;
  int64_t count = 0;
  const auto more = [&] { return max_count < 0 || count < max_count; };
  if (from.empty()) {
    // Before every character and at the end.
    while (more()) {
      out.append(to);
      ++count;
      if (at >= text.bytes.size()) return out;
      const size_t next = at + utf8_step(text.bytes, at).length;
      out.append_slice(text, at, next);
      at = next;
    }
  }
  for (size_t found;
       !from.empty() && more() && (found = text.bytes.find(from, at)) != std::string::npos;
       ++count) {
    out.append_slice(text, at, found);
    out.append(to);
    at = found + from.size();
  }
  out.append_slice(text, at, text.bytes.size());
  return out;
}

int64_t code_points(std::string_view text) {
  return std::ranges::count_if(text,
                               [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

size_t byte_offset(std::string_view text, int64_t index) {
  size_t at = 0;
  for (; index > 0; --index) at += utf8_step(text, at).length;
  return at;
}

std::vector<Text> characters(const Text& text) {
  std::vector<Text> out;
  for (size_t at = 0; at < text.bytes.size();) {
    const size_t next = at + utf8_step(text.bytes, at).length;
    out.push_back(text.slice(at, next));
    at = next;
  }
  return out;
}

Text change_case(const Text& text, LetterCase to) {
  Text out = text;
  bool in_word = false;
  for (size_t i = 0; i < out.bytes.size(); ++i) {
    char& c = out.bytes[i];
    if (static_cast<uint8_t>(c) >= 0x80)
      fail("changing the case of text that is not ASCII is not supported");
    const bool lower = c >= 'a' && c <= 'z', upper = c >= 'A' && c <= 'Z';
    const bool raise = to == LetterCase::kUpper || (to == LetterCase::kTitle && !in_word) ||
                       (to == LetterCase::kCapitalized && i == 0);
    if (lower && raise) c = static_cast<char>(c - 32);
    if (upper && !raise) c = static_cast<char>(c + 32);
    in_word = lower || upper;
  }
  return out;
}

}  // namespace indexcache::jinja
