#include "tests/no_memory/failing_new.h"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace indexcache {

namespace {

std::atomic<int64_t> num_alive{0}, num_left{0};
std::atomic<bool> limited{false}, for_good{false}, of_others{false}, failed{false};
thread_local bool is_limiter = false;

bool finds_memory() {
  if (!limited || of_others == is_limiter) return true;
  const int64_t left = num_left.fetch_sub(1);
  if (left > 0 || (left < 0 && !for_good)) return true;
  failed = true;
  return false;
}

void* allocate(std::size_t size, std::size_t alignment) noexcept {
  if (!finds_memory()) return nullptr;
  void* memory =
      alignment <= alignof(std::max_align_t)
          ? std::malloc(size > 0 ? size : 1)
          : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (memory != nullptr) ++num_alive;
  return memory;
}

void* allocate_or_throw(std::size_t size, std::size_t alignment) {
  if (void* memory = allocate(size, alignment)) return memory;
  throw std::bad_alloc();
}

void release(void* memory) noexcept {
  if (memory != nullptr) --num_alive;
  std::free(memory);
}

}  // namespace

NoMemoryAfter::NoMemoryAfter(int64_t num_found, Failure failure, Threads threads) {
  num_left = num_found;
  for_good = failure == Failure::kForGood;
  of_others = threads == Threads::kOthers;
  failed = false;
  is_limiter = true;
  limited = true;
}

NoMemoryAfter::~NoMemoryAfter() { is_limiter = limited = false; }

bool NoMemoryAfter::has_failed() { return failed; }

int64_t num_allocations_alive() { return num_alive; }

}  // namespace indexcache

using indexcache::allocate, indexcache::allocate_or_throw, indexcache::release;
using std::size_t, std::align_val_t, std::nothrow_t;

constexpr size_t kPlain = alignof(std::max_align_t);

void* operator new(size_t size) { return allocate_or_throw(size, kPlain); }
void* operator new[](size_t size) { return allocate_or_throw(size, kPlain); }
void* operator new(size_t size, align_val_t a) { return allocate_or_throw(size, size_t(a)); }
void* operator new[](size_t size, align_val_t a) { return allocate_or_throw(size, size_t(a)); }
void* operator new(size_t size, const nothrow_t&) noexcept { return allocate(size, kPlain); }
void* operator new[](size_t size, const nothrow_t&) noexcept { return allocate(size, kPlain); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }
void operator delete(void* p, align_val_t) noexcept { release(p); }
void operator delete[](void* p, align_val_t) noexcept { release(p); }
void operator delete(void* p, size_t, align_val_t) noexcept { release(p); }
void operator delete[](void* p, size_t, align_val_t) noexcept { release(p); }
