#include "base/cgroup.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace indexcache {
namespace {

namespace fs = std::filesystem;

class Cgroup : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "/cgroup-XXXXXX";
    root_ = mkdtemp(pattern.data());
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& name, const std::string& text) {
    fs::create_directories(fs::path(root_ + "/" + name).parent_path());
    std::ofstream(root_ + "/" + name) << text << "\n";
  }
  uint64_t room(const std::string& membership) {
    write("membership", membership);
    return cgroup_room_bytes(root_ + "/membership", root_);
  }

  std::string root_;
};

TEST_F(Cgroup, TheLeastOfAllGroupsAbove) {
  write("a/memory.max", "1000");
  write("a/memory.current", "300");
  write("a/b/memory.max", "max");
  write("a/b/memory.current", "200");
  EXPECT_EQ(room("0::/a/b"), 700u);
  write("a/b/memory.max", "500");
  EXPECT_EQ(room("0::/a/b"), 300u);
  EXPECT_EQ(room("0::/a"), 700u);
  EXPECT_EQ(room("0::/"), UINT64_MAX) << "the root of the machine has no limit";
  write("memory.max", "250");  // the root of a container has
  write("memory.current", "200");
  EXPECT_EQ(room("0::/"), 50u);
  EXPECT_EQ(room("0::/a/b"), 50u);
}

TEST_F(Cgroup, PagesOfFilesAreTakenBack) {
  write("a/memory.max", "1000");
  write("a/memory.current", "900");
  write("a/memory.stat", "anon 300\nfile 600\nactive_file 400\ninactive_file 100");
  EXPECT_EQ(room("0::/a"), 600u);
  write("a/memory.current", "2000");  // over the limit for a moment
  EXPECT_EQ(room("0::/a"), 0u);
}

TEST_F(Cgroup, VersionOne) {
  write("memory/docker/x/memory.limit_in_bytes", "5000");
  write("memory/docker/x/memory.usage_in_bytes", "2000");
  write("memory/docker/x/memory.stat", "total_active_file 500\ntotal_inactive_file 0");
  write("memory/memory.limit_in_bytes", "9223372036854771712");
  write("memory/memory.usage_in_bytes", "100000");
  EXPECT_EQ(room("4:cpu,cpuacct:/\n3:hugetlb,memory:/docker/x\n0::/"), 3500u);
}

TEST_F(Cgroup, NothingToRead) {
  EXPECT_EQ(cgroup_room_bytes(root_ + "/nothing", root_), UINT64_MAX);
  EXPECT_EQ(room("no colons\n0:\n"), UINT64_MAX);
  write("a/memory.max", "words");
  write("a/memory.current", "");
  EXPECT_EQ(room("0::/a"), UINT64_MAX);
  EXPECT_GT(cgroup_room_bytes(), 0u);
}

}  // namespace
}  // namespace indexcache
