#include "base/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <vector>

#include "base/error.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

class MappedFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "mapped_file_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(folder_ + "/" + name, std::ios::binary) << bytes;
    return folder_ + "/" + name;
  }
  std::string folder_;
};
using MappedFileDeathTest = MappedFileTest;

std::string text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

TEST_F(MappedFileTest, MapsAndMoves) {
  MappedFile a(write("a", "first")), b(write("b", "second"));
  EXPECT_EQ(text_of(a), "first");
  MappedFile c(std::move(a));
  EXPECT_EQ(text_of(c), "first");
  EXPECT_TRUE(a.bytes().empty());
  b = std::move(c);
  EXPECT_EQ(text_of(b), "first");
  EXPECT_EQ(b.path(), folder_ + "/a");
  EXPECT_TRUE(MappedFile(write("empty", "")).bytes().empty());
}

TEST_F(MappedFileTest, RefusesWhatIsNotAFile) {
  ASSERT_EQ(mkfifo((folder_ + "/fifo").c_str(), 0600), 0);
  fs::create_symlink("loop", folder_ + "/loop");
  const std::pair<std::string, const char*> cases[] = {
      {folder_, "directory"},
      {folder_ + "/fifo", "not a regular file"},
      {"/dev/zero", "not a regular file"},
      {folder_ + "/none", "No such file"},
      {folder_ + "/loop", "symbolic links"},
      {"", "No such file"},
  };
  for (const auto& [path, word] : cases) {
    for (const bool map : {true, false}) {
      try {
        if (map) {
          MappedFile file(path);
        } else {
          read_text_file(path);
        }
        ADD_FAILURE() << path << " was accepted";
      } catch (const Error& error) {
        EXPECT_TRUE(std::string(error.what()).starts_with(path + ": ")) << error.what();
        EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
      }
    }
  }
}

TEST_F(MappedFileTest, TextFilesHaveALimit) {
  const std::string path = write("text", "12345");
  EXPECT_EQ(read_text_file(path, 5), "12345");
  EXPECT_THROW(read_text_file(path, 4), Error);
  // Sparse: refused by its size, not read.
  fs::resize_file(path, uint64_t{1} << 40);
  EXPECT_THROW(read_text_file(path), Error);
}

TEST_F(MappedFileDeathTest, ATruncatedFileEndsTheProgramWithItsName) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const std::string path = write("cut", std::string(1 << 20, 'x'));
  const auto read_after_cut = [&](int num_before) {
    const std::string other = write("other", "x");
    std::vector<MappedFile> before;
    for (int i = 0; i < num_before; ++i) before.emplace_back(other);
    MappedFile file(path);
    fs::resize_file(path, 0);
    volatile uint8_t sum = 0;
    for (const uint8_t byte : file.bytes()) sum = sum + byte;
  };
  EXPECT_EXIT(read_after_cut(0), testing::ExitedWithCode(1), "cut: the file was truncated");
  // As many shards as a checkpoint may have.
  EXPECT_EXIT(read_after_cut(4096), testing::ExitedWithCode(1), "cut: the file was truncated");
}

TEST_F(MappedFileDeathTest, OtherBusErrorsAreNotHidden) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        MappedFile file(write("a", "x"));
        raise(SIGBUS);
      },
      testing::KilledBySignal(SIGBUS), "");
}

}  // namespace
}  // namespace indexcache
