#include "cache/kv_cache.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>

#include "base/rng.h"
#include "ops/kit/fp8_rows.h"
#include "ops/kit/store_row.h"

namespace indexcache {
namespace {

KvCacheShape shape_of(int64_t num_pages) {
  return {.layer_is_full = {true, false, true},
          .latent_elements = 12,
          .indexer_elements = 8,
          .dtype = DType::kBF16,
          .indexer_dtype = DType::kBF16,
          .num_pages = num_pages};
}

TEST(KvCache, SharedLayersCostNoIndexerKeys) {
  EXPECT_EQ(cache_bytes_per_token(shape_of(1)), 2 * (3 * 12 + 2 * 8));
  KvCache cache(shape_of(4), Device::kCpu);
  EXPECT_NE(cache.indexer_keys(0).base, nullptr);
  EXPECT_DEATH(cache.indexer_keys(1), "layer_is_full");
}

TEST(KvCache, Int8IndexerKeysHaveAScaleEach) {
  KvCacheShape shape = shape_of(2);
  shape.indexer_dtype = DType::kI8;
  EXPECT_EQ(cache_bytes_per_token(shape), 2 * 3 * 12 + 2 * (8 + 4));
  KvCache cache(shape, Device::kCpu);
  EXPECT_EQ(cache.latent(0).dtype, DType::kBF16);
  const PagedRows keys = cache.indexer_keys(2);
  EXPECT_EQ(keys.dtype, DType::kI8);
  EXPECT_EQ(keys.page_bytes, kPageTokens * (8 + 4));
  const int32_t pages[] = {1, 0};
  EXPECT_EQ(keys.row(pages, 1) - keys.row(pages, 0), 8);
  for (const int64_t page : {0, 1}) {
    const uint8_t* begin = keys.base + pages[page] * keys.page_bytes;
    EXPECT_EQ(keys.row(pages, page * kPageTokens), begin);
    const auto scale = [&](int64_t i) {
      return reinterpret_cast<const uint8_t*>(keys.scale(pages, page * kPageTokens + i));
    };
    EXPECT_EQ(scale(0), begin + kPageTokens * 8) << "scales follow the rows of the page";
    EXPECT_EQ(scale(kPageTokens - 1) + 4, begin + keys.page_bytes);
  }
}

// The layout that other engines call fp8_ds_mla.
TEST(KvCache, Fp8LatentRowsHoldTheirScales) {
  KvCacheShape shape = shape_of(2);
  shape.latent_elements = 512 + 64;
  shape.dtype = DType::kF8E4M3;
  shape.latent_fp8_elements = 512;
  EXPECT_EQ(cache_bytes_per_token(shape), 3 * 656 + 2 * 2 * 8);
  KvCache cache(shape, Device::kCpu);
  const PagedRows rows = cache.latent(1);
  EXPECT_EQ(rows.dtype, DType::kF8E4M3);
  EXPECT_EQ(rows.fp8_elements, 512);
  EXPECT_EQ(rows.page_bytes, 64 * 656);
  const int32_t pages[] = {1, 0};
  EXPECT_EQ(rows.row(pages, 1) - rows.row(pages, 0), 656);
  EXPECT_EQ(rows.row(pages, 64), rows.base);

  std::vector<float> x(576);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 128) - 60;
  for (size_t i = 128; i < 256; ++i) x[i] *= 7;
  x[512] = 0.7001f;
  store_row(rows, pages, 65, x.data());
  const uint8_t* row = rows.base + 656;
  const float* scales = reinterpret_cast<const float*>(row + 512);
  EXPECT_EQ(scales[0], 67.0f / 448);
  EXPECT_EQ(scales[1], 469.0f / 448);
  EXPECT_EQ(row[127], 0x7E) << "the largest of its block is 448";
  EXPECT_EQ(row[60], 0);
  EXPECT_EQ(*reinterpret_cast<const uint16_t*>(row + 528), f32_to_bf16(0.7001f));
  for (int64_t i = 0; i < 576; ++i) {
    const float size = std::abs(x[static_cast<size_t>(i)]);
    EXPECT_NEAR(fp8_latent_element(rows, row, i), x[static_cast<size_t>(i)], size / 16 + 0.01f)
        << i;
  }
  shape.latent_fp8_elements = 500;
  EXPECT_DEATH(KvCache(shape, Device::kCpu), "latent_fp8_elements");
}

TEST(KvCache, CopiesPagesOfEveryPool) {
  for (const DType type : {DType::kBF16, DType::kF8E4M3}) {
    KvCacheShape shape = shape_of(9);
    shape.indexer_dtype = type;
    if (type == DType::kF8E4M3) {
      shape.dtype = type;
      shape.latent_elements = 128 + 6;
      shape.latent_fp8_elements = 128;
    }
    KvCache cache(shape, Device::kCpu);
    Exec exec(1);
    const std::vector<PagedRows> pools = {cache.latent(0), cache.latent(1), cache.latent(2),
                                          cache.indexer_keys(0), cache.indexer_keys(2)};
    const auto page_of = [](const PagedRows& pool, int64_t page) {
      const uint8_t* begin = pool.base + page * pool.page_bytes;
      return std::vector<uint8_t>(begin, begin + pool.page_bytes);
    };
    std::vector<std::vector<uint8_t>> before;
    Rng rng(7);
    for (const PagedRows& pool : pools) {
      EXPECT_EQ(pool.num_pages, 9);
      for (int64_t i = 0; i < 9 * pool.page_bytes; ++i)
        pool.base[i] = static_cast<uint8_t>(rng.next());
      for (int64_t page = 0; page < 9; ++page) before.push_back(page_of(pool, page));
    }
    const std::vector<int32_t> from = {1, 2, 3, 0}, to = {5, 6, 8, 7};
    cache.copy_pages(exec, from, to);
    for (size_t p = 0; p < pools.size(); ++p) {
      for (int64_t page = 0; page < 9; ++page) {
        int64_t source = page;
        for (size_t i = 0; i < to.size(); ++i) {
          if (to[i] == page) source = from[i];
        }
        EXPECT_EQ(page_of(pools[p], page), before[p * 9 + static_cast<size_t>(source)])
            << "pool " << p << " page " << page;
      }
    }
  }
}

TEST(KvCache, RefusesWithoutChangingAnything) {
  KvCache cache(shape_of(3), Device::kCpu);
  SequenceCache a, b;
  ASSERT_TRUE(cache.reserve(a, 65));
  EXPECT_EQ(a.pages.size(), 2u);
  EXPECT_FALSE(cache.reserve(b, 129));
  EXPECT_TRUE(b.pages.empty());
  EXPECT_EQ(cache.num_free_pages(), 1);
  EXPECT_TRUE(cache.reserve(a, 128)) << "the second page has room";
  EXPECT_EQ(a.pages.size(), 2u);
}

TEST(KvCache, PagesAreNeverSharedAndAllComeBack) {
  constexpr uint64_t kSeed = 20261123;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  Rng rng(kSeed);
  KvCache cache(shape_of(50), Device::kCpu);
  std::vector<SequenceCache> sequences(7);
  for (int step = 0; step < 2000; ++step) {
    SequenceCache& sequence = sequences[rng.below(sequences.size())];
    if (rng.below(4) == 0) {
      cache.release(sequence);
    } else {
      const int64_t want = sequence.num_tokens + static_cast<int64_t>(rng.below(300));
      if (cache.reserve(sequence, want)) sequence.num_tokens = want;
    }
    std::set<int32_t> used;
    size_t count = 0;
    for (const SequenceCache& s : sequences) {
      used.insert(s.pages.begin(), s.pages.end());
      count += s.pages.size();
      EXPECT_GE(static_cast<int64_t>(s.pages.size()) * kPageTokens, s.num_tokens);
    }
    ASSERT_EQ(used.size(), count);
    ASSERT_EQ(static_cast<int64_t>(count) + cache.num_free_pages(), 50);
  }
}

TEST(KvCache, AHeldPageIsFreeWhenTheLastHolderLetsGo) {
  KvCache cache(shape_of(2), Device::kCpu);
  SequenceCache sequence;
  ASSERT_TRUE(cache.reserve(sequence, 64));
  const int32_t page = sequence.pages[0];
  EXPECT_EQ(cache.holders(page), 1);
  cache.hold(page);
  cache.release(sequence);
  EXPECT_EQ(cache.num_free_pages(), 1);
  cache.let_go(page);
  EXPECT_EQ(cache.num_free_pages(), 2);
  EXPECT_DEATH(cache.let_go(page), "holders");
  EXPECT_DEATH(cache.hold(page), "holders");
}

TEST(KvCache, RowsOfOnePageDoNotOverlap) {
  KvCache cache(shape_of(2), Device::kCpu);
  const PagedRows rows = cache.latent(1);
  const int32_t pages[] = {1, 0};
  std::set<const uint8_t*> starts;
  for (int64_t p = 0; p < 2 * kPageTokens; ++p) starts.insert(rows.row(pages, p));
  EXPECT_EQ(starts.size(), 128u);
  EXPECT_EQ(rows.row(pages, 64), rows.base);
  EXPECT_EQ(rows.row(pages, 1) - rows.row(pages, 0), 24);
}

}  // namespace
}  // namespace indexcache
