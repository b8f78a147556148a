// Work and memory on one NVIDIA GPU, for code that sees no CUDA header: CPU-only builds link
// cuda_none.cc, in which whatever needs a GPU is an Error, CUDA builds cuda_runtime.cu.
//
// Everything put on a stream runs in order; the host goes on at once, except where it is said to
// wait. Errors of the GPU (out of memory, a lost device) are Errors that name the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace indexcache {

enum class Device : uint8_t { kCpu, kCuda };

// Memory of the GPU, aligned to 256 bytes, with undefined contents. Only kernels and the copies
// below may touch it.
class CudaMemory {
 public:
  CudaMemory() = default;
  explicit CudaMemory(size_t num_bytes);
  ~CudaMemory();
  CudaMemory(CudaMemory&& other) noexcept;
  CudaMemory& operator=(CudaMemory&& other) noexcept;
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  uint8_t* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t num_bytes_ = 0;
};

// Host memory that the GPU reads at full speed while the host goes on.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(size_t num_bytes);
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&& other) noexcept;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
};

class CudaStream {
 public:
  CudaStream();  // Error where there is no GPU
  ~CudaStream();
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  void* handle() const { return handle_; }  // a cudaStream_t
  int num_multiprocessors() const { return num_multiprocessors_; }
  int compute_capability() const { return compute_capability_; }  // 90 for Hopper

  // Scratch for the op that runs: its contents are lost with the next call. Waits when it grows.
  uint8_t* scratch(size_t num_bytes);

  // `from` may change afterwards, but for pinned memory, which the GPU reads when the stream comes
  // to it.
  void copy_in(void* to, const void* from, size_t num_bytes);
  void copy_out(void* to, const void* from, size_t num_bytes);  // waits
  void copy(void* to, const void* from, size_t num_bytes);      // within the GPU
  void wait();

  // Times of what is on the stream, without waiting at each lap: lap() adds the time since the last
  // one to *part and *total when read_laps() has waited for it. `total` may be null.
  void start_laps();
  void lap(double* part, double* total);
  void read_laps();

 private:
  struct Lap {
    double* part;
    double* total;
  };
  void record(size_t event);

  void* handle_ = nullptr;
  int num_multiprocessors_ = 0, compute_capability_ = 0;
  CudaMemory scratch_;
  std::vector<void*> events_;  // as many as the longest row of laps needed
  std::vector<Lap> laps_;
};

// A place in the order of a stream. The host may wait until the stream has come to it.
class CudaEvent {
 public:
  CudaEvent() = default;
  ~CudaEvent();
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  void record(CudaStream& stream);
  void wait();  // at once where none was recorded

 private:
  void* handle_ = nullptr;
};

// Work that was recorded once and is put on a stream again at the cost of one launch: a step of
// decoding is a thousand kernels that each take less time than the host needs to start one. The
// kernels see the arguments of the recording, so that only the contents of GPU memory may change.
class CudaGraph {
 public:
  CudaGraph() = default;
  ~CudaGraph();
  CudaGraph(CudaGraph&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaGraph& operator=(CudaGraph&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  // Takes down what `work` puts on the stream, which is not run. `work` may not wait, copy to or
  // from the host, or ask for more scratch than the stream has: it ran before with the same shapes.
  void record(CudaStream& stream, const std::function<void()>& work);
  bool recorded() const { return handle_ != nullptr; }
  void launch(CudaStream& stream);

 private:
  void reset();

  void* handle_ = nullptr;  // a cudaGraphExec_t
};

uint64_t cuda_free_bytes();

}  // namespace indexcache
