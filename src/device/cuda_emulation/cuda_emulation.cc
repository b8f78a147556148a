// The fibers of emulated kernels, and device memory that only they may touch.
#include "device/cuda_emulation/cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

#include "base/units.h"

#if defined(__SANITIZE_ADDRESS__)
#define INDEXCACHE_FIBERS_UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define INDEXCACHE_FIBERS_UNDER_ASAN 1
#endif
#endif
#ifdef INDEXCACHE_FIBERS_UNDER_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a function call must preserve on the stack that runs, leaves its address in *save, and
// goes on with the stack `load` that was left in the same way.
extern "C" void indexcache_switch_stack(void** save, void* load);
asm(R"(
.text
.type indexcache_switch_stack, @function
indexcache_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size indexcache_switch_stack, .-indexcache_switch_stack
)");

namespace indexcache::emulation {

namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr uint8_t kPoison = 0xFF;  // a NaN in every float type

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr,
               "CUDA emulation: %s (block %u,%u,%u of %u,%u,%u; thread %u,%u,%u of %u,%u,%u)\n",
               what, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z,
               threadIdx.x, threadIdx.y, threadIdx.z, blockDim.x, blockDim.y, blockDim.z);
  std::abort();
}

enum class State : uint8_t { kReady, kAtExchange, kAtBarrier, kDone };

struct Fiber {
  void* stack_pointer;
  dim3 index;
  State state;
  unsigned mask;  // of the exchange it waits in
  void* asan_stack;
};

struct Warp {
  uint8_t given[kWarp * kExchangeBytes];     // by lanes that wait
  uint8_t received[kWarp * kExchangeBytes];  // what lanes that were let go may read
};

struct Machine {
  uint8_t* stacks = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  const Launch* launch = nullptr;
  Fiber* running = nullptr;
  void* scheduler_stack = nullptr;
  void* scheduler_asan_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  uint64_t num_blocks = 0;
  uint64_t num_waited = 0;  // threads that called wait_for_previous()
};

Machine machine;

uint8_t* stack_of(size_t fiber) { return machine.stacks + fiber * kStackBytes; }

void enter_fiber(Fiber& fiber) {
  threadIdx = fiber.index;
  machine.running = &fiber;
#ifdef INDEXCACHE_FIBERS_UNDER_ASAN
  const size_t number = static_cast<size_t>(&fiber - machine.fibers.data());
  __sanitizer_start_switch_fiber(&machine.scheduler_asan_stack, stack_of(number) + kGuardBytes,
                                 kStackBytes - kGuardBytes);
#endif
  indexcache_switch_stack(&machine.scheduler_stack, fiber.stack_pointer);
#ifdef INDEXCACHE_FIBERS_UNDER_ASAN
  __sanitizer_finish_switch_fiber(machine.scheduler_asan_stack, nullptr, nullptr);
#endif
}

void leave_fiber() {
  Fiber* fiber = machine.running;
#ifdef INDEXCACHE_FIBERS_UNDER_ASAN
  __sanitizer_start_switch_fiber(fiber->state == State::kDone ? nullptr : &fiber->asan_stack,
                                 machine.scheduler_bottom, machine.scheduler_size);
#endif
  indexcache_switch_stack(&fiber->stack_pointer, machine.scheduler_stack);
#ifdef INDEXCACHE_FIBERS_UNDER_ASAN
  __sanitizer_finish_switch_fiber(fiber->asan_stack, &machine.scheduler_bottom,
                                  &machine.scheduler_size);
#endif
}

[[noreturn]] void fiber_main() {
#ifdef INDEXCACHE_FIBERS_UNDER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
  machine.launch->run_thread(machine.launch->context);
  machine.running->state = State::kDone;
  leave_fiber();
  std::abort();
}

