#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>

#include "base/error.h"

namespace indexcache {

namespace {

constexpr uint64_t kNoPair = ~uint64_t{0};
constexpr uint32_t kNoRank = ~uint32_t{0};
constexpr uint32_t kNowhere = ~uint32_t{0};

uint64_t pair_key(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

uint64_t hash(uint64_t key) { return (key ^ (key >> 32)) * 0x9E3779B97F4A7C15ull; }

}  // namespace

Bpe::Bpe(const std::array<int32_t, 256>& byte_ids, const std::vector<Merge>& merges)
    : byte_ids_(byte_ids) {
  const size_t size = std::bit_ceil(std::max<size_t>(16, merges.size() * 2));
  shift_ = static_cast<uint32_t>(64 - std::countr_zero(size));
  slots_.assign(size, {kNoPair, kNoRank, -1});
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t key = pair_key(merges[rank].left, merges[rank].right);
    size_t at = hash(key) >> shift_;
    while (slots_[at].pair != kNoPair && slots_[at].pair != key) at = (at + 1) & (size - 1);
    slots_[at] = {key, static_cast<uint32_t>(rank), merges[rank].result};
  }
}

const Bpe::Slot* Bpe::find(int32_t left, int32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (size_t at = hash(key) >> shift_;; at = (at + 1) & (slots_.size() - 1)) {
    if (slots_[at].pair == key) return &slots_[at];
    if (slots_[at].pair == kNoPair) return nullptr;
  }
}

void Bpe::encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const {
  if (piece.size() <= kMaxScanBytes) {
    encode_by_scan(piece, scratch, out);
  } else {
    encode_by_heap(piece, scratch, out);
  }
}

void Bpe::encode_by_scan(std::string_view piece, Scratch& scratch,
                         std::vector<int32_t>& out) const {
  std::vector<int32_t>& ids = scratch.ids;
  std::vector<uint32_t>& ranks = scratch.ranks;  // of each token with the one after it
  ids.clear();
  ranks.clear();
  for (const char c : piece) ids.push_back(byte_ids_[static_cast<uint8_t>(c)]);
  const auto rank_at = [&](size_t i) {
    const Slot* slot = i + 1 < ids.size() ? find(ids[i], ids[i + 1]) : nullptr;
    return slot == nullptr ? kNoRank : slot->rank;
  };
  for (size_t i = 0; i < ids.size(); ++i) ranks.push_back(rank_at(i));
  while (ids.size() > 1) {
    const size_t best =
        static_cast<size_t>(std::min_element(ranks.begin(), ranks.end()) - ranks.begin());
    if (ranks[best] == kNoRank) break;
    ids[best] = find(ids[best], ids[best + 1])->result;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best) + 1);
    ranks.erase(ranks.begin() + static_cast<ptrdiff_t>(best) + 1);
    ranks[best] = rank_at(best);
    if (best > 0) ranks[best - 1] = rank_at(best - 1);
  }
  out.insert(out.end(), ids.begin(), ids.end());
}

void Bpe::encode_by_heap(std::string_view piece, Scratch& scratch,
                         std::vector<int32_t>& out) const {
  CHECK_LT(piece.size(), size_t{kNowhere});
  const uint32_t size = static_cast<uint32_t>(piece.size());
  std::vector<int32_t>& ids = scratch.ids;  // -1 where a token was merged into the one before it
  std::vector<uint32_t>& next = scratch.next;
  std::vector<uint32_t>& previous = scratch.previous;
  std::vector<uint64_t>& heap =
      scratch.heap;  // rank, then place: the smallest is the merge to do next
  ids.resize(size);
  next.resize(size);
  previous.resize(size);
  heap.clear();
  const auto entry = [](uint32_t rank, uint32_t at) {
    return (static_cast<uint64_t>(rank) << 32) | at;
  };
  for (uint32_t i = 0; i < size; ++i) {
    ids[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
    next[i] = i + 1 < size ? i + 1 : kNowhere;
    previous[i] = i > 0 ? i - 1 : kNowhere;
    const Slot* slot = i > 0 ? find(ids[i - 1], ids[i]) : nullptr;
    if (slot != nullptr) heap.push_back(entry(slot->rank, i - 1));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto push = [&](uint32_t at) {
    const Slot* slot = find(ids[at], ids[next[at]]);
    if (slot == nullptr) return;
    heap.push_back(entry(slot->rank, at));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint32_t rank = static_cast<uint32_t>(heap.back() >> 32);
    const uint32_t at = static_cast<uint32_t>(heap.back());
    heap.pop_back();
    // Entries whose tokens have changed since are stale.
    if (ids[at] < 0 || next[at] == kNowhere) continue;
    const uint32_t right = next[at];
    const Slot* slot = find(ids[at], ids[right]);
    if (slot == nullptr || slot->rank != rank) continue;
    ids[at] = slot->result;
    ids[right] = -1;
    next[at] = next[right];
    if (next[at] != kNowhere) {
      previous[next[at]] = at;
      push(at);
    }
    if (previous[at] != kNowhere) push(previous[at]);
  }
  for (uint32_t i = 0; i < size; ++i) {
    if (ids[i] >= 0) out.push_back(ids[i]);
  }
}

}  // namespace indexcache
