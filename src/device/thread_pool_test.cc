#include "device/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <numeric>

#include "base/rng.h"
#include "device/cpu_features.h"
#include "device/memory.h"

namespace indexcache {
namespace {

TEST(ThreadPool, EveryItemExactlyOnce) {
  for (int num_threads = 1; num_threads <= 8; ++num_threads) {
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (const int64_t num_items : {0, 1, 2, 3, 7, 64, 1000, 20000}) {
      std::vector<std::atomic<int>> counts(static_cast<size_t>(num_items));
      pool.parallel_for(num_items, [&](int64_t item, int thread) {
        ASSERT_GE(thread, 0);
        ASSERT_LT(thread, num_threads);
        counts[static_cast<size_t>(item)].fetch_add(1, std::memory_order_relaxed);
      });
      for (const auto& count : counts) ASSERT_EQ(count.load(), 1);
    }
  }
}

// A write of one item is seen by every item of the next job, without any other synchronisation.
TEST(ThreadPool, ManyJobsSeeEachOthersWrites) {
  Rng rng(3);
  for (const int num_threads : {2, 3, 8}) {
    ThreadPool pool(num_threads);
    std::vector<int64_t> values(97, 0), next(97, 0);
    for (int64_t job = 1; job <= 3000; ++job) {
      const int64_t num_items = 1 + static_cast<int64_t>(rng.below(97));
      pool.parallel_for(num_items, [&](int64_t item, int) {
        const size_t i = static_cast<size_t>(item);
        next[i] = values[i] + 1;
      });
      pool.parallel_for(num_items, [&](int64_t item, int) {
        values[static_cast<size_t>(item)] = next[static_cast<size_t>(num_items - 1 - item)];
      });
      for (size_t i = 0; i < static_cast<size_t>(num_items) / 2; ++i)
        std::swap(values[i], values[static_cast<size_t>(num_items) - 1 - i]);
    }
    EXPECT_GT(std::accumulate(values.begin(), values.end(), int64_t{0}), 0);
    EXPECT_EQ(values[0], 3000);
  }
}

TEST(ThreadPool, WhatABodyThrowsComesOutWhenNoneIsInside) {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    ThreadPool pool(num_threads);
    for (int job = 0; job < 200; ++job) {
      std::atomic<int> num_inside = 0, num_begun = 0;
      const auto body = [&](int64_t item, int) {
        ++num_inside;
        ++num_begun;
        const bool fails = item % 50 == 7;  // several threads may fail at once
        --num_inside;
        if (fails) throw std::runtime_error("item " + std::to_string(item));
      };
      EXPECT_THROW(pool.parallel_for(1000, body), std::runtime_error);
      EXPECT_EQ(num_inside, 0);
      EXPECT_LT(num_begun, 1000) << "what had not begun is left out";
      std::atomic<int> num_done = 0;
      pool.parallel_for(100, [&](int64_t, int) { ++num_done; });
      EXPECT_EQ(num_done, 100) << "the pool goes on";
    }
  }
}

// At most one item at a time has the number of a thread, so per-thread scratch needs no lock.
TEST(ThreadPool, ThreadNumbersAreNotShared) {
  ThreadPool pool(4);
  std::atomic<int> inside[4] = {};
  std::atomic<bool> shared = false;
  pool.parallel_for(20000, [&](int64_t, int thread) {
    if (inside[thread].fetch_add(1) != 0) shared = true;
    inside[thread].fetch_sub(1);
  });
  EXPECT_FALSE(shared);
}

TEST(ThreadPool, PoolsComeAndGo) {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(1 + i % 4), unused(3);
    std::atomic<int64_t> sum = 0;
    pool.parallel_for(i, [&](int64_t item, int) { sum += item; });
    EXPECT_EQ(sum, i * (i - 1) / 2);
  }
}

// Two pools at once: what a job of one pool does may use another pool.
TEST(ThreadPool, OnePoolInsideAJobOfAnother) {
  ThreadPool outer(2);
  std::atomic<int64_t> sum = 0;
  outer.parallel_for(6, [&](int64_t item, int) {
    ThreadPool inner(3);
    inner.parallel_for(10 * item, [&](int64_t, int) { sum += 1; });
  });
  EXPECT_EQ(sum, 150);
}

// Workers that every CPU is too busy for: the caller does what they do not. Waiting for each of
// them in each job took minutes.
TEST(ThreadPool, WorkersWithoutACpuHoldNothingUp) {
  std::atomic<bool> stop = false;
  std::vector<std::thread> busy;
  for (int i = 0; i < num_usable_cpus(); ++i) {
    busy.emplace_back([&] {
      while (!stop) {
      }
    });
  }
  std::unique_ptr<ThreadPool> pool;
  std::thread([&] {
    const sched_param param = {};
    ASSERT_EQ(sched_setscheduler(0, SCHED_IDLE, &param), 0);  // which its workers inherit
    pool = std::make_unique<ThreadPool>(3);
  }).join();
  std::atomic<int> count = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int job = 0; job < 1000; ++job) pool->parallel_for(8, [&](int64_t, int) { ++count; });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  stop = true;
  for (std::thread& thread : busy) thread.join();
  std::printf("1000 jobs beside idle-class workers: %.3f s\n", elapsed.count());
  EXPECT_EQ(count, 8000);
  EXPECT_LT(elapsed.count(), 20);
}

// Eight workers that span 200 ms of idleness would burn 1.6 s of CPU time; parked ones burn nearly
// none. The bound leaves room for the spinning before they park.
TEST(ThreadPool, IdleThreadsPark) {
  const auto cpu_seconds = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
  };
  ThreadPool pool(9);
  pool.parallel_for(100, [](int64_t, int) {});
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double used = cpu_seconds() - before;
  std::printf("CPU time of 8 idle threads in 200 ms: %.1f ms\n", 1e3 * used);
  EXPECT_LT(used, 0.1);
}

TEST(ThreadPool, UsableCpus) {
  EXPECT_GE(num_usable_cpus(), 1);
  EXPECT_LE(num_usable_cpus(), sysconf(_SC_NPROCESSORS_CONF));
}

TEST(CpuFeatures, NamesMatchTheFlags) {
  const CpuFeatures& f = cpu_features();
  const std::string names = cpu_isa_names();
  std::printf("%s: %s\n", cpu_name().c_str(), names.c_str());
  EXPECT_FALSE(cpu_name().empty());
  EXPECT_EQ(names.find("avx2") != std::string::npos, f.avx2);
  EXPECT_EQ((names + " ").find("avx512 ") != std::string::npos, f.avx512);
  EXPECT_EQ(names.find("avx512_bf16") != std::string::npos, f.avx512_bf16);
  if (f.avx512_bf16 || f.avx512_vnni) {
    EXPECT_TRUE(f.avx512);
  }
  if (f.amx_bf16) {
    EXPECT_TRUE(f.avx512_bf16);
  }
}

}  // namespace
}  // namespace indexcache