void prepare_fiber(size_t number, dim3 index) {
  Fiber& fiber = machine.fibers[number];
  fiber.index = index;
  fiber.state = State::kReady;
  // The switch pops six registers and returns to fiber_main, whose frame must look as after a call.
  void** top = reinterpret_cast<void**>(stack_of(number) + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 6;
  std::fill(top - 6, top, nullptr);
}

// Lets go the lanes whose exchange is complete. Returns whether there were any.
bool complete_exchanges(size_t warp) {
  Fiber* lanes = machine.fibers.data() + warp * kWarp;
  uint32_t released = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane].state != State::kAtExchange || (released >> lane & 1) != 0) continue;
    const unsigned mask = lanes[lane].mask;
    bool complete = true;
    for (unsigned other = 0; other < kWarp; ++other) {
      if ((mask >> other & 1) == 0) continue;
      if (lanes[other].state == State::kDone) {
        threadIdx = lanes[lane].index;
        die("an exchange waits for a lane of its mask that has left the kernel");
      }
      complete &= lanes[other].state == State::kAtExchange && lanes[other].mask == mask;
    }
    if (complete) released |= mask;
  }
  if (released == 0) return false;
  std::memcpy(machine.warps[warp].received, machine.warps[warp].given,
              sizeof(machine.warps[warp].given));
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((released >> lane & 1) != 0) lanes[lane].state = State::kReady;
  }
  return true;
}

void run_block(unsigned num_threads, bool backwards) {
  const size_t num_warps = num_threads / kWarp;
  unsigned number = 0;
  for (unsigned z = 0; z < blockDim.z; ++z) {
    for (unsigned y = 0; y < blockDim.y; ++y) {
      for (unsigned x = 0; x < blockDim.x; ++x) prepare_fiber(number++, {x, y, z});
    }
  }
  std::fill(machine.shared.begin(), machine.shared.end(), kPoison);
  for (;;) {
    for (size_t i = 0; i < num_warps; ++i) {
      const size_t warp = backwards ? num_warps - 1 - i : i;
      do {
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          Fiber& fiber = machine.fibers[warp * kWarp + (backwards ? kWarp - 1 - lane : lane)];
          if (fiber.state == State::kReady) enter_fiber(fiber);
        }
      } while (complete_exchanges(warp));
    }
    bool all_done = true;
    for (unsigned i = 0; i < num_threads; ++i) {
      if (machine.fibers[i].state == State::kAtExchange) {
        threadIdx = machine.fibers[i].index;
        die("an exchange that some lane of its mask does not reach");
      }
      all_done &= machine.fibers[i].state == State::kDone;
    }
    if (all_done) return;
    for (unsigned i = 0; i < num_threads; ++i) {
      if (machine.fibers[i].state == State::kAtBarrier) machine.fibers[i].state = State::kReady;
    }
  }
}

// --- device memory ---

// Apart from everything that the host maps, so that addresses tell which they are.
constexpr uintptr_t kDeviceBegin = 0x200000000000, kDeviceEnd = 0x300000000000;
constexpr size_t kPage = 4096;
constexpr size_t kTotalBytes = size_t{16} << 30;

struct Allocation {
  uint8_t* pages;
  size_t num_pages;
};

struct Device {
  uintptr_t next = kDeviceBegin;
  std::map<uintptr_t, Allocation> allocations;  // by the address given out
  size_t used = 0;
  bool open = false;
};

Device& device() {
  static Device* memory = new Device;  // outlives every static that owns memory of it
  return *memory;
}

bool is_device_address(uintptr_t address) {
  return address >= kDeviceBegin && address < kDeviceEnd;
}

