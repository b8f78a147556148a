#include "device/cuda_upload.h"

#include <algorithm>
#include <cstring>

namespace indexcache {

CudaUploader::CudaUploader(CudaStream& stream, ThreadPool& pool) : stream_(stream), pool_(pool) {}

CudaUploader::~CudaUploader() {
  for (Piece& piece : pieces_) {
    try {
      piece.taken.wait();
    } catch (...) {  // the GPU is lost: what comes next will say so
    }
  }
}

void CudaUploader::copy(uint8_t* to, const uint8_t* from, size_t num_bytes) {
  while (num_bytes > 0) {
    if (used_ == kPieceBytes) {
      next_ = (next_ + 1) % pieces_.size();
      used_ = 0;
    }
    Piece& piece = pieces_[next_];
    if (used_ == 0) piece.taken.wait();
    const size_t count = std::min(num_bytes, kPieceBytes - used_);
    // Pages of a mapped file are read by whoever touches them first.
    constexpr size_t kItemBytes = 1 << 20;
    uint8_t* staged = piece.memory.data() + used_;
    pool_.parallel_for(static_cast<int64_t>((count + kItemBytes - 1) / kItemBytes),
                       [&](int64_t item, int) {
                         const size_t at = static_cast<size_t>(item) * kItemBytes;
                         std::memcpy(staged + at, from + at, std::min(kItemBytes, count - at));
                       });
    stream_.copy_in(to, staged, count);
    piece.taken.record(stream_);
    used_ += count;
    to += count;
    from += count;
    num_bytes -= count;
  }
}

}  // namespace indexcache
