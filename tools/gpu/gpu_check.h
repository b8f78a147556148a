// What the programs in this folder share. Each builds alone with nvcc, compares kernels with an
// obvious reference on the same GPU or on the host, prints PASS or FAIL a line, and then times.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace gpu_check {

inline int failures = 0;

inline void ok(cudaError_t status, const char* what, int line) {
  if (status == cudaSuccess) return;
  std::printf("FAIL line %d: %s: %s\n", line, what, cudaGetErrorString(status));
  std::exit(1);
}
#define OK(call) gpu_check::ok((call), #call, __LINE__)

// Also finds what a kernel did wrong.
#define FINISH() OK(cudaDeviceSynchronize())

inline void report(bool passed, const char* format, auto... values) {
  std::printf("%s ", passed ? "PASS" : "FAIL");
  std::printf(format, values...);
  std::printf("\n");
  std::fflush(stdout);
  failures += !passed;
}

template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t size = 0;

  explicit DeviceArray(size_t n) : size(n) {
    OK(cudaMalloc(&data, std::max<size_t>(n * sizeof(T), 16)));
    OK(cudaMemset(data, 0xFF, n * sizeof(T)));  // NaN, or -1
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { set(host); }
  ~DeviceArray() { cudaFree(data); }
  DeviceArray(const DeviceArray&) = delete;

  void set(const std::vector<T>& host) {
    OK(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> get() const {
    std::vector<T> host(size);
    OK(cudaMemcpy(host.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
};

struct Random {
  uint64_t state;

  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float normal() {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum - 6;
  }
};

// Fills on the GPU, for inputs too large for the host: roughly normal numbers.
static __global__ void fill_normal(float* to, size_t n, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n;
       i += size_t{gridDim.x} * blockDim.x) {
    uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15ull;
    float sum = 0;
    for (int j = 0; j < 4; ++j) {
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
      z ^= z >> 31;
      sum += static_cast<float>(z >> 40) * 0x1p-24f - 0.5f;
    }
    to[i] = sum * 1.7320508f;
  }
}

// Median of `repeats` runs in milliseconds, after two more.
inline double milliseconds(const std::function<void()>& run, int repeats = 7) {
  run();
  run();
  FINISH();
  cudaEvent_t begin, end;
  OK(cudaEventCreate(&begin));
  OK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < repeats; ++i) {
    OK(cudaEventRecord(begin));
    run();
    OK(cudaEventRecord(end));
    OK(cudaEventSynchronize(end));
    float time = 0;
    OK(cudaEventElapsedTime(&time, begin, end));
    times.push_back(time);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// The same for microseconds of something short, as replays of a captured graph of `inner` runs.
inline double graph_microseconds(const std::function<void(cudaStream_t)>& run, int inner = 20) {
  cudaStream_t stream;
  OK(cudaStreamCreate(&stream));
  run(stream);
  OK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < inner; ++i) run(stream);
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  OK(cudaEventCreate(&begin));
  OK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    OK(cudaEventRecord(begin, stream));
    OK(cudaGraphLaunch(exec, stream));
    OK(cudaEventRecord(end, stream));
    OK(cudaEventSynchronize(end));
    float time = 0;
    OK(cudaEventElapsedTime(&time, begin, end));
    times.push_back(time);
  }
  std::sort(times.begin(), times.end());
  OK(cudaGraphExecDestroy(exec));
  OK(cudaGraphDestroy(graph));
  OK(cudaStreamDestroy(stream));
  return 1e3 * times[times.size() / 2] / inner;
}

inline void print_device() {
  cudaDeviceProp properties;
  OK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %d multiprocessors, L2 %d MB\n", properties.name, properties.multiProcessorCount,
              properties.l2CacheSize >> 20);
}

inline int multiprocessors() {
  int count = 0;
  OK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

inline int finish() {
  std::printf(failures == 0 ? "ALL PASS\n" : "%d FAILED\n", failures);
  return failures != 0;
}

}  // namespace gpu_check