void set_open(bool open) {
  device().open = open;
  for (const auto& [address, allocation] : device().allocations) {
    mprotect(allocation.pages, allocation.num_pages * kPage,
             open ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
}

// While it lives, the CPU may touch device memory.
struct Opened {
  Opened() { set_open(true); }
  ~Opened() { set_open(false); }
};

}  // namespace

const uint8_t* exchange(unsigned mask, const void* value, size_t num_bytes) {
  Fiber& fiber = *machine.running;
  const size_t number = static_cast<size_t>(&fiber - machine.fibers.data());
  const size_t warp = number / kWarp, lane = number % kWarp;
  if (num_bytes > kExchangeBytes) die("an exchange of more than a lane may give");
  if ((mask >> lane & 1) == 0) die("an exchange whose mask leaves out the caller");
  if (num_bytes > 0)
    std::memcpy(machine.warps[warp].given + lane * kExchangeBytes, value, num_bytes);
  fiber.mask = mask;
  fiber.state = State::kAtExchange;
  leave_fiber();
  return machine.warps[warp].received;
}

void block_barrier() {
  machine.running->state = State::kAtBarrier;
  leave_fiber();
}

uint8_t* dynamic_shared_memory() {
  const uintptr_t address = reinterpret_cast<uintptr_t>(machine.shared.data());
  return reinterpret_cast<uint8_t*>((address + 127) / 128 * 128);
}

void run(const Launch& launch) {
  const unsigned num_threads = launch.block.x * launch.block.y * launch.block.z;
  gridDim = launch.grid;
  blockDim = launch.block;
  if (num_threads == 0 || num_threads > kMaxThreads) die("a block needs 1 to 1024 threads");
  if (num_threads % kWarp != 0) die("a block that ends within a warp");
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) die("an empty grid");
  if (launch.grid.x > 0x7FFFFFFF || launch.grid.y > 65535 || launch.grid.z > 65535)
    die("a grid beyond 2^31-1 x 65535 x 65535 blocks");
  if (launch.shared_bytes > kMaxSharedBytes) die("more than 227 KiB of shared memory");
  if (machine.launch != nullptr) die("a launch inside a kernel");
  if (machine.stacks == nullptr) {
    void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) die("no memory for stacks");
    machine.stacks = static_cast<uint8_t*>(stacks);
    for (size_t i = 0; i < kMaxThreads; ++i) mprotect(stack_of(i), kGuardBytes, PROT_NONE);
    machine.fibers.resize(kMaxThreads);
    machine.warps.resize(kMaxThreads / kWarp);
  }
  const Opened opened;
  machine.launch = &launch;
  // Exactly as much as was asked for, so that a sanitizer sees what is beyond it.
  machine.shared.assign(launch.shared_bytes + 128, kPoison);
  machine.num_waited = 0;
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run_block(num_threads, machine.num_blocks++ % 2 == 1);
        const uint8_t* end = dynamic_shared_memory() + launch.shared_bytes;
        const uint8_t* limit = machine.shared.data() + machine.shared.size();
        if (!std::all_of(end, limit, [](uint8_t byte) { return byte == kPoison; }))
          die("a write past the end of shared memory");
      }
    }
  }
  machine.launch = nullptr;
  if (machine.num_waited != uint64_t{num_threads} * gridDim.x * gridDim.y * gridDim.z)
    die("a kernel that does not begin with wait_for_previous()");
}

void note_wait_for_previous() { ++machine.num_waited; }

void check_words(const void* argument, size_t num_bytes) {
  for (size_t at = 0; at + 8 <= num_bytes; at += 8) {
    uintptr_t word;
    std::memcpy(&word, static_cast<const uint8_t*>(argument) + at, 8);
    // Where Linux maps programs, heaps, files and stacks. Other numbers may look like it, but
    // seldom like a page that is there.
    const bool host = (word >> 40) == 0x55 || (word >> 40) == 0x56 || (word >> 40) == 0x7F ||
                      (word >> 40) == 0x7E;
    unsigned char resident;
    if (host && mincore(reinterpret_cast<void*>(word / kPage * kPage), 1, &resident) == 0) {
      std::fprintf(stderr, "CUDA emulation: a kernel's argument holds %#zx, host memory\n",
                   static_cast<size_t>(word));
      std::abort();
    }
  }
}

}  // namespace indexcache::emulation

// --- runtime -------------------------------------------------------------------------------------

