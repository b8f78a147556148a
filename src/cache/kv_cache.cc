#include "cache/kv_cache.h"

#include "base/checked.h"
#include "base/error.h"

namespace indexcache {

namespace {

int64_t latent_row_bytes(const KvCacheShape& shape) {
  if (shape.dtype == DType::kF8E4M3)
    return fp8_latent_bytes(shape.latent_fp8_elements, shape.latent_elements);
  return paged_row_bytes(shape.dtype, shape.latent_elements);
}

int64_t indexer_row_bytes(const KvCacheShape& shape) {
  return paged_row_bytes(shape.indexer_dtype, shape.indexer_elements);
}

}  // namespace

int64_t cache_bytes_per_token(const KvCacheShape& shape) {
  int64_t bytes = 0;
  for (const bool full : shape.layer_is_full) {
    bytes += latent_row_bytes(shape) + (full ? indexer_row_bytes(shape) : 0);
  }
  return bytes;
}

KvCache::KvCache(const KvCacheShape& shape, Device device) : shape_(shape) {
  CHECK(shape.dtype == DType::kF32 || shape.dtype == DType::kBF16 || shape.dtype == DType::kF8E4M3);
  CHECK_EQ(shape.latent_fp8_elements > 0, shape.dtype == DType::kF8E4M3);
  CHECK_EQ(shape.latent_fp8_elements % kFp8Block, 0);
  CHECK(shape.indexer_dtype == DType::kF32 || shape.indexer_dtype == DType::kBF16 ||
        rows_have_scales(shape.indexer_dtype));
  CHECK_GE(shape.num_pages, 0);
  CHECK_LE(shape.num_pages, INT32_MAX);
  for (const bool full : shape.layer_is_full) {
    const int64_t tokens = shape.num_pages * kPageTokens;
    latent_.emplace_back(device, static_cast<size_t>(tokens * latent_row_bytes(shape)));
    indexer_keys_.emplace_back(device,
                               static_cast<size_t>(full ? tokens * indexer_row_bytes(shape) : 0));
  }
  // Low pages are given first, so that a fresh cache fills from the front.
  for (int64_t page = shape.num_pages - 1; page >= 0; --page)
    free_pages_.push_back(static_cast<int32_t>(page));
  holders_.resize(static_cast<size_t>(shape.num_pages));
}

PagedRows KvCache::latent(int layer) {
  return {shape_.dtype,
          shape_.latent_elements,
          kPageTokens * latent_row_bytes(shape_),
          latent_[static_cast<size_t>(layer)].data(),
          shape_.num_pages,
          shape_.latent_fp8_elements};
}

PagedRows KvCache::indexer_keys(int layer) {
  CHECK(shape_.layer_is_full[static_cast<size_t>(layer)]);
  return {shape_.indexer_dtype, shape_.indexer_elements, kPageTokens * indexer_row_bytes(shape_),
          indexer_keys_[static_cast<size_t>(layer)].data(), shape_.num_pages};
}

bool KvCache::reserve(SequenceCache& sequence, int64_t num_tokens) {
  const int64_t missing =
      ceil_div(num_tokens, kPageTokens) - static_cast<int64_t>(sequence.pages.size());
  if (missing > num_free_pages()) return false;
  for (int64_t i = 0; i < missing; ++i) {
    sequence.pages.push_back(free_pages_.back());
    holders_[static_cast<size_t>(free_pages_.back())] = 1;
    free_pages_.pop_back();
  }
  return true;
}

void KvCache::release(SequenceCache& sequence) {
  for (auto page = sequence.pages.rbegin(); page != sequence.pages.rend(); ++page) let_go(*page);
  sequence = {};
}

void KvCache::copy_pages(Exec& exec, std::span<const int32_t> from, std::span<const int32_t> to) {
  CHECK_EQ(from.size(), to.size());
  for (size_t begin = 0, end; begin < from.size(); begin = end) {
    // Pages that lie side by side in both go at once.
    for (end = begin + 1; end < from.size(); ++end) {
      if (from[end] != from[end - 1] + 1 || to[end] != to[end - 1] + 1) break;
    }
    const auto copy = [&](const Memory& pool, int64_t row_bytes) {
      if (pool.data() == nullptr) return;
      const int64_t page_bytes = kPageTokens * row_bytes;
      exec.copy(pool.data() + to[begin] * page_bytes, pool.data() + from[begin] * page_bytes,
                (end - begin) * static_cast<size_t>(page_bytes));
    };
    for (const Memory& pool : latent_) copy(pool, latent_row_bytes(shape_));
    for (const Memory& pool : indexer_keys_) copy(pool, indexer_row_bytes(shape_));
  }
}

void KvCache::hold(int32_t page) {
  CHECK_GE(holders(page), 1);
  ++holders_[static_cast<size_t>(page)];
}

void KvCache::let_go(int32_t page) {
  CHECK_GE(holders(page), 1);
  if (--holders_[static_cast<size_t>(page)] == 0) free_pages_.push_back(page);
}

}  // namespace indexcache
