// Copies large host memory, mapped files among it, to the GPU: threads read the next piece into
// pinned memory while the GPU takes the last one.
#pragma once

#include <array>

#include "device/cuda.h"
#include "device/thread_pool.h"

namespace indexcache {

class CudaUploader {
 public:
  CudaUploader(CudaStream& stream, ThreadPool& pool);
  ~CudaUploader();  // waits for the copies

  // `from` may change afterwards.
  void copy(uint8_t* to, const uint8_t* from, size_t num_bytes);

 private:
  static constexpr size_t kPieceBytes = 32 << 20;
  struct Piece {
    PinnedMemory memory{kPieceBytes};
    CudaEvent taken;
  };

  CudaStream& stream_;
  ThreadPool& pool_;
  std::array<Piece, 3> pieces_;
  size_t next_ = 0;  // among pieces_
  size_t used_ = 0;  // of that piece: small tensors share one
};

}  // namespace indexcache
