#include "cache/prefix_cache.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>
#include <set>

#include "base/rng.h"

namespace indexcache {
namespace {

KvCache small_cache(int64_t num_pages) {
  return KvCache({.layer_is_full = {true, false},
                  .latent_elements = 4,
                  .indexer_elements = 2,
                  .num_pages = num_pages},
                 Device::kCpu);
}

// Tokens that a sequence has, as the engine would hold it.
struct Sequence {
  SequenceCache cache;
  PrefixPosition position;
  std::vector<int32_t> tokens;
  std::string salt;
};

std::vector<int32_t> tokens_of(uint64_t seed, int64_t count) {
  Rng rng(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(rng.below(1000));
  return tokens;
}

// Looks up, computes the rest and adds it.
bool run(PrefixCache& prefix, Sequence& sequence) {
  const int64_t count = static_cast<int64_t>(sequence.tokens.size());
  prefix.extend(sequence.cache, sequence.position, sequence.tokens, sequence.salt, count - 1);
  if (!prefix.reserve(sequence.cache, count)) return false;
  sequence.cache.num_tokens = count;
  prefix.insert(sequence.cache, sequence.position, sequence.tokens, sequence.salt);
  return true;
}

Sequence sequence_of(std::vector<int32_t> tokens, std::string salt = "") {
  return {{}, {}, std::move(tokens), std::move(salt)};
}

TEST(PrefixCache, FullPagesAreFoundAndTheLastTokenIsNot) {
  KvCache cache = small_cache(10);
  PrefixCache prefix(cache, true, 1);
  Sequence first = sequence_of(tokens_of(1, 192));
  ASSERT_TRUE(run(prefix, first));
  EXPECT_EQ(prefix.num_nodes(), 3);
  EXPECT_EQ(prefix.num_idle(), 0);

  Sequence same = sequence_of(first.tokens);
  EXPECT_EQ(prefix.extend(same.cache, same.position, same.tokens, "", 191), 128)
      << "the third page has the last token, whose logits are wanted";
  EXPECT_EQ(same.cache.pages[0], first.cache.pages[0]);
  EXPECT_EQ(cache.holders(same.cache.pages[1]), 3) << "two sequences and the cache";

  ASSERT_TRUE(prefix.reserve(same.cache, 192));
  same.cache.num_tokens = 192;
  prefix.insert(same.cache, same.position, same.tokens, "");
  EXPECT_EQ(same.cache.pages, first.cache.pages) << "the page of its own was given back";
  EXPECT_EQ(cache.num_free_pages(), 7);

  prefix.release(first.cache);
  EXPECT_EQ(prefix.num_idle(), 0);
  prefix.release(same.cache);
  EXPECT_EQ(prefix.num_idle(), 3);
  EXPECT_EQ(prefix.num_available(), 10);
}

TEST(PrefixCache, SaltsAndBeginningsSeparate) {
  KvCache cache = small_cache(20);
  PrefixCache prefix(cache, true, 2);
  Sequence first = sequence_of(tokens_of(2, 150), "tenant a");
  ASSERT_TRUE(run(prefix, first));
  const auto found = [&](const std::vector<int32_t>& tokens, const std::string& salt) {
    Sequence sequence = sequence_of(tokens, salt);
    const int64_t count =
        prefix.extend(sequence.cache, sequence.position, sequence.tokens, salt, 1000);
    prefix.release(sequence.cache);
    return count;
  };
  EXPECT_EQ(found(first.tokens, "tenant a"), 128);
  EXPECT_EQ(found(first.tokens, "tenant b"), 0);
  EXPECT_EQ(found(first.tokens, ""), 0);
  std::vector<int32_t> other = first.tokens;
  other[63] ^= 1;
  EXPECT_EQ(found(other, "tenant a"), 0) << "its second page has another beginning";
  other = first.tokens;
  other[64] ^= 1;
  EXPECT_EQ(found(other, "tenant a"), 64);
  // The second page's tokens alone are no beginning.
  EXPECT_EQ(found({first.tokens.begin() + 64, first.tokens.end()}, "tenant a"), 0);
}

// A hash is only a hint: with all keys in one bucket nothing else is found.
TEST(PrefixCache, EqualityIsThatOfTheTokens) {
  PrefixPosition position;
  const std::vector<int32_t> tokens = tokens_of(3, 128);
  const PrefixCache::Key key = PrefixCache::key_of(position, tokens, "salt");
  for (size_t i = 0; i < 64; ++i) {
    std::vector<int32_t> changed = tokens;
    changed[i] += 1;
    EXPECT_FALSE(PrefixCache::key_of(position, changed, "salt") == key);
  }
  EXPECT_FALSE(PrefixCache::key_of(position, tokens, "") == key);
  const PrefixPosition behind{7, 64, false};
  EXPECT_EQ(PrefixCache::key_of(behind, tokens, "salt").salt, "") << "the parent carries it";
  EXPECT_EQ(PrefixCache::key_of(behind, tokens, "salt").tokens[0], tokens[64]);
}

TEST(PrefixCache, GivesUpTheLeastRecentlyUsedAndTheEndsFirst) {
  KvCache cache = small_cache(6);
  PrefixCache prefix(cache, true, 3);
  Sequence old = sequence_of(tokens_of(4, 129)), young = sequence_of(tokens_of(5, 129));
  ASSERT_TRUE(run(prefix, old));
  ASSERT_TRUE(run(prefix, young));
  const std::vector<int32_t> old_pages = old.cache.pages;
  prefix.release(old.cache);
  prefix.release(young.cache);
  EXPECT_EQ(prefix.num_idle(), 4);

  Sequence next = sequence_of(tokens_of(6, 190));  // three pages, of which two are free
  ASSERT_TRUE(run(prefix, next));
  Sequence again = sequence_of(old.tokens);
  EXPECT_EQ(prefix.extend(again.cache, again.position, again.tokens, "", 128), 64)
      << "the end of the oldest went";
  EXPECT_EQ(again.cache.pages[0], old_pages[0]);
  Sequence too_long = sequence_of(tokens_of(7, 200));
  EXPECT_FALSE(run(prefix, too_long));
  EXPECT_TRUE(too_long.cache.pages.empty());
  EXPECT_EQ(prefix.num_idle(), 2) << "nothing was given up in vain";
}

TEST(PrefixCache, DroppedPagesAreNotFoundAndHaveNoChildren) {
  KvCache cache = small_cache(10);
  PrefixCache prefix(cache, true, 4);
  Sequence poisoned = sequence_of(tokens_of(8, 130)), neighbour = sequence_of(poisoned.tokens);
  ASSERT_TRUE(run(prefix, poisoned));
  ASSERT_TRUE(run(prefix, neighbour));
  prefix.drop(poisoned.cache);
  prefix.release(poisoned.cache);
  EXPECT_EQ(prefix.num_nodes(), 0);
  Sequence later = sequence_of(poisoned.tokens);
  EXPECT_EQ(prefix.extend(later.cache, later.position, later.tokens, "", 129), 0);

  for (int i = 0; i < 100; ++i) neighbour.tokens.push_back(i);
  ASSERT_TRUE(prefix.reserve(neighbour.cache, 230));
  neighbour.cache.num_tokens = 230;
  prefix.insert(neighbour.cache, neighbour.position, neighbour.tokens, "");
  EXPECT_TRUE(neighbour.position.detached);
  EXPECT_EQ(prefix.num_nodes(), 0);
  prefix.release(neighbour.cache);
  EXPECT_EQ(cache.num_free_pages(), 10);
}

TEST(PrefixCache, ReservedPagesAreGivenBackForThoseFound) {
  KvCache cache = small_cache(10);
  PrefixCache prefix(cache, true, 5);
  Sequence slow = sequence_of(tokens_of(9, 200)), fast = sequence_of(slow.tokens);
  ASSERT_TRUE(prefix.reserve(slow.cache, 200));
  ASSERT_TRUE(run(prefix, fast));
  EXPECT_EQ(cache.num_free_pages(), 2);
  EXPECT_EQ(prefix.extend(slow.cache, slow.position, slow.tokens, "", 199), 192);
  EXPECT_EQ(cache.num_free_pages(), 5);
  EXPECT_EQ(slow.cache.pages.size(), 4u);
  EXPECT_EQ(slow.cache.pages[2], fast.cache.pages[2]);
  EXPECT_NE(slow.cache.pages[3], fast.cache.pages[3]) << "not a full page";
}

TEST(PrefixCache, DisabledKeepsNothing) {
  KvCache cache = small_cache(4);
  PrefixCache prefix(cache, false, 6);
  Sequence sequence = sequence_of(tokens_of(10, 130));
  ASSERT_TRUE(run(prefix, sequence));
  EXPECT_EQ(prefix.num_nodes(), 0);
  prefix.release(sequence.cache);
  EXPECT_EQ(cache.num_free_pages(), 4);
}

// Any sequence of operations: pages that a sequence was given by the cache were computed from the
// very same beginning and salt, counts of holders add up, and nothing is lost.
TEST(PrefixCache, HoldsForAnyHistory) {
  const bool ok = rc::check([] {
    constexpr int64_t kPages = 12;
    KvCache cache = small_cache(kPages);
    PrefixCache prefix(cache, true, 7);
    std::vector<Sequence> alive;
    // What each page was filled with: salt and all tokens up to its end.
    std::map<int32_t, std::pair<std::string, std::vector<int32_t>>> content;
    const int steps = *rc::gen::inRange(1, 60);
    for (int step = 0; step < steps; ++step) {
      const int action = *rc::gen::inRange(0, 10);
      if (action < 6) {
        // Few different tokens, page by page, so that beginnings are often shared.
        Sequence sequence;
        sequence.salt = *rc::gen::element<std::string>("", "a");
        const int num_blocks = *rc::gen::inRange(1, 5);
        for (int block = 0; block < num_blocks; ++block) {
          const int32_t token = *rc::gen::inRange(0, 3);
          sequence.tokens.insert(sequence.tokens.end(), 64, token);
        }
        sequence.tokens.resize(sequence.tokens.size() - *rc::gen::element<size_t>(0, 1, 63));
        const int64_t count = static_cast<int64_t>(sequence.tokens.size());
        const int64_t found = prefix.extend(sequence.cache, sequence.position, sequence.tokens,
                                            sequence.salt, count - 1);
        for (int64_t i = 0; i < found / 64; ++i) {
          const std::vector<int32_t> beginning(sequence.tokens.begin(),
                                               sequence.tokens.begin() + 64 * (i + 1));
          RC_ASSERT(content[sequence.cache.pages[static_cast<size_t>(i)]] ==
                    std::make_pair(sequence.salt, beginning));
        }
        if (!prefix.reserve(sequence.cache, count)) {
          prefix.release(sequence.cache);
          continue;
        }
        for (int64_t i = found / 64; i < count / 64; ++i) {
          content[sequence.cache.pages[static_cast<size_t>(i)]] = {
              sequence.salt, {sequence.tokens.begin(), sequence.tokens.begin() + 64 * (i + 1)}};
        }
        sequence.cache.num_tokens = count;
        prefix.insert(sequence.cache, sequence.position, sequence.tokens, sequence.salt);
        alive.push_back(std::move(sequence));
      } else if (!alive.empty()) {
        const size_t i = *rc::gen::inRange<size_t>(0, alive.size());
        if (action == 9) prefix.drop(alive[i].cache);
        prefix.release(alive[i].cache);
        alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(i));
      }
      std::set<int32_t> held;
      for (const Sequence& sequence : alive)
        held.insert(sequence.cache.pages.begin(), sequence.cache.pages.end());
      RC_ASSERT(static_cast<int64_t>(held.size()) + prefix.num_available() == kPages);
    }
    for (Sequence& sequence : alive) prefix.release(sequence.cache);
    RC_ASSERT(prefix.num_available() == kPages);
    RC_ASSERT(prefix.num_idle() == prefix.num_nodes());
    Sequence everything;
    RC_ASSERT(prefix.reserve(everything.cache, kPages * 64));
    RC_ASSERT(prefix.num_nodes() == 0);
  });
  EXPECT_TRUE(ok);
}

}  // namespace
}  // namespace indexcache
