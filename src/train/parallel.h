// work(0) to work(count - 1) on threads. Of several errors the one of the lowest index is thrown.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace indexcache {

template <class Work>
void run_parallel(size_t count, int num_threads, const Work& work) {
  std::atomic<size_t> next = 0;
  std::vector<std::exception_ptr> errors(count);
  std::atomic<bool> failed = false;
  const auto loop = [&] {
    for (size_t i; !failed && (i = next++) < count;) {
      try {
        work(i);
      } catch (...) {
        errors[i] = std::current_exception();
        failed = true;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back(loop);
    loop();
  }
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace indexcache
