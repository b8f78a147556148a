// What cuda.h offers where the program was built without CUDA: the reason why it cannot be had.
#include "device/cuda.h"

#include "base/error.h"
#include "device/gpus.h"

namespace indexcache {

namespace {

[[noreturn]] void no_cuda() { fail("--device cuda: {}", cuda_unavailable_reason()); }

}  // namespace

CudaMemory::CudaMemory(size_t num_bytes) : num_bytes_(num_bytes) {
  if (num_bytes > 0) no_cuda();
}
CudaMemory::~CudaMemory() = default;
CudaMemory::CudaMemory(CudaMemory&&) noexcept = default;
CudaMemory& CudaMemory::operator=(CudaMemory&&) noexcept = default;
PinnedMemory::PinnedMemory(size_t) { no_cuda(); }
PinnedMemory::~PinnedMemory() = default;
PinnedMemory::PinnedMemory(PinnedMemory&&) noexcept = default;
PinnedMemory& PinnedMemory::operator=(PinnedMemory&&) noexcept = default;
CudaStream::CudaStream() { no_cuda(); }
CudaStream::~CudaStream() = default;
uint8_t* CudaStream::scratch(size_t) { no_cuda(); }
void CudaStream::copy_in(void*, const void*, size_t) { no_cuda(); }
void CudaStream::copy_out(void*, const void*, size_t) { no_cuda(); }
void CudaStream::copy(void*, const void*, size_t) { no_cuda(); }
void CudaStream::wait() { no_cuda(); }
void CudaStream::start_laps() { no_cuda(); }
void CudaStream::lap(double*, double*) { no_cuda(); }
void CudaStream::read_laps() { no_cuda(); }
CudaEvent::~CudaEvent() = default;
void CudaEvent::record(CudaStream&) { no_cuda(); }
void CudaEvent::wait() { CHECK(handle_ == nullptr); }
CudaGraph::~CudaGraph() = default;
void CudaGraph::record(CudaStream&, const std::function<void()>&) { no_cuda(); }
void CudaGraph::launch(CudaStream&) { no_cuda(); }
uint64_t cuda_free_bytes() { no_cuda(); }

}  // namespace indexcache
