// Python's operations on text, on marked text (text/jinja_value.h). Positions are code points where
// Python's are; `at`, `begin` and `end` here are bytes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "text/jinja_value.h"

namespace indexcache::jinja {

// The bytes of the white space character at `at`; 0 if there is none.
size_t space_length(std::string_view text, size_t at);
// Where the white space at the end begins.
size_t strip_end(std::string_view text);

// Undoes backslashes as Python's "unicode-escape" does. False for \N{...} and for surrogates.
bool unescape(std::string_view literal, std::string& out);

// `chars` null: white space.
Text strip(const Text& text, const Text* chars, bool left, bool right);
// `separator` null: runs of white space. At most `max_splits` (-1: all).
std::vector<Text> split(const Text& text, const Text* separator, int64_t max_splits);
std::vector<Text> rsplit(const Text& text, const Text* separator, int64_t max_splits);
std::vector<Text> split_lines(const Text& text, bool keep_ends);
Text replace(const Text& text, std::string_view from, const Text& to, int64_t max_count);

int64_t code_points(std::string_view text);
// The byte offset of code point `index`, which is at most code_points(text).
size_t byte_offset(std::string_view text, int64_t index);
std::vector<Text> characters(const Text& text);

// Error for text that is not ASCII: letter cases beyond it are not supported.
enum class LetterCase { kUpper, kLower, kTitle, kCapitalized };
Text change_case(const Text& text, LetterCase to);

}  // namespace indexcache::jinja
