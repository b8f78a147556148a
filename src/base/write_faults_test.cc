// Storage that fails at each call in turn: the old file stays, nothing else does, and what is said
// names the file. The calls of this program stand in for the system's.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <vector>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mapped_file.h"

namespace {

struct Storage {
  bool played = false;
  int fails_at = -1, with = 0;  // the call, and its errno
  bool dribbles = false;        // writes take 1000 bytes, and every other one is interrupted
  int num_calls = 0;
  std::vector<std::string> calls;

  // Whether this call is the one that fails.
  bool fails(const char* name) {
    calls.emplace_back(name);
    if (num_calls++ != fails_at) return false;
    errno = with;
    return true;
  }
};
Storage storage;

}  // namespace

extern "C" {

ssize_t write(int fd, const void* data, size_t size) {
  if (storage.played) {
    if (storage.fails("write")) return -1;
    if (storage.dribbles && storage.num_calls % 2 == 0) {
      errno = EINTR;
      return -1;
    }
    if (storage.dribbles && size > 1000) size = 1000;
  }
  return syscall(SYS_write, fd, data, size);
}

int fsync(int fd) {
  struct stat info;
  if (storage.played &&
      storage.fails(fstat(fd, &info) == 0 && S_ISDIR(info.st_mode) ? "fsync folder" : "fsync"))
    return -1;
  return static_cast<int>(syscall(SYS_fsync, fd));
}

int rename(const char* from, const char* to) noexcept {
  if (storage.played && storage.fails("rename")) return -1;
  return static_cast<int>(syscall(SYS_rename, from, to));
}
}

namespace indexcache {
namespace {

namespace fs = std::filesystem;

class WriteFaults : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "write_faults_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    path_ = folder_ + "/file";
    write_text_file(path_, "old");
  }
  void TearDown() override { fs::remove_all(folder_); }

  // What went wrong; empty: nothing.
  std::string write_new(Storage how) {
    storage = how;
    storage.played = true;
    std::string message;
    try {
      write_text_file(path_, new_);
    } catch (const Error& error) {
      message = error.what();
    }
    storage.played = false;
    EXPECT_EQ(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()), 1);
    return message;
  }

  const std::string new_ = std::string((5 << 20) + 3, 'x');
  std::string folder_, path_;
};

TEST_F(WriteFaults, EachCallInTurn) {
  for (const int with : {ENOSPC, EDQUOT, EIO}) {
    bool failed = true;
    for (int call = 0; failed; ++call) {
      const std::string message = write_new({.fails_at = call, .with = with});
      failed = !message.empty();
      if (failed) {
        EXPECT_NE(message.find(path_), std::string::npos) << message;
        EXPECT_NE(message.find(std::strerror(with)), std::string::npos) << message;
        EXPECT_EQ(read_text_file(path_), "old") << call;
      } else {  // only the folder's own place on the disk was left
        EXPECT_EQ(storage.calls.at(static_cast<size_t>(call)), "fsync folder");
        EXPECT_TRUE(read_text_file(path_) == new_);
        write_text_file(path_, "old");
      }
    }
  }
}

TEST_F(WriteFaults, ShortAndInterruptedWritesGoOn) {
  EXPECT_EQ(write_new({.dribbles = true}), "");
  EXPECT_TRUE(read_text_file(path_) == new_);
  EXPECT_GT(storage.num_calls, 10000);
}

// Power lost at any moment leaves the old file or the new one, because what the new name stands for
// is on the disk before it has that name.
TEST_F(WriteFaults, TheDiskHasItBeforeTheName) {
  EXPECT_EQ(write_new({}), "");
  const std::vector<std::string> end(storage.calls.end() - 4, storage.calls.end());
  EXPECT_EQ(end, (std::vector<std::string>{"write", "fsync", "rename", "fsync folder"}));
}

}  // namespace
}  // namespace indexcache
