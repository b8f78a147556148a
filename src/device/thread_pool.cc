#include "device/thread_pool.h"

#include <immintrin.h>
#include <sched.h>

#include <system_error>
#include <utility>

#include "base/error.h"

namespace indexcache {

namespace {
// About 20 us on a 3 GHz machine: longer than the gap between two ops of a decode step, shorter
// than what a busy neighbour would notice. OpenMP's endless spinning was up to 100x slower on a
// shared 2-core machine.
constexpr int kSpins = 1500;
}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  CHECK_GE(num_threads, 1);
  try {
    for (int thread = 1; thread < num_threads; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (const std::system_error& error) {
    const size_t started = workers_.size();
    stop();
    fail("the system starts {} of {} threads: {}", started + 1, num_threads,
         error.code().message());
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_ = true;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run(int64_t num_items, Call call, const void* context) {
  if (num_items <= 0) return;
  if (workers_.empty() || num_items == 1) {
    for (int64_t item = 0; item < num_items; ++item) call(context, item, 0);
    return;
  }
  call_ = call;
  context_ = context;
  num_items_ = num_items;
  next_item_.store(0, std::memory_order_relaxed);
  num_inside_.store(0, std::memory_order_release);
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  take_items(0);
  for (int spin = 0;; ++spin) {
    int32_t inside = 0;
    if (num_inside_.compare_exchange_strong(inside, kClosed, std::memory_order_acquire)) break;
    if (spin < kSpins) {
      _mm_pause();
    } else {
      num_inside_.wait(inside, std::memory_order_relaxed);
    }
  }
  if (failed_.exchange(false, std::memory_order_relaxed))
    std::rethrow_exception(std::exchange(failure_, nullptr));
}

bool ThreadPool::enter() {
  int32_t inside = num_inside_.load(std::memory_order_relaxed);
  while (inside != kClosed) {
    if (num_inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire))
      return true;
  }
  return false;
}

void ThreadPool::leave() {
  if (num_inside_.fetch_sub(1, std::memory_order_release) == 1) num_inside_.notify_one();
}

void ThreadPool::take_items(int thread) {
  try {
    for (;;) {
      const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items_) return;
      call_(context_, item, thread);
    }
  } catch (...) {
    next_item_.store(num_items_, std::memory_order_relaxed);
    if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; job_.load(std::memory_order_acquire) == seen; ++spin) {
      if (spin < kSpins) {
        _mm_pause();
      } else {
        job_.wait(seen, std::memory_order_acquire);
      }
    }
    seen = job_.load(std::memory_order_acquire);
    if (stop_) return;
    if (!enter()) continue;  // the others have done it all
    take_items(thread);
    leave();
  }
}

int num_usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
}

}  // namespace indexcache
