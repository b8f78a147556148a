#include "device/memory.h"

#include <gtest/gtest.h>

#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace indexcache {
namespace {

TEST(HostMemory, IsZeroAlignedAndWritable) {
  for (const size_t size : {size_t{1}, size_t{63}, size_t{4096}, size_t{5} << 20}) {
    HostMemory memory(size);
    ASSERT_EQ(memory.num_bytes(), size);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory.data()) % 64, 0u);
    for (size_t i = 0; i < size; ++i) ASSERT_EQ(memory.data()[i], 0);
    memory.data()[0] = 1;
    memory.data()[size - 1] = 2;
  }
  EXPECT_EQ(HostMemory().data(), nullptr);
  EXPECT_EQ(HostMemory(0).data(), nullptr);
}

TEST(HostMemory, Moves) {
  HostMemory a(100);
  a.data()[7] = 42;
  const uint8_t* data = a.data();
  HostMemory b(std::move(a));
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(a.num_bytes(), 0u);
  HostMemory c(5);
  c = std::move(b);
  EXPECT_EQ(c.data()[7], 42);
  EXPECT_EQ(c.num_bytes(), 100u);
}

// Reserving costs nothing until the first touch.
TEST(HostMemory, TakesPagesAsTheyAreTouched) {
  const uint64_t before = peak_rss_bytes();
  HostMemory memory(size_t{4} << 30);
  memory.data()[size_t{3} << 30] = 1;
  EXPECT_LT(peak_rss_bytes(), before + (64u << 20));
}

TEST(HostMemory, TooMuchIsAnErrorWithTheSize) {
  try {
    HostMemory memory(size_t{1} << 60);
    FAIL() << "reserved 2^60 bytes";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("1048576.00 TiB"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace indexcache
