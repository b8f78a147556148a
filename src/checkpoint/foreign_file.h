// What people hand over in place of a safetensors file, told by its first bytes, so that the error
// can say what it is. Nothing here opens, unpacks or runs such a file.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace indexcache {

// "a Git LFS pointer (...)", with what to do about it where that helps; nullopt if it looks like
// nothing known. A valid safetensors file may begin with any eight bytes, so ask only about a file
// that has already failed.
std::optional<std::string> foreign_file_kind(std::span<const uint8_t> bytes);

}  // namespace indexcache
