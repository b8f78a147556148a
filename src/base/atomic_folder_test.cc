#include "base/atomic_folder.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include "base/atomic_file.h"
#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

size_t num_entries(const std::string& folder) {
  return static_cast<size_t>(
      std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST(AtomicFolder, AppearsWholeAtCommit) {
  const TempFolder temp;
  {
    AtomicFolder folder(temp / "out/");  // a trailing slash names the same folder
    write_text_file(folder.temporary_path() + "/a.txt", "text");
    EXPECT_FALSE(fs::exists(temp / "out"));
    folder.commit();
  }
  EXPECT_EQ(read_file(temp / "out/a.txt"), "text");
  EXPECT_EQ(num_entries(temp.path()), 1u);
}

TEST(AtomicFolder, LeavesNothingWithoutCommit) {
  const TempFolder temp;
  {
    const AtomicFolder folder(temp / "out");
    fs::create_directories(folder.temporary_path() + "/deep/er");
    write_text_file(folder.temporary_path() + "/deep/er/a.txt", "text");
  }
  EXPECT_EQ(num_entries(temp.path()), 0u);
}

TEST(AtomicFolder, ReplacesNothing) {
  const TempFolder temp;
  temp.write("file", "kept");
  fs::create_directory(temp / "empty");
  fs::create_symlink("nowhere", temp / "link");
  for (const char* name : {"file", "empty", "link"}) {
    expect_contains(error_of([&] { AtomicFolder folder(temp / name); }), {name, "already there"});
  }
  AtomicFolder late(temp / "late");
  temp.write("late/theirs.txt", "kept");
  expect_contains(error_of([&] { late.commit(); }), {"late", "already there"});
  EXPECT_EQ(read_file(temp / "late/theirs.txt"), "kept");
  EXPECT_EQ(read_file(temp / "file"), "kept");
}

TEST(AtomicFolder, SaysWhyItCannotWrite) {
  const TempFolder temp;
  expect_contains(error_of([&] { AtomicFolder folder(temp / "no/such/parent"); }),
                  {"parent", "No such file"});
  expect_contains(error_of([] { AtomicFolder folder(""); }), {"empty"});
  temp.write("file", "");
  expect_contains(error_of([&] { AtomicFolder folder(temp / "file/out"); }), {"Not a directory"});
}

}  // namespace
}  // namespace indexcache
