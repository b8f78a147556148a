#include "text/bpe.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/rng.h"

namespace indexcache {
namespace {

// Merges over a few letters, each of two tokens that exist, in random order of rank.
std::vector<Merge> random_merges(Rng& rng, int letters, int count) {
  std::vector<std::string> texts;
  for (int i = 0; i < letters; ++i) texts.push_back(std::string(1, static_cast<char>('a' + i)));
  std::vector<int32_t> ids;
  for (int i = 0; i < letters; ++i) ids.push_back('a' + i);
  std::vector<Merge> merges;
  while (static_cast<int>(merges.size()) < count) {
    const size_t left = rng.below(texts.size());
    const size_t right = rng.below(texts.size());
    const std::string text = texts[left] + texts[right];
    const auto found = std::find(texts.begin(), texts.end(), text);
    if (found == texts.end()) {
      const int32_t result = 256 + static_cast<int32_t>(texts.size());
      merges.push_back({ids[left], ids[right], result});
      texts.push_back(text);
      ids.push_back(result);
    } else {
      merges.push_back({ids[left], ids[right], ids[static_cast<size_t>(found - texts.begin())]});
    }
  }
  for (size_t i = merges.size(); i > 1; --i) std::swap(merges[i - 1], merges[rng.below(i)]);
  return merges;
}

TEST(Bpe, ScanAndHeapGiveTheSameTokens) {
  const uint64_t seed = 11;
  SCOPED_TRACE(fmt::format("seed {}", seed));
  Rng rng(seed);
  std::array<int32_t, 256> byte_ids;
  for (int i = 0; i < 256; ++i) byte_ids[static_cast<size_t>(i)] = i;
  Bpe::Scratch scratch;
  for (int round = 0; round < 200; ++round) {
    const int letters = 1 + static_cast<int>(rng.below(4));
    const Bpe bpe(byte_ids, random_merges(rng, letters, 1 + static_cast<int>(rng.below(40))));
    for (int i = 0; i < 20; ++i) {
      std::string text;
      for (uint64_t n = rng.below(200); n > 0; --n)
        text += static_cast<char>('a' + rng.below(static_cast<uint64_t>(letters)));
      std::vector<int32_t> scanned;
      std::vector<int32_t> heaped;
      bpe.encode_by_scan(text, scratch, scanned);
      bpe.encode_by_heap(text, scratch, heaped);
      ASSERT_EQ(scanned, heaped) << text;
    }
  }
}

TEST(Bpe, LeftmostOfEqualRankFirst) {
  std::array<int32_t, 256> byte_ids{};
  for (int i = 0; i < 256; ++i) byte_ids[static_cast<size_t>(i)] = i;
  const Bpe bpe(byte_ids, {{'a', 'a', 300}});
  Bpe::Scratch scratch;
  for (const bool heap : {false, true}) {
    std::vector<int32_t> out = {7};
    heap ? bpe.encode_by_heap("aaa", scratch, out) : bpe.encode_by_scan("aaa", scratch, out);
    EXPECT_EQ(out, (std::vector<int32_t>{7, 300, 'a'}));
  }
}

}  // namespace
}  // namespace indexcache
