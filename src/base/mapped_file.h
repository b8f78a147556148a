// A file mapped read-only. Reading is lazy: the kernel brings in pages as they are touched.
//
// Errors: a path that is not a regular readable file is an Error that names it (directories, FIFOs
// and devices are refused before any read). A file that is truncated by someone else while it is
// mapped would kill the process with SIGBUS; a handler names the file and exits with status 1
// instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace indexcache {

class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::span<const uint8_t> bytes() const { return {data_, size_}; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// The whole of a small text file (config.json, a plan file, token ids). Refuses files over
// `max_bytes`.
std::string read_text_file(const std::string& path, size_t max_bytes = 256u << 20);

}  // namespace indexcache
