#include "base/mapped_file.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <utility>

#include "base/error.h"

namespace indexcache {

namespace {

// What the SIGBUS handler may read: a fixed table, because the handler can neither lock nor
// allocate.
struct MappedRange {
  std::atomic<const uint8_t*> begin{nullptr};
  std::atomic<size_t> size{0};
  char path[512];
};
constexpr int kMaxRanges = 8192;  // twice what a checkpoint may have of shards
MappedRange mapped_ranges[kMaxRanges];

void on_sigbus(int signal_number, siginfo_t* info, void*) {
  const auto* address = static_cast<const uint8_t*>(info->si_addr);
  for (const MappedRange& range : mapped_ranges) {
    const uint8_t* begin = range.begin.load();
    if (begin == nullptr || address < begin || address >= begin + range.size.load()) continue;
    const char* parts[] = {"error: ", range.path,
                           ": the file was truncated or could not be read while it was in use\n"};
    for (const char* part : parts) {
      if (write(STDERR_FILENO, part, strlen(part)) < 0) break;
    }
    _exit(1);
  }
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

void install_sigbus_handler() {
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, nullptr);
    return true;
  }();
  (void)installed;
}

void remember_range(const uint8_t* data, size_t size, const std::string& path) {
  install_sigbus_handler();
  for (MappedRange& range : mapped_ranges) {
    const uint8_t* expected = nullptr;
    if (!range.begin.compare_exchange_strong(expected, data)) continue;
    strncpy(range.path, path.c_str(), sizeof(range.path) - 1);
    range.size = size;
    return;
  }
}

void forget_range(const uint8_t* data) {
  for (MappedRange& range : mapped_ranges) {
    if (range.begin.load() != data) continue;
    range.size = 0;
    range.begin = nullptr;
    return;
  }
}

// Opens a regular file for reading; `size` receives its length.
int open_regular(const std::string& path, size_t* size) {
  // O_NONBLOCK: opening a FIFO without a writer would otherwise wait for ever.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail("{}: cannot open: {}", printable(path), strerror(errno));
  struct stat info;
  const char* kind = nullptr;
  if (fstat(fd, &info) != 0) {
    kind = "something that cannot be examined";
  } else if (S_ISDIR(info.st_mode)) {
    kind = "a directory";
  } else if (!S_ISREG(info.st_mode)) {
    kind = "not a regular file (a device, pipe or socket)";
  }
  if (kind != nullptr) {
    close(fd);
    fail("{}: found {}, expected a file", printable(path), kind);
  }
  *size = static_cast<size_t>(info.st_size);
  return fd;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = open_regular(path, &size_);
  if (size_ > 0) {
    void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    const int mmap_errno = errno;
    close(fd);
    if (data == MAP_FAILED) {
      fail("{}: cannot map {} bytes: {}", printable(path), size_, strerror(mmap_errno));
    }
    data_ = static_cast<const uint8_t*>(data);
    remember_range(data_, size_, path);
  } else {
    close(fd);
  }
}

MappedFile::~MappedFile() {
  if (data_ == nullptr) return;
  forget_range(data_);
  munmap(const_cast<uint8_t*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

std::string read_text_file(const std::string& path, size_t max_bytes) {
  size_t size = 0;
  const int fd = open_regular(path, &size);
  if (size > max_bytes) {
    close(fd);
    fail("{}: found {} bytes, expected at most {}", printable(path), size, max_bytes);
  }
  std::string text(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t n = read(fd, text.data() + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int read_errno = errno;
      close(fd);
      fail("{}: read stopped after {} of {} bytes: {}", printable(path), done, size,
           n == 0 ? "the file shrank" : strerror(read_errno));
    }
    done += static_cast<size_t>(n);
  }
  close(fd);
  return text;
}

}  // namespace indexcache
