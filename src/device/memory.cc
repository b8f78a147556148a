#include "device/memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <utility>

#include "base/error.h"
#include "base/units.h"

namespace indexcache {

HostMemory::HostMemory(size_t num_bytes) : num_bytes_(num_bytes) {
  if (num_bytes == 0) return;
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED)
    fail("cannot reserve {} of memory: {}", format_bytes(num_bytes), strerror(errno));
  // Huge pages where they fit: gathering rows of a large cache otherwise misses the TLB on almost
  // every row.
  if (num_bytes >= (4u << 20)) madvise(data, num_bytes, MADV_HUGEPAGE);
  data_ = static_cast<uint8_t*>(data);
}

HostMemory::~HostMemory() {
  if (data_ != nullptr) munmap(data_, num_bytes_);
}

HostMemory::HostMemory(HostMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}

HostMemory& HostMemory::operator=(HostMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

}  // namespace indexcache
