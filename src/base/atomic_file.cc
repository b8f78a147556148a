#include "base/atomic_file.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "base/error.h"

namespace indexcache {

namespace {
constexpr size_t kBufferBytes = 1 << 20;
}

AtomicFile::AtomicFile(const std::string& path)
    : path_(path), temporary_path_(fmt::format("{}.{}.tmp", path, getpid())) {
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    fail("{}: cannot write: found something that is not a regular file", printable(path));
  }
  buffer_.reserve(kBufferBytes);  // before there is a file to leave behind
  fd_ = open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) fail("{}: cannot create: {}", printable(temporary_path_), strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_path_.c_str());
}

void AtomicFile::fail_errno(const char* what) {
  fail("{}: cannot {}: {}; the file was left as it was before", printable(path_), what,
       strerror(errno));
}

void AtomicFile::write(const void* data, size_t num_bytes) {
  CHECK(fd_ >= 0);
  const char* bytes = static_cast<const char*>(data);
  while (num_bytes > 0) {
    const size_t n = std::min(num_bytes, kBufferBytes - buffer_.size());
    buffer_.append(bytes, n);
    bytes += n;
    num_bytes -= n;
    if (buffer_.size() == kBufferBytes) flush_buffer();
  }
}

void AtomicFile::flush_buffer() {
  size_t done = 0;
  while (done < buffer_.size()) {
    const ssize_t n = ::write(fd_, buffer_.data() + done, buffer_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno("write");
    done += static_cast<size_t>(n);
  }
  buffer_.clear();
}

void AtomicFile::commit() {
  CHECK(fd_ >= 0);
  flush_buffer();
  if (fsync(fd_) != 0) fail_errno("flush to disk");
  const int fd = fd_;
  fd_ = -1;
  if (close(fd) != 0 || rename(temporary_path_.c_str(), path_.c_str()) != 0) {
    const int saved_errno = errno;
    unlink(temporary_path_.c_str());
    errno = saved_errno;
    fail_errno("rename into place");
  }
  // The rename itself must reach the disk too; a folder that cannot be opened or synced is no
  // reason to fail.
  const std::string folder = std::filesystem::path(path_).parent_path().string();
  const int folder_fd =
      open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_fd >= 0) {
    fsync(folder_fd);
    close(folder_fd);
  }
}

void write_text_file(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void check_can_write(std::initializer_list<std::string> paths,
                     const std::vector<std::string>& inputs) {
  for (const std::string& path : paths) {
    if (path.empty()) continue;
    const AtomicFile probe(path);
    for (const std::string& input : inputs) {
      std::error_code not_there;
      if (std::filesystem::equivalent(path, input, not_there))
        fail("{}: is a file to read, expected another file to write", printable(path));
    }
  }
}

}  // namespace indexcache
