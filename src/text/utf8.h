// UTF-8, strictly as Unicode defines it: no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace indexcache {

// One step through text. A valid character has `valid` set. Otherwise `length` covers the bytes
// that one U+FFFD stands for: the longest prefix of a character that is there, at least one byte
// (the rule of Unicode 16, chapter 3.9, table 3-11, which Rust's from_utf8_lossy also follows).
struct Utf8Step {
  uint32_t code_point;
  uint32_t length;
  bool valid;
  bool cut_short;  // invalid only because the text ends: more bytes could complete the character
};

Utf8Step utf8_step(std::string_view text, size_t at);

// The offset of the first byte that is not part of a valid character.
std::optional<size_t> find_invalid_utf8(std::string_view text);

// The same text with U+FFFD in place of what is not UTF-8.
std::string replace_invalid_utf8(std::string_view text);

void append_utf8(uint32_t code_point, std::string& out);

// Bytes in, whole characters out. What push() returns, concatenated and followed by finish(),
// equals replace_invalid_utf8() of all the bytes.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  std::string finish();

 private:
  std::string pending_;  // the beginning of a character, at most 3 bytes
};

}  // namespace indexcache
