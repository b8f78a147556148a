#include "base/atomic_file.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/mapped_file.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

class AtomicFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "atomic_file_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    path_ = folder_ + "/file";
  }
  void TearDown() override { fs::remove_all(folder_); }
  size_t num_files() const {
    return static_cast<size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  static std::string error_of(const std::string& path, const std::string& text) {
    try {
      write_text_file(path, text);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  std::string folder_, path_;
};

TEST_F(AtomicFileTest, WritesAllOfIt) {
  for (const size_t size :
       {size_t{0}, size_t{1}, (size_t{1} << 20) - 1, size_t{1} << 20, (size_t{5} << 20) + 3}) {
    std::string text(size, '\0');
    for (size_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 31 >> 3);
    write_text_file(path_, text);
    EXPECT_TRUE(read_text_file(path_) == text) << size;
    EXPECT_EQ(num_files(), 1u);
  }
}

TEST_F(AtomicFileTest, ManySmallWritesStayInOrder) {
  AtomicFile file(path_);
  std::string text;
  for (int i = 0; i < 300000; ++i) {
    const std::string part = std::to_string(i) + "\n";
    file.write(part);
    text += part;
  }
  EXPECT_FALSE(fs::exists(path_));
  file.commit();
  EXPECT_TRUE(read_text_file(path_) == text);
}

TEST_F(AtomicFileTest, WithoutCommitTheOldFileStays) {
  write_text_file(path_, "old");
  {
    AtomicFile file(path_);
    file.write(std::string(3 << 20, 'x'));
    EXPECT_EQ(num_files(), 2u);
  }
  EXPECT_EQ(read_text_file(path_), "old");
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(AtomicFileTest, RefusesWhatCannotBeWritten) {
  EXPECT_NE(error_of(folder_ + "/none/file", "x").find("/none/file"), std::string::npos);
  EXPECT_NE(error_of(folder_, "x").find("not a regular file"), std::string::npos);
  EXPECT_NE(error_of("/dev/null", "x").find("not a regular file"), std::string::npos);
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_NE(error_of(path_, "x").find("not a regular file"), std::string::npos);
  EXPECT_EQ(num_files(), 1u);
}

TEST_F(AtomicFileTest, SaysBeforehandWhatCannotBeWritten) {
  EXPECT_THROW(check_can_write({folder_ + "/none/file"}), Error);
  EXPECT_THROW(check_can_write({"", path_, folder_}), Error);
  check_can_write({path_, ""});
  EXPECT_EQ(num_files(), 0u);
  write_text_file(path_, "old");
  check_can_write({path_}, {folder_ + "/none"});
  EXPECT_THROW(check_can_write({path_}, {folder_ + "/none", folder_ + "/./file"}), Error);
  EXPECT_EQ(read_text_file(path_), "old");
  EXPECT_EQ(num_files(), 1u);
}

// A full disk, played by the limit on a file's size.
TEST_F(AtomicFileTest, AFullDiskLeavesTheOldFile) {
  write_text_file(path_, "old");
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  rlimit saved;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &saved), 0);
  for (const rlim_t bytes : {rlim_t{0}, rlim_t{100000}, rlim_t{1} << 20}) {
    const rlimit limit = {bytes, saved.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
    const std::string message = error_of(path_, std::string(2 << 20, 'x'));
    setrlimit(RLIMIT_FSIZE, &saved);
    EXPECT_NE(message.find(path_ + ": cannot write: File too large; the file was left as it was"),
              std::string::npos)
        << message;
    EXPECT_EQ(read_text_file(path_), "old");
    EXPECT_EQ(num_files(), 1u);
  }
  signal(SIGXFSZ, old_handler);
}

TEST_F(AtomicFileTest, AFailedRenameRemovesTheTemporaryFile) {
  AtomicFile file(path_);
  file.write("x");
  fs::create_directories(path_ + "/occupied");
  EXPECT_THROW(file.commit(), Error);
  EXPECT_EQ(num_files(), 1u);
}

}  // namespace
}  // namespace indexcache
