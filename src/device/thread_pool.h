// A fixed set of threads that take items of one job at a time. Between jobs they spin for some
// microseconds and then park in the kernel, so that an idle engine costs no CPU and a busy
// neighbour is not starved.
//
// A job is done when its items are: the caller takes items too, and waits only for workers that are
// inside an item, never for one that has not got a CPU yet. So on a busy machine many threads are
// not slower than one.
//
// Results never depend on which thread takes which item, so a job is deterministic as long as its
// items are independent; the library keeps to that.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <type_traits>
#include <vector>

namespace indexcache {

class ThreadPool {
 public:
  // `num_threads` counts the calling thread; at least 1. An Error where the system has no more.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(item, thread) for item in [0, num_items), thread in [0, num_threads()). Returns when
  // all are done. Must not be called from inside a body. What a body throws (ops check their
  // contract before they start, but memory can run out) comes out here, once no thread is inside
  // any more; items that had not begun are left out.
  template <class Body>
  void parallel_for(int64_t num_items, const Body& body) {
    static_assert(std::is_invocable_v<const Body&, int64_t, int>);
    run(
        num_items,
        [](const void* context, int64_t item, int thread) {
          (*static_cast<const Body*>(context))(item, thread);
        },
        &body);
  }

 private:
  using Call = void (*)(const void* context, int64_t item, int thread);
  void run(int64_t num_items, Call call, const void* context);
  void stop();
  void work(int thread);
  void take_items(int thread);
  bool enter();
  void leave();

  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int64_t num_items_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;  // the first one's, written by who set failed_
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> job_{0};  // grows by one per job; workers wait for it to change
  alignas(64) std::atomic<int64_t> next_item_{0};
  // Workers inside the job, which alone may read its fields; kClosed when there is none to enter.
  static constexpr int32_t kClosed = -1;
  alignas(64) std::atomic<int32_t> num_inside_{kClosed};
};

// The CPUs that this process may use (its affinity mask), at least 1.
int num_usable_cpus();

}  // namespace indexcache
