#include <algorithm>
#include <cstring>

#include "base/units.h"
#include "device/cuda.cuh"
#include "device/gpus.h"

namespace indexcache {

namespace {

cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

CudaMemory::CudaMemory(size_t num_bytes) : num_bytes_(num_bytes) {
  if (num_bytes == 0) return;
  void* data = nullptr;
  if (const cudaError_t status = cudaMalloc(&data, num_bytes); status != cudaSuccess) {
    cudaGetLastError();  // it would show in the next launch
    fail("cannot reserve {} of GPU memory ({} free): {}", format_bytes(num_bytes),
         format_bytes(cuda_free_bytes()), cudaGetErrorString(status));
  }
  data_ = static_cast<uint8_t*>(data);
}

CudaMemory::~CudaMemory() {
  if (data_ != nullptr) cudaFree(data_);
}

CudaMemory::CudaMemory(CudaMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}

CudaMemory& CudaMemory::operator=(CudaMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

PinnedMemory::PinnedMemory(size_t num_bytes) {
  void* data = nullptr;
  check_cuda(cudaHostAlloc(&data, num_bytes, cudaHostAllocDefault), "pinned memory");
  data_ = static_cast<uint8_t*>(data);
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)) {}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

CudaStream::CudaStream() {
  if (const std::string why = cuda_unavailable_reason(); !why.empty())
    fail("--device cuda: {}", why);
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, 0), "its properties");
  num_multiprocessors_ = properties.multiProcessorCount;
  compute_capability_ = properties.major * 10 + properties.minor;
  cudaStream_t stream;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  handle_ = stream;
}

CudaStream::~CudaStream() {
  cudaStreamSynchronize(stream_of(*this));
  for (void* event : events_) cudaEventDestroy(event_of(event));
  cudaStreamDestroy(stream_of(*this));
}

uint8_t* CudaStream::scratch(size_t num_bytes) {
  if (scratch_.num_bytes() < num_bytes) {
    wait();
    scratch_ = CudaMemory();  // both would not fit where memory is short
    scratch_ = CudaMemory(num_bytes);
  }
  return scratch_.data();
}

void CudaStream::copy_in(void* to, const void* from, size_t num_bytes) {
  check_cuda(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyHostToDevice, stream_of(*this)),
             "a copy to it");
}

void CudaStream::copy_out(void* to, const void* from, size_t num_bytes) {
  check_cuda(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDeviceToHost, stream_of(*this)),
             "a copy from it");
  wait();
}

void CudaStream::copy(void* to, const void* from, size_t num_bytes) {
  check_cuda(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDeviceToDevice, stream_of(*this)),
             "a copy within it");
}

void CudaStream::wait() { check_cuda(cudaStreamSynchronize(stream_of(*this)), "waiting for it"); }

void CudaStream::record(size_t event) {
  if (event == events_.size()) {
    cudaEvent_t created;
    check_cuda(cudaEventCreateWithFlags(&created, 0), "an event");
    events_.push_back(created);
  }
  check_cuda(cudaEventRecord(event_of(events_[event]), stream_of(*this)), "an event");
}

void CudaStream::start_laps() {
  laps_.clear();
  record(0);
}

void CudaStream::lap(double* part, double* total) {
  laps_.push_back({part, total});
  record(laps_.size());
}

void CudaStream::read_laps() {
  wait();
  for (size_t i = 0; i < laps_.size(); ++i) {
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, event_of(events_[i]), event_of(events_[i + 1])),
               "an event");
    *laps_[i].part += milliseconds * 1e-3;
    if (laps_[i].total != nullptr) *laps_[i].total += milliseconds * 1e-3;
  }
  laps_.clear();
}

CudaEvent::~CudaEvent() {
  if (handle_ != nullptr) cudaEventDestroy(event_of(handle_));
}

void CudaEvent::record(CudaStream& stream) {
  if (handle_ == nullptr) {
    cudaEvent_t event;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
    handle_ = event;
  }
  check_cuda(cudaEventRecord(event_of(handle_), stream_of(stream)), "an event");
}

void CudaEvent::wait() {
  if (handle_ != nullptr) check_cuda(cudaEventSynchronize(event_of(handle_)), "waiting for it");
}

CudaGraph::~CudaGraph() { reset(); }

void CudaGraph::reset() {
  if (handle_ != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(handle_));
  handle_ = nullptr;
}

void CudaGraph::record(CudaStream& stream, const std::function<void()>& work) {
  reset();
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal),
             "recording a graph");
  try {
    work();
  } catch (...) {
    if (cudaStreamEndCapture(stream_of(stream), &graph) == cudaSuccess) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream_of(stream), &graph), "recording a graph");
  cudaGraphExec_t exec = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(status, "making a graph ready");
  handle_ = exec;
}

void CudaGraph::launch(CudaStream& stream) {
  check_cuda(cudaGraphLaunch(static_cast<cudaGraphExec_t>(handle_), stream_of(stream)),
             "starting a graph");
}

uint64_t cuda_free_bytes() {
  size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "its free memory");
  return free;
}

}  // namespace indexcache
