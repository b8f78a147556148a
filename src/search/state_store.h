// Room for bytes that are worth keeping but can be computed again, under a limit: in memory, or in
// a file that has no name and so vanishes with the process, however it ends.
//
// Errors: a folder that cannot be written, a full disk, with the path and the system's reason.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "device/memory.h"

namespace indexcache {

class StateStore;

// One piece of a store; gives its room back when destroyed. The store must outlive it.
class StoredBytes {
 public:
  StoredBytes() = default;
  ~StoredBytes();
  StoredBytes(StoredBytes&& other) noexcept;
  StoredBytes& operator=(StoredBytes&& other) noexcept;
  StoredBytes(const StoredBytes&) = delete;
  StoredBytes& operator=(const StoredBytes&) = delete;

  size_t num_bytes() const { return num_bytes_; }
  void write(size_t offset, const void* source, size_t num_bytes);
  void read(size_t offset, void* target, size_t num_bytes) const;

 private:
  friend class StateStore;
  StateStore* store_ = nullptr;
  HostMemory memory_;   // of a store in memory
  uint64_t place_ = 0;  // in the store's file
  size_t num_bytes_ = 0;
};

class StateStore {
 public:
  // `folder` empty: in memory.
  explicit StateStore(uint64_t max_bytes, const std::string& folder = "");
  ~StateStore();
  StateStore(const StateStore&) = delete;
  StateStore& operator=(const StateStore&) = delete;

  uint64_t max_bytes() const { return max_bytes_; }
  uint64_t used_bytes() const { return used_bytes_; }

  // Nothing when the limit would be passed, unless `must` is set.
  std::optional<StoredBytes> take(size_t num_bytes, bool must = false);

 private:
  friend class StoredBytes;
  void give_back(StoredBytes& bytes);

  uint64_t max_bytes_, used_bytes_ = 0, file_end_ = 0;
  std::string folder_;
  int fd_ = -1;
  std::map<size_t, std::vector<uint64_t>> free_places_;  // in the file, by size
};

}  // namespace indexcache
