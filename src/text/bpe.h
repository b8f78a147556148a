// Byte-pair encoding of one piece of text: begin with one token a byte, then apply the merge of
// lowest rank, the leftmost first, until none applies.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace indexcache {

// Tokens `left` and `right`, adjacent, become `result`. The place in the list is the merge's rank.
struct Merge {
  int32_t left;
  int32_t right;
  int32_t result;
};

class Bpe {
 public:
  // Memory that calls reuse; one for each thread.
  struct Scratch {
    std::vector<int32_t> ids;
    std::vector<uint32_t> ranks;
    std::vector<uint32_t> next;
    std::vector<uint32_t> previous;
    std::vector<uint64_t> heap;
  };

  // Token ids are not negative. Of two merges of the same pair the later one counts.
  Bpe(const std::array<int32_t, 256>& byte_ids, const std::vector<Merge>& merges);

  // Appends the piece's tokens to `out`. Pieces of up to kMaxScanBytes bytes take quadratic steps
  // on few bytes, longer ones a heap; both give the same tokens.
  void encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const;
  void encode_by_scan(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const;
  void encode_by_heap(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const;

  static constexpr size_t kMaxScanBytes = 48;

 private:
  struct Slot {
    uint64_t pair;
    uint32_t rank;
    int32_t result;
  };

  // nullptr: these two do not merge.
  const Slot* find(int32_t left, int32_t right) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<Slot> slots_;  // open addressing, a power of two, at most half full
  uint32_t shift_ = 0;
};

}  // namespace indexcache