namespace e = indexcache::emulation;

struct EmulatedEvent {
  double seconds;
};
struct EmulatedGraph {
  std::vector<std::function<void()>> work;
};

namespace {
EmulatedGraph* recording = nullptr;
}  // namespace

void e::put_on_stream(std::function<void()> work) {
  if (recording != nullptr) {
    recording->work.push_back(std::move(work));
  } else {
    work();
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                 ? "no error"
         : error == cudaErrorMemoryAllocation ? "out of memory"
                                              : "invalid argument";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated GPU", 8, 0, e::kTotalBytes, 4};
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = e::kTotalBytes;
  *free = e::kTotalBytes - e::device().used;
  return cudaSuccess;
}

// The end, at the next multiple of 16, touches an unmapped page.
cudaError_t cudaMalloc(void** memory, size_t num_bytes) {
  if (recording != nullptr) e::die("memory asked for while a graph is recorded");
  e::Device& device = e::device();
  const size_t padded = (num_bytes + 15) / 16 * 16, num_pages = (padded + e::kPage - 1) / e::kPage;
  if (num_bytes == 0) {
    *memory = nullptr;
    return cudaSuccess;
  }
  if (num_bytes > e::kTotalBytes - device.used) return cudaErrorMemoryAllocation;
  void* pages =
      mmap(reinterpret_cast<void*>(device.next), num_pages * e::kPage, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (pages == MAP_FAILED) return cudaErrorMemoryAllocation;
  std::memset(pages, e::kPoison, num_pages * e::kPage);
  device.next += (num_pages + 1) * e::kPage;
  *memory = static_cast<uint8_t*>(pages) + num_pages * e::kPage - padded;
  device.allocations[reinterpret_cast<uintptr_t>(*memory)] = {static_cast<uint8_t*>(pages),
                                                              num_pages};
  device.used += num_pages * e::kPage;
  if (!device.open) mprotect(pages, num_pages * e::kPage, PROT_NONE);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  e::Device& device = e::device();
  const auto found = device.allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == device.allocations.end()) return cudaErrorInvalidValue;
  const auto [pages, num_pages] = found->second;
  device.allocations.erase(found);
  device.used -= num_pages * e::kPage;
  mprotect(pages, num_pages * e::kPage, PROT_READ);
  const uint8_t* given = static_cast<const uint8_t*>(memory);
  const bool clean = std::all_of(static_cast<const uint8_t*>(pages), given,
                                 [](uint8_t b) { return b == e::kPoison; });
  if (!clean) e::die("a write before the start of device memory");
  munmap(pages, num_pages * e::kPage);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t num_bytes, unsigned) {
  *memory = std::malloc(num_bytes);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  if (num_bytes == 0) return cudaSuccess;
  const bool to_device = kind != cudaMemcpyDeviceToHost,
             from_device = kind != cudaMemcpyHostToDevice;
  if (e::is_device_address(reinterpret_cast<uintptr_t>(to)) != to_device ||
      e::is_device_address(reinterpret_cast<uintptr_t>(from)) != from_device)
    return cudaErrorInvalidValue;
  if (recording != nullptr && kind != cudaMemcpyDeviceToDevice) return cudaErrorInvalidValue;
  e::put_on_stream([to, from, num_bytes] {
    const e::Opened opened;
    std::memcpy(to, from, num_bytes);
  });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t num_bytes, cudaStream_t) {
  if (num_bytes == 0) return cudaSuccess;
  e::put_on_stream([to, value, num_bytes] {
    const e::Opened opened;
    std::memset(to, value, num_bytes);
  });
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return recording == nullptr ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new EmulatedEvent{0};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->seconds = indexcache::monotonic_seconds();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = static_cast<float>((end->seconds - begin->seconds) * 1e3);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  recording = new EmulatedGraph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = std::exchange(recording, nullptr);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, uint64_t) {
  *exec = new EmulatedGraph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto& work : exec->work) work();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
