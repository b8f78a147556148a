#include "base/error.h"

#include <cstdio>
#include <cstdlib>

namespace indexcache {

void check_failed(const char* file, int line, const char* expression, const std::string& values) {
  std::fprintf(stderr, "%s:%d: CHECK failed: %s%s%s%s\nThis is a bug in indexcache.\n", file, line,
               expression, values.empty() ? "" : " (", values.c_str(), values.empty() ? "" : ")");
  std::abort();
}

namespace {

// Length of the valid UTF-8 sequence at the front of `s`, or 0.
size_t utf8_length(std::string_view s) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(s[i]); };
  auto continues = [&](size_t i) { return i < s.size() && (byte(i) & 0xC0) == 0x80; };
  const unsigned char c = byte(0);
  if (c < 0x80) return 1;
  if (c >= 0xC2 && c <= 0xDF) return continues(1) ? 2 : 0;
  if (c >= 0xE0 && c <= 0xEF) {
    if (!continues(1) || !continues(2)) return 0;
    if (c == 0xE0 && byte(1) < 0xA0) return 0;
    if (c == 0xED && byte(1) > 0x9F) return 0;
    return 3;
  }
  if (c >= 0xF0 && c <= 0xF4) {
    if (!continues(1) || !continues(2) || !continues(3)) return 0;
    if (c == 0xF0 && byte(1) < 0x90) return 0;
    if (c == 0xF4 && byte(1) > 0x8F) return 0;
    return 4;
  }
  return 0;
}

// Marks without a shape: a byte order mark, characters without width, changes of direction. A
// message that shows them shows something else than what was found.
bool is_invisible(std::string_view character) {
  if (character.size() != 3) return false;
  const std::string_view lead = character.substr(0, 2);
  const auto last = static_cast<unsigned char>(character[2]);
  return character == "\xEF\xBB\xBF" ||
         (lead == "\xE2\x80" &&
          ((last >= 0x8B && last <= 0x8F) || (last >= 0xA8 && last <= 0xAE))) ||
         (lead == "\xE2\x81" && last >= 0xA0 && last <= 0xAF);
}

}  // namespace

std::string printable(std::string_view untrusted, size_t max_bytes) {
  std::string out;
  while (!untrusted.empty()) {
    if (out.size() >= max_bytes) return out + "...";
    const size_t n = utf8_length(untrusted);
    const unsigned char c = static_cast<unsigned char>(untrusted[0]);
    // C1 controls (U+0080..U+009F, lead byte C2) can drive a terminal as well as C0 can.
    const bool control = c < 0x20 || c == 0x7F ||
                         (n == 2 && c == 0xC2 && static_cast<unsigned char>(untrusted[1]) < 0xA0);
    if (n == 0 || control || is_invisible(untrusted.substr(0, n))) {
      out += fmt::format("\\x{:02x}", c);
      untrusted.remove_prefix(1);
    } else {
      out += untrusted.substr(0, n);
      untrusted.remove_prefix(n);
    }
  }
  return out;
}

}  // namespace indexcache
