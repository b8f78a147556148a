#include "checkpoint/json_reader.h"

#include <charconv>

#include "base/error.h"

namespace indexcache {

namespace {

constexpr size_t kMaxDepth = 64;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Length of the UTF-8 sequence at the front of `s` that starts with a byte >= 0x80; 0 if it is not
// valid.
size_t multibyte_length(std::string_view s) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned char lead = byte(0);
  const size_t length = lead >= 0xC2 && lead <= 0xDF   ? 2
                        : lead >= 0xE0 && lead <= 0xEF ? 3
                        : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                       : 0;
  if (length == 0 || s.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  // Overlong forms, surrogates, and what lies above U+10FFFF.
  if ((lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xED && byte(1) > 0x9F) ||
      (lead == 0xF0 && byte(1) < 0x90) || (lead == 0xF4 && byte(1) > 0x8F)) {
    return 0;
  }
  return length;
}

void append_utf8(std::string* out, uint32_t code_point) {
  const auto put = [&](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

}  // namespace

JsonReader::JsonReader(std::string_view text, std::string where, uint64_t offset)
    : text_(text), where_(std::move(where)), offset_(offset) {}

void JsonReader::fail_here(std::string_view problem) {
  const std::string context =
      context_ == nullptr ? "" : fmt::format(", in \"{}\"", printable(*context_));
  fail("{} at byte {}{}: {}", where_, offset_ + position_, context, problem);
}

void JsonReader::wrong(std::string_view expected) {
  const std::string found = excerpt();
  fail_here(fmt::format("found {}, expected {}", found, expected));
}

std::string JsonReader::excerpt() {
  if (peek() == 0 && position_ == text_.size()) return "the end of the text";
  size_t end = position_ + 1;
  // A string shows whole (up to the cut), other values up to what separates them from the next.
  const std::string_view stops = text_[position_] == '"' ? "\"" : ",]}:\n\r\t ";
  while (end < text_.size() && end - position_ < 40 &&
         stops.find(text_[end]) == std::string_view::npos) {
    ++end;
  }
  if (end < text_.size() && text_[end] == '"' && text_[position_] == '"') ++end;
  return printable(text_.substr(position_, end - position_), 60);
}

void JsonReader::skip_space() {
  while (position_ < text_.size()) {
    const char c = text_[position_];
    if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return;
    ++position_;
  }
}

char JsonReader::peek() {
  skip_space();
  return position_ < text_.size() ? text_[position_] : '\0';
}

void JsonReader::open(char bracket, const char* expected) {
  if (peek() != bracket) wrong(expected);
  if (first_member_.size() >= kMaxDepth) {
    fail_here(fmt::format("nested deeper than {} levels", kMaxDepth));
  }
  ++position_;
  first_member_.push_back(true);
}

void JsonReader::begin_object() { open('{', "an object"); }
void JsonReader::begin_array() { open('[', "an array"); }

bool JsonReader::next_member(char close) {
  const char c = peek();
  const bool first = first_member_.back();
  if (c == close) {
    ++position_;
    first_member_.pop_back();
    return false;
  }
  if (!first) {
    if (c != ',') wrong(close == '}' ? "',' or '}'" : "',' or ']'");
    ++position_;
    if (peek() == close) wrong("another value after ','");
  }
  first_member_.back() = false;
  return true;
}

bool JsonReader::next_key(std::string* key) {
  if (!next_member('}')) return false;
  string(key, "a key in quotes");
  if (peek() != ':') wrong("':'");
  ++position_;
  return true;
}

bool JsonReader::next_element() { return next_member(']'); }

void JsonReader::string(std::string* value, const char* expected) {
  if (peek() != '"') wrong(expected);
  ++position_;
  value->clear();
  size_t plain_begin = position_;
  const auto take_plain = [&] {
    value->append(text_.substr(plain_begin, position_ - plain_begin));
  };
  while (true) {
    if (position_ >= text_.size()) fail_here("found the end of the text inside a string");
    const auto c = static_cast<unsigned char>(text_[position_]);
    if (c == '"') {
      take_plain();
      ++position_;
      return;
    }
    if (c == '\\') {
      take_plain();
      ++position_;
      read_escape(value);
      plain_begin = position_;
    } else if (c < 0x20) {
      fail_here(fmt::format("found the control byte 0x{:02x} inside a string", c));
    } else if (c < 0x80) {
      ++position_;
    } else {
      const size_t length = multibyte_length(text_.substr(position_));
      if (length == 0) fail_here(fmt::format("found the byte 0x{:02x}, which is not UTF-8", c));
      position_ += length;
    }
  }
}

uint32_t JsonReader::read_hex4() {
  uint32_t value = 0;
  if (text_.size() - position_ < 4) fail_here("found the end of the text inside a \\u escape");
  const char* begin = text_.data() + position_;
  const auto [end, error] = std::from_chars(begin, begin + 4, value, 16);
  if (error != std::errc() || end != begin + 4) fail_here("expected four hex digits after \\u");
  position_ += 4;
  return value;
}

void JsonReader::read_escape(std::string* value) {
  if (position_ >= text_.size()) fail_here("found the end of the text inside a string");
  const char c = text_[position_++];
  switch (c) {
    case '"':
    case '\\':
    case '/':
      value->push_back(c);
      return;
    case 'b':
      value->push_back('\b');
      return;
    case 'f':
      value->push_back('\f');
      return;
    case 'n':
      value->push_back('\n');
      return;
    case 'r':
      value->push_back('\r');
      return;
    case 't':
      value->push_back('\t');
      return;
    case 'u':
      break;
    default:
      --position_;
      fail_here("unknown escape after a backslash");
  }
  uint32_t code_point = read_hex4();
  if (code_point >= 0xD800 && code_point <= 0xDFFF) {
    const bool high = code_point <= 0xDBFF && text_.substr(position_).starts_with("\\u");
    if (high) position_ += 2;
    const uint32_t low = high ? read_hex4() : 0;
    if (low < 0xDC00 || low > 0xDFFF) fail_here("found half of a surrogate pair");
    code_point = 0x10000 + ((code_point - 0xD800) << 10) + (low - 0xDC00);
  }
  append_utf8(value, code_point);
}

std::optional<uint64_t> JsonReader::unsigned_integer() {
  if (!is_digit(peek())) return std::nullopt;
  uint64_t value = 0;
  const char* begin = text_.data() + position_;
  const char* limit = text_.data() + text_.size();
  const auto [end, error] = std::from_chars(begin, limit, value);
  if (error != std::errc()) return std::nullopt;
  if (*begin == '0' && end != begin + 1) return std::nullopt;
  if (end != limit && (*end == '.' || *end == 'e' || *end == 'E')) return std::nullopt;
  position_ += static_cast<size_t>(end - begin);
  return value;
}

void JsonReader::skip_number() {
  const auto at = [&](char c) { return position_ < text_.size() && text_[position_] == c; };
  const auto digits = [&] {
    if (position_ >= text_.size() || !is_digit(text_[position_])) fail_here("expected a digit");
    while (position_ < text_.size() && is_digit(text_[position_])) ++position_;
  };
  if (at('-')) ++position_;
  if (at('0')) {
    ++position_;
  } else {
    digits();
  }
  if (at('.')) {
    ++position_;
    digits();
  }
  if (at('e') || at('E')) {
    ++position_;
    if (at('+') || at('-')) ++position_;
    digits();
  }
}

void JsonReader::skip_literal(std::string_view literal) {
  if (!text_.substr(position_).starts_with(literal)) wrong("a JSON value");
  position_ += literal.size();
}

// Recursion is bounded by kMaxDepth, which open() enforces.
void JsonReader::skip_value() {
  std::string text;
  switch (peek()) {
    case '{':
      begin_object();
      while (next_key(&text)) skip_value();
      return;
    case '[':
      begin_array();
      while (next_element()) skip_value();
      return;
    case '"':
      string(&text);
      return;
    case 't':
      skip_literal("true");
      return;
    case 'f':
      skip_literal("false");
      return;
    case 'n':
      skip_literal("null");
      return;
    case '-':
      skip_number();
      return;
    default:
      if (!is_digit(text_.size() > position_ ? text_[position_] : '\0')) wrong("a JSON value");
      skip_number();
  }
}

void JsonReader::end() {
  skip_space();
  if (position_ != text_.size()) wrong("the end of the text");
}

}  // namespace indexcache
