// Which pages of a KvCache hold the beginnings that sequences have in common, so that a beginning
// is computed once.
//
// Full pages are nodes of a tree: a node stands for 64 token ids after the node of the page before
// it, and so for a whole beginning. The roots are salts: only sequences of one salt share, so a
// tenant cannot find out by timing what another one sent. Nodes are found through a hash table with
// a secret seed, but equality is that of the ids themselves, of the parent and, at the root, of the
// salt: no collision can hand a page to the wrong sequence. A parent's number is never used again,
// so a node whose parent is gone is never found.
//
// One page number stands for the latent KV and the indexer keys of all layers, so they are shared
// together. A cache belongs to one KvCache, and this to one model under one plan, which is why
// neither is part of a node's identity.
//
// The cache is one more holder of its pages. A page that nobody else holds is idle: it is given up,
// least recently used first, when a sequence needs the room. Children become idle before their
// parents and are given up before them.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/kv_cache.h"

namespace indexcache {

// Where in the tree a sequence is: behind its first `num_tokens` tokens, a multiple of 64.
struct PrefixPosition {
  uint64_t node = 0;  // 0: at the root
  int64_t num_tokens = 0;
  bool detached = false;  // a page on the way was dropped: nothing is found or added any more
};

class PrefixCache {
 public:
  // With `enabled` false it finds and keeps nothing, but reserve() and release() work.
  // `hash_seed` makes the places in the hash table unpredictable.
  PrefixCache(KvCache& cache, bool enabled, uint64_t hash_seed);
  ~PrefixCache();  // lets go of all pages
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // A page of tokens behind a position.
  struct Key {
    uint64_t parent = 0;
    std::array<int32_t, kPageTokens> tokens = {};
    std::string salt;  // at the root only
    bool operator==(const Key&) const = default;
  };
  static Key key_of(const PrefixPosition& position, std::span<const int32_t> tokens,
                    const std::string& salt);

  // Takes cached pages into `sequence` for as long as `tokens` continue and at most `limit` tokens
  // are there. All that the sequence holds must be behind `position`; pages that it has reserved
  // but not filled are given back for those found. Returns the number of tokens gained.
  int64_t extend(SequenceCache& sequence, PrefixPosition& position, std::span<const int32_t> tokens,
                 const std::string& salt, int64_t limit);

  // Adds the full pages of `sequence` behind `position`. Where the tree has such a page already,
  // the sequence takes that one and gives its own back.
  void insert(SequenceCache& sequence, PrefixPosition& position, std::span<const int32_t> tokens,
              const std::string& salt);

  // KvCache::reserve, giving up idle pages when too few are free.
  bool reserve(SequenceCache& sequence, int64_t num_tokens);

  // KvCache::release; the sequence's cached pages may become idle.
  void release(SequenceCache& sequence);

  // Forgets the pages of `sequence`, which stay with those that hold them.
  void drop(const SequenceCache& sequence);

  bool enabled() const { return enabled_; }
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size()); }
  int64_t num_idle() const { return static_cast<int64_t>(idle_.size()); }
  int64_t num_available() const { return cache_.num_free_pages() + num_idle(); }

 private:
  struct Node {
    uint64_t id = 0;
    int32_t page = -1;
    bool idle = false;
    std::list<int32_t>::iterator place;  // in idle_ or busy_
  };
  struct KeyHash {
    uint64_t seed;
    size_t operator()(const Key& key) const;
  };
  using Nodes = std::unordered_map<Key, Node, KeyHash>;

  Nodes::value_type* node_of_page(int32_t page) const {
    return by_page_[static_cast<size_t>(page)];
  }
  void take(Node& node, SequenceCache& sequence, size_t index);
  void forget(Nodes::value_type& entry);

  KvCache& cache_;
  bool enabled_;
  uint64_t next_id_ = 1;
  Nodes nodes_;
  std::vector<Nodes::value_type*> by_page_;  // null for pages that are not cached
  // Pages, least recently used first, and the cached pages that are in use: a page goes from one to
  // the other without memory being asked for, so that giving back never fails.
  std::list<int32_t> idle_, busy_;
};

}  // namespace indexcache
