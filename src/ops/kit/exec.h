// What an operation is run with: the device, its threads or its stream, scratch memory, the
// implementations a user forced, and the clock.
//
// With Device::kCuda the operands of an op are GPU memory (what is not, its contract says), and the
// op has only been put on the stream when it returns.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/units.h"
#include "device/cuda.h"
#include "device/memory.h"
#include "device/thread_pool.h"

namespace indexcache {

// What one call costs by its contract, for benchmarks and the op table.
struct Cost {
  double flops = 0;
  double bytes = 0;  // least traffic: every operand once
};

struct OpTime {
  int64_t calls = 0;
  double seconds = 0;
  Cost cost;
};

// Times by op name ("matmul"), filled when Exec::profile is set.
struct Profile {
  std::map<std::string, OpTime> ops;
};

struct Exec {
  explicit Exec(int num_threads, Device device_in = Device::kCpu)
      : device(device_in), pool(num_threads), scratch_(static_cast<size_t>(num_threads)) {
    if (device == Device::kCuda) cuda_ = std::make_unique<CudaStream>();
  }

  const Device device;
  ThreadPool pool;  // with a GPU for what the host does beside it
  Profile* profile = nullptr;
  std::map<std::string, std::string> forced;  // op name -> implementation name ("--force op=name")
  // A row of an op's result has the same bits whatever other rows the call has.
  bool batch_invariant = false;

  CudaStream& cuda() {
    CHECK(cuda_ != nullptr);
    return *cuda_;
  }

  // Copies between memory of the device.
  void copy(void* to, const void* from, size_t num_bytes) {
    if (cuda_ != nullptr) {
      cuda_->copy(to, from, num_bytes);
    } else {
      std::memcpy(to, from, num_bytes);
    }
  }

  // Until everything that was started is done.
  void wait() {
    if (cuda_ != nullptr) cuda_->wait();
  }

  // At least `num_bytes` of 64-byte aligned memory that thread `thread` may use until its next call
  // of scratch(). Contents are undefined. Grows, never shrinks.
  uint8_t* scratch(int thread, size_t num_bytes) {
    HostMemory& memory = scratch_[static_cast<size_t>(thread)];
    if (memory.num_bytes() < num_bytes) memory = HostMemory(num_bytes + num_bytes / 2);
    return memory.data();
  }

  // The same for the calling thread to fill before a parallel part reads it.
  uint8_t* shared_scratch(size_t num_bytes) {
    if (shared_scratch_.num_bytes() < num_bytes)
      shared_scratch_ = HostMemory(num_bytes + num_bytes / 2);
    return shared_scratch_.data();
  }

 private:
  std::vector<HostMemory> scratch_;
  HostMemory shared_scratch_;
  std::unique_ptr<CudaStream> cuda_;
};

// What run_op() is called with, for checking names that a user forces.
inline constexpr const char* kOpNames[] = {
    "gather_rows", "index_select", "matmul",     "matmul_experts",  "moe_combine",
    "moe_down",    "moe_gate_up",  "moe_group",  "moe_route",       "rms_norm",
    "rope",        "silu_mul",     "sparse_mla", "store_index_key", "store_latent"};

// One implementation of an op. A table lists them best first, `ref`, which is for the CPU, last.
template <class Args>
struct OpImpl {
  const char* name;
  bool (*supported)(const Args& args);
  void (*run)(Exec& exec, const Args& args);
  Device device = Device::kCpu;
};

inline const char* device_name(Device device) { return device == Device::kCuda ? "cuda" : "cpu"; }

// Of the implementations for this device, the forced one if there is one (Error when it cannot take
// these arguments), else the first supported.
template <class Args>
const OpImpl<Args>& choose(const Exec& exec, const char* op, std::span<const OpImpl<Args>> table,
                           const Args& args) {
  const auto forced = exec.forced.find(op);
  std::string names;
  for (const OpImpl<Args>& impl : table) {
    if (impl.device != exec.device) continue;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", impl.name);
    if (forced != exec.forced.end() && forced->second != impl.name) continue;
    if (impl.supported(args)) return impl;
    if (forced != exec.forced.end()) {
      fail("--force {}={}: this implementation does not support this machine or these arguments",
           op, impl.name);
    }
  }
  if (forced == exec.forced.end())
    fail("{}: none of the implementations for {} ({}) supports these arguments", op,
         device_name(exec.device), names);
  fail("--force {}={}: found no such implementation, expected one of: {}", op, forced->second,
       names);
}

template <class Args>
void run_op(Exec& exec, const char* op, std::span<const OpImpl<Args>> table,
            const std::type_identity_t<Args>& args, Cost cost) {
  const OpImpl<Args>& impl = choose<Args>(exec, op, table, args);
  if (exec.profile == nullptr) {
    impl.run(exec, args);
    return;
  }
  exec.wait();
  const double start = monotonic_seconds();
  impl.run(exec, args);
  exec.wait();
  OpTime& time = exec.profile->ops[op];
  time.calls += 1;
  time.seconds += monotonic_seconds() - start;
  time.cost.flops += cost.flops;
  time.cost.bytes += cost.bytes;
}

template <class Args, size_t N>
void run_op(Exec& exec, const char* op, const OpImpl<Args> (&table)[N], const Args& args,
            Cost cost) {
  run_op<Args>(exec, op, std::span<const OpImpl<Args>>(table), args, cost);
}

}  // namespace indexcache
