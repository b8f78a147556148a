#include "checkpoint/foreign_file.h"

#include <algorithm>
#include <string_view>

#include "base/error.h"

namespace indexcache {

namespace {

struct Magic {
  std::string_view prefix;
  const char* kind;
};

using std::string_view_literals::operator""sv;

constexpr Magic kMagics[] = {
    {"version https://git-lfs.github.com/spec/"sv,
     "a Git LFS pointer: the weights themselves were not downloaded (git lfs pull fetches them)"},
    {"GGUF"sv, "a GGUF file; convert the original safetensors checkpoint or use that instead"},
    {"PK\x03\x04"sv,
     "a zip archive (a PyTorch .bin, .pt or .pth file); pickled files can run code and are never "
     "opened"},
    {"PK\x05\x06"sv, "an empty zip archive"},
    {"\x80\x02"sv,
     "a Python pickle (a PyTorch file); pickled files can run code and are never opened"},
    {"\x80\x03"sv, "a Python pickle; pickled files can run code and are never opened"},
    {"\x80\x04"sv, "a Python pickle; pickled files can run code and are never opened"},
    {"\x80\x05"sv, "a Python pickle; pickled files can run code and are never opened"},
    {"\x1f\x8b"sv, "a gzip archive; unpack it first"},
    {"\x28\xb5\x2f\xfd"sv, "a Zstandard archive; unpack it first"},
    {"\xfd"
     "7zXZ\0"sv,
     "an xz archive; unpack it first"},
    {"\x89HDF\r\n\x1a\n"sv, "an HDF5 file (Keras or TensorFlow weights)"},
    {"\x93NUMPY"sv, "a NumPy array file"},
};

bool starts_with_ignoring_case(std::string_view text, std::string_view lower_prefix) {
  return text.size() >= lower_prefix.size() &&
         std::equal(lower_prefix.begin(), lower_prefix.end(), text.begin(), [](char l, char c) {
           return l == (c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c);
         });
}

}  // namespace

std::optional<std::string> foreign_file_kind(std::span<const uint8_t> bytes) {
  std::string_view front(reinterpret_cast<const char*>(bytes.data()),
                         std::min<size_t>(bytes.size(), 512));
  for (const Magic& magic : kMagics) {
    if (front.starts_with(magic.prefix)) return magic.kind;
  }
  std::string_view text = front;
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
  if (starts_with_ignoring_case(text, "<!doctype html") ||
      starts_with_ignoring_case(text, "<html")) {
    return "an HTML page: the download saved a web page in place of the file";
  }
  if (front.size() > 262 && front.substr(257, 5) == "ustar")
    return "a tar archive; unpack it first";
  const bool is_text = !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 0x20 && c < 0x7F) || c == '\t' || c == '\r' || c == '\n';
  });
  if (is_text) return fmt::format("text that begins \"{}\"", printable(text.substr(0, 40)));
  return std::nullopt;
}

}  // namespace indexcache
