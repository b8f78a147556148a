// A file that appears under its name whole or not at all: written to a temporary name in the same
// folder, flushed to disk, renamed. Destruction without commit() removes the temporary file and
// leaves what was there before.
//
// Errors: every failed write, flush or rename is an Error with the path and the system's reason.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace indexcache {

class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t num_bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void commit();

 private:
  [[noreturn]] void fail_errno(const char* what);
  void flush_buffer();

  std::string path_;
  std::string temporary_path_;
  std::string buffer_;
  int fd_ = -1;
};

void write_text_file(const std::string& path, std::string_view text);

// Error if a file could not be written at one of the paths, or is one of those that are read: said
// before the work whose results are to go there. An empty path stands for an output that was not
// asked for.
void check_can_write(std::initializer_list<std::string> paths,
                     const std::vector<std::string>& inputs = {});

}  // namespace indexcache
