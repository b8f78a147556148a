#include "cache/prefix_cache.h"

#include <algorithm>
#include <utility>

#include "base/checked.h"
#include "base/error.h"
#include "base/rng.h"

namespace indexcache {

PrefixCache::PrefixCache(KvCache& cache, bool enabled, uint64_t hash_seed)
    : cache_(cache),
      enabled_(enabled),
      nodes_(0, KeyHash{hash_seed}),
      by_page_(static_cast<size_t>(cache.shape().num_pages)) {}

PrefixCache::~PrefixCache() {
  while (!nodes_.empty()) forget(*nodes_.begin());
}

size_t PrefixCache::KeyHash::operator()(const Key& key) const {
  uint64_t state = seed ^ key.parent;
  uint64_t hash = splitmix64(state);
  const auto mix = [&](uint64_t word) {
    state ^= word + hash;
    hash = splitmix64(state);
  };
  for (size_t i = 0; i < key.tokens.size(); i += 2) {
    mix(static_cast<uint64_t>(static_cast<uint32_t>(key.tokens[i])) << 32 |
        static_cast<uint32_t>(key.tokens[i + 1]));
  }
  for (const char c : key.salt) mix(static_cast<uint8_t>(c));
  return hash;
}

PrefixCache::Key PrefixCache::key_of(const PrefixPosition& position,
                                     std::span<const int32_t> tokens, const std::string& salt) {
  Key key;
  key.parent = position.node;
  const auto first = tokens.begin() + position.num_tokens;
  std::copy(first, first + kPageTokens, key.tokens.begin());
  if (position.num_tokens == 0) key.salt = salt;
  return key;
}

// The node's page becomes page `index` of the sequence.
void PrefixCache::take(Node& node, SequenceCache& sequence, size_t index) {
  const bool is_next = index == sequence.pages.size();
  if (is_next) sequence.pages.push_back(node.page);
  if (node.idle) busy_.splice(busy_.end(), idle_, node.place);
  node.idle = false;
  cache_.hold(node.page);
  if (!is_next) cache_.let_go(std::exchange(sequence.pages[index], node.page));
}

int64_t PrefixCache::extend(SequenceCache& sequence, PrefixPosition& position,
                            std::span<const int32_t> tokens, const std::string& salt,
                            int64_t limit) {
  const int64_t before = sequence.num_tokens;
  limit = std::min(limit, static_cast<int64_t>(tokens.size()));
  while (enabled_ && !position.detached && position.num_tokens == sequence.num_tokens &&
         position.num_tokens + kPageTokens <= limit) {
    const auto found = nodes_.find(key_of(position, tokens, salt));
    if (found == nodes_.end()) break;
    take(found->second, sequence, static_cast<size_t>(position.num_tokens / kPageTokens));
    position.node = found->second.id;
    position.num_tokens += kPageTokens;
    sequence.num_tokens += kPageTokens;
  }
  return sequence.num_tokens - before;
}

void PrefixCache::insert(SequenceCache& sequence, PrefixPosition& position,
                         std::span<const int32_t> tokens, const std::string& salt) {
  CHECK_GE(static_cast<int64_t>(tokens.size()), sequence.num_tokens);
  while (enabled_ && !position.detached &&
         position.num_tokens + kPageTokens <= sequence.num_tokens) {
    const size_t index = static_cast<size_t>(position.num_tokens / kPageTokens);
    // A page that was dropped since then has no children.
    const Nodes::value_type* parent =
        index == 0 ? nullptr : node_of_page(sequence.pages[index - 1]);
    if (index > 0 && (parent == nullptr || parent->second.id != position.node)) {
      position.detached = true;
      return;
    }
    // Made first: where this finds no memory, no node is left without a place.
    std::list<int32_t> new_place = {sequence.pages[index]};
    const auto [entry, is_new] = nodes_.try_emplace(key_of(position, tokens, salt));
    Node& node = entry->second;
    if (is_new) {
      node.id = next_id_++;
      node.page = sequence.pages[index];
      node.place = new_place.begin();
      busy_.splice(busy_.end(), new_place);
      cache_.hold(node.page);
      by_page_[static_cast<size_t>(node.page)] = &*entry;
    } else {
      take(node, sequence, index);
    }
    position.node = node.id;
    position.num_tokens += kPageTokens;
  }
}

bool PrefixCache::reserve(SequenceCache& sequence, int64_t num_tokens) {
  const int64_t missing =
      ceil_div(num_tokens, kPageTokens) - static_cast<int64_t>(sequence.pages.size());
  if (missing > num_available()) return false;
  while (cache_.num_free_pages() < missing) forget(*node_of_page(idle_.front()));
  return cache_.reserve(sequence, num_tokens);
}

void PrefixCache::release(SequenceCache& sequence) {
  // The last page first, so that children are given up before their parents.
  for (auto page = sequence.pages.rbegin(); page != sequence.pages.rend(); ++page) {
    Nodes::value_type* entry = node_of_page(*page);
    cache_.let_go(*page);
    if (entry == nullptr || cache_.holders(*page) > 1) continue;
    idle_.splice(idle_.end(), busy_, entry->second.place);
    entry->second.idle = true;
  }
  sequence = {};
}

void PrefixCache::drop(const SequenceCache& sequence) {
  for (const int32_t page : sequence.pages) {
    if (Nodes::value_type* entry = node_of_page(page)) forget(*entry);
  }
}

void PrefixCache::forget(Nodes::value_type& entry) {
  const int32_t page = entry.second.page;
  (entry.second.idle ? idle_ : busy_).erase(entry.second.place);
  by_page_[static_cast<size_t>(page)] = nullptr;
  nodes_.erase(nodes_.find(entry.first));
  cache_.let_go(page);
}

}  // namespace indexcache
