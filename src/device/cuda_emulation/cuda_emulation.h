// The part of CUDA that our sources use, in plain C++: a build with INDEXCACHE_CUDA_EMULATION
// compiles the .cu files with the host compiler and runs their kernels on the CPU, so that they are
// tested where there is no GPU.
//
// Every thread of a block is a fiber on one stack of its own; blocks run one after another.
// Barriers and warp exchanges switch fibers. Consecutive blocks run their threads in opposite
// orders, so that a missing barrier shows. What a GPU would silently accept ends the program with a
// message: an exchange that a lane of its mask never reaches, a pointer to host memory among a
// kernel's arguments, a launch beyond the limits of a Hopper GPU. Device memory is filled with NaN,
// lies between unmapped pages, and can be read by the host only through the copy functions.
//
// Static shared memory keeps what the block before left there; dynamic shared memory is filled with
// NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_in = 1, unsigned y_in = 1, unsigned z_in = 1)
      : x(x_in), y(y_in), z(z_in) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the fiber that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace indexcache::emulation {

inline constexpr int kWarp = 32;
inline constexpr size_t kExchangeBytes = 32;  // of one lane: enough for the operands of an mma

// Gives `bytes` of this lane to the lanes of `mask` and returns, when all of them have come here,
// what all gave: [32][kExchangeBytes].
const uint8_t* exchange(unsigned mask, const void* value, size_t num_bytes);
void block_barrier();
uint8_t* dynamic_shared_memory();

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*run_thread)(const void* context);
  const void* context;
};
void run(const Launch& launch);

// The kernel that runs has waited for the one before it.
void note_wait_for_previous();

// Does `work` at once or, while a graph is recorded, whenever it is launched.
void put_on_stream(std::function<void()> work);

// Ends the program if a word of the argument could be an address outside device memory. Where the
// compiler cannot clear padding, which may hold any old address, nothing is checked.
void check_words(const void* argument, size_t num_bytes);

template <class T>
void check_argument([[maybe_unused]] T& argument) {
#if __has_builtin(__builtin_clear_padding)
  __builtin_clear_padding(&argument);
  check_words(&argument, sizeof(argument));
#endif
}

template <class T>
T exchanged(const uint8_t* all, unsigned lane) {
  T value;
  std::memcpy(&value, all + (lane % kWarp) * kExchangeBytes, sizeof(T));
  return value;
}

inline unsigned lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp;
}

}  // namespace indexcache::emulation

inline void __syncthreads() { indexcache::emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { indexcache::emulation::exchange(mask, nullptr, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  namespace e = indexcache::emulation;
  const unsigned group = e::lane() / static_cast<unsigned>(width) * static_cast<unsigned>(width);
  return e::exchanged<T>(e::exchange(mask, &value, sizeof(T)),
                         group + static_cast<unsigned>(from) % static_cast<unsigned>(width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  namespace e = indexcache::emulation;
  const unsigned from = e::lane() ^ static_cast<unsigned>(bits);
  const bool inside =
      from / static_cast<unsigned>(width) <= e::lane() / static_cast<unsigned>(width);
  return e::exchanged<T>(e::exchange(mask, &value, sizeof(T)), inside ? from : e::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  namespace e = indexcache::emulation;
  const bool inside = e::lane() % static_cast<unsigned>(width) >= delta;
  return e::exchanged<T>(e::exchange(mask, &value, sizeof(T)),
                         inside ? e::lane() - delta : e::lane());
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  namespace e = indexcache::emulation;
  const bool inside =
      e::lane() % static_cast<unsigned>(width) + delta < static_cast<unsigned>(width);
  return e::exchanged<T>(e::exchange(mask, &value, sizeof(T)),
                         inside ? e::lane() + delta : e::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  namespace e = indexcache::emulation;
  const int own = predicate != 0;
  const uint8_t* all = e::exchange(mask, &own, sizeof(own));
  unsigned bits = 0;
  for (unsigned lane = 0; lane < e::kWarp; ++lane) {
    if ((mask >> lane & 1) != 0 && e::exchanged<int>(all, lane) != 0) bits |= 1u << lane;
  }
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  namespace e = indexcache::emulation;
  const uint8_t* all = e::exchange(mask, &value, sizeof(T));
  unsigned bits = 0;
  for (unsigned lane = 0; lane < e::kWarp; ++lane) {
    if ((mask >> lane & 1) != 0 && e::exchanged<T>(all, lane) == value) bits |= 1u << lane;
  }
  return bits;
}

// One fiber runs at a time.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "float atomics have no order");
  const T old = *address;
  *address += value;
  return old;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
inline void __threadfence() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// --- runtime -------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100
};
inline constexpr int CUDART_VERSION = 13000;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
struct EmulatedStream;
struct EmulatedEvent;
struct EmulatedGraph;
using cudaStream_t = EmulatedStream*;
using cudaEvent_t = EmulatedEvent*;
using cudaGraph_t = EmulatedGraph*;
using cudaGraphExec_t = EmulatedGraph*;
struct cudaDeviceProp {
  char name[256];
  int major, minor;
  size_t totalGlobalMem;
  int multiProcessorCount;
};
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;
inline constexpr unsigned cudaHostAllocDefault = 0;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMalloc(void** memory, size_t num_bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaHostAlloc(void** memory, size_t num_bytes, unsigned flags);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t num_bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, uint64_t flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
