#include "base/atomic_folder.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "base/error.h"

namespace indexcache {

namespace {

bool exists(const std::string& path) {
  struct stat info;
  return lstat(path.c_str(), &info) == 0;
}

[[noreturn]] void fail_exists(const std::string& path) {
  fail("{}: already there; expected a path at which there is nothing yet", printable(path, 400));
}

}  // namespace

AtomicFolder::AtomicFolder(const std::string& path) : path_(path) {
  while (path_.size() > 1 && path_.ends_with('/')) path_.pop_back();
  if (path_.empty()) fail("the path of a folder to write is empty");
  if (exists(path_)) fail_exists(path_);
  temporary_path_ = fmt::format("{}.{}.tmp", path_, getpid());
  if (mkdir(temporary_path_.c_str(), 0755) != 0) {
    fail("{}: cannot create the folder: {}", printable(temporary_path_, 400), strerror(errno));
  }
}

AtomicFolder::~AtomicFolder() {
  if (committed_) return;
  std::error_code ignored;
  std::filesystem::remove_all(temporary_path_, ignored);
}

void AtomicFolder::commit() {
  CHECK(!committed_);
  int failed =
      renameat2(AT_FDCWD, temporary_path_.c_str(), AT_FDCWD, path_.c_str(), RENAME_NOREPLACE);
  // Some network file systems do not know the flag.
  if (failed != 0 && errno == EINVAL && !exists(path_))
    failed = rename(temporary_path_.c_str(), path_.c_str());
  if (failed != 0) {
    if (errno == EEXIST) fail_exists(path_);
    fail("{}: cannot rename into place: {}", printable(path_, 400), strerror(errno));
  }
  committed_ = true;
  const std::string parent = std::filesystem::path(path_).parent_path().string();
  const int fd = open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0) {
    fsync(fd);
    close(fd);
  }
}

}  // namespace indexcache
