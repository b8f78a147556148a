// What is remembered between steps: the latent KV of every layer and the indexer keys of full
// layers, in pages of 64 tokens (kPageTokens). One page number stands for the same 64 tokens in
// every layer, so a sequence needs one page table. Rows lie in the memory of the device that the
// ops run on; page tables are the host's.
//
// Shared layers keep no indexer keys: their pool does not exist. Memory is reserved at construction
// and taken from the system only as pages are first written.
//
// A page may be in several sequences at once, which then only read it: it counts its holders and is
// free when the last one lets go. Only full pages are ever shared, and a full page is never written
// again, so nothing is copied on write.
//
// Bytes a token: num_layers * latent_elements * its element size (in fp8: fp8_latent_bytes()) +
// num_full * (indexer_elements * theirs, and 4 for the scale of an int8 or e4m3 row).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "device/memory.h"
#include "ops/kit/exec.h"
#include "ops/kit/paged.h"

namespace indexcache {

struct KvCacheShape {
  std::vector<bool> layer_is_full;    // one a layer
  int64_t latent_elements = 0;        // kv_lora_rank + qk_rope_head_dim
  int64_t indexer_elements = 0;       // index_head_dim
  DType dtype = DType::kF32;          // of the latent: kF32, kBF16 or kF8E4M3
  int64_t latent_fp8_elements = 0;    // with kF8E4M3: kv_lora_rank, a multiple of kFp8Block
  DType indexer_dtype = DType::kF32;  // of the indexer keys: kF32, kBF16, kI8 or kF8E4M3
  int64_t num_pages = 0;
};

int64_t cache_bytes_per_token(const KvCacheShape& shape);

// The tokens of one sequence: which pages hold them, and how many there are.
struct SequenceCache {
  std::vector<int32_t> pages;
  int64_t num_tokens = 0;
};

class KvCache {
 public:
  KvCache(const KvCacheShape& shape, Device device);

  const KvCacheShape& shape() const { return shape_; }
  int64_t num_free_pages() const { return static_cast<int64_t>(free_pages_.size()); }

  PagedRows latent(int layer);
  PagedRows indexer_keys(int layer);  // of a full layer

  // Gives `sequence` pages for `num_tokens` tokens in all. False, with nothing changed, when too
  // few are free.
  bool reserve(SequenceCache& sequence, int64_t num_tokens);

  // Takes all pages back; those that nobody else holds are free.
  void release(SequenceCache& sequence);

  // Copies pages, those of a page table `from` to those of another of the same length. Puts the
  // copies on the stream of a GPU.
  void copy_pages(Exec& exec, std::span<const int32_t> from, std::span<const int32_t> to);

  // How many hold a page that is not free; one more; one less, and the page free at none.
  int32_t holders(int32_t page) const { return holders_[static_cast<size_t>(page)]; }
  void hold(int32_t page);
  void let_go(int32_t page);

 private:
  KvCacheShape shape_;
  std::vector<Memory> latent_;        // one a layer
  std::vector<Memory> indexer_keys_;  // one a layer, empty for shared layers
  std::vector<int32_t> free_pages_;   // the next one to give is at the end
  std::vector<int32_t> holders_;      // of each page, 0 for a free one
};

}  // namespace indexcache
