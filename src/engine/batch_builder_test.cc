#include "engine/batch_builder.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <numeric>

namespace indexcache {
namespace {

std::vector<int64_t> shares(std::vector<int64_t> pending, int64_t rows) {
  std::vector<RowDemand> demands;
  for (const int64_t p : pending) demands.push_back({p, rows});
  return share_rows(demands, rows);
}

TEST(ShareRows, AloneAPromptHasAllRows) {
  EXPECT_EQ(shares({16384}, 512), (std::vector<int64_t>{512}));
  EXPECT_EQ(shares({100}, 512), (std::vector<int64_t>{100}));
}

TEST(ShareRows, DecodingComesFirst) {
  EXPECT_EQ(shares({16384, 1, 1, 1}, 64), (std::vector<int64_t>{61, 1, 1, 1}));
  EXPECT_EQ(shares({500, 1, 1, 1}, 3), (std::vector<int64_t>{0, 1, 1, 1}));
}

TEST(ShareRows, AShortPromptDoesNotWaitForALongOne) {
  EXPECT_EQ(shares({16384, 8000, 30}, 512), (std::vector<int64_t>{256, 226, 30}));
  EXPECT_EQ(shares({16384, 200, 100, 30}, 512), (std::vector<int64_t>{256, 126, 100, 30}));
}

TEST(ShareRows, WhatIsLeftGoesToTheOldest) {
  EXPECT_EQ(shares({16384, 30}, 512), (std::vector<int64_t>{482, 30}));
}

TEST(ShareRows, HoldsForAllDemands) {
  const bool ok = rc::check([] {
    std::vector<RowDemand> demands;
    const int count = *rc::gen::inRange(0, 12);
    for (int i = 0; i < count; ++i)
      demands.push_back({*rc::gen::element<int64_t>(1, 1, 2, 40, 3000), *rc::gen::inRange(0, 600)});
    const int64_t rows = *rc::gen::inRange(1, 600);
    const std::vector<int64_t> result = share_rows(demands, rows);
    RC_ASSERT(result.size() == demands.size());
    int64_t possible = 0;
    for (size_t i = 0; i < demands.size(); ++i) {
      const int64_t most = std::min(demands[i].pending, demands[i].most);
      RC_ASSERT(result[i] >= 0 && result[i] <= most);
      possible += most;
    }
    RC_ASSERT(std::accumulate(result.begin(), result.end(), int64_t{0}) ==
              std::min(rows, possible));
  });
  EXPECT_TRUE(ok);
}

}  // namespace
}  // namespace indexcache
