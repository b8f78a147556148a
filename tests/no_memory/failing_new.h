// An operator new for the whole program that finds no memory when a test says so.
#pragma once

#include <cstdint>

namespace indexcache {

// While it lives, the first `num_found` allocations of the threads it concerns find memory. The
// next finds none; with kForGood, nor does any after it.
class NoMemoryAfter {
 public:
  enum class Failure { kOnce, kForGood };
  enum class Threads { kMine, kOthers };

  NoMemoryAfter(int64_t num_found, Failure failure, Threads threads = Threads::kMine);
  ~NoMemoryAfter();
  NoMemoryAfter(const NoMemoryAfter&) = delete;
  NoMemoryAfter& operator=(const NoMemoryAfter&) = delete;

  static bool has_failed();  // some allocation, of the last one that lived
};

int64_t num_allocations_alive();  // of all threads

}  // namespace indexcache
