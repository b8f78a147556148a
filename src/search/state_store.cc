#include "search/state_store.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "base/error.h"

namespace indexcache {

StoredBytes::~StoredBytes() {
  if (store_ != nullptr) store_->give_back(*this);
}

StoredBytes::StoredBytes(StoredBytes&& other) noexcept { *this = std::move(other); }

StoredBytes& StoredBytes::operator=(StoredBytes&& other) noexcept {
  if (this == &other) return *this;
  if (store_ != nullptr) store_->give_back(*this);
  store_ = std::exchange(other.store_, nullptr);
  memory_ = std::move(other.memory_);
  place_ = other.place_;
  num_bytes_ = std::exchange(other.num_bytes_, 0);
  return *this;
}

void StoredBytes::write(size_t offset, const void* source, size_t num_bytes) {
  CHECK(store_ != nullptr);
  CHECK_LE(offset + num_bytes, num_bytes_);
  if (store_->fd_ < 0) {
    std::memcpy(memory_.data() + offset, source, num_bytes);
    return;
  }
  const char* from = static_cast<const char*>(source);
  for (size_t done = 0; done < num_bytes;) {
    const ssize_t n = pwrite(store_->fd_, from + done, num_bytes - done,
                             static_cast<off_t>(place_ + offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      fail("{}: cannot write kept states: {}; --cache-bytes makes them fewer",
           printable(store_->folder_), strerror(errno));
    }
    done += static_cast<size_t>(n);
  }
}

void StoredBytes::read(size_t offset, void* target, size_t num_bytes) const {
  CHECK(store_ != nullptr);
  CHECK_LE(offset + num_bytes, num_bytes_);
  if (store_->fd_ < 0) {
    std::memcpy(target, memory_.data() + offset, num_bytes);
    return;
  }
  char* to = static_cast<char*>(target);
  for (size_t done = 0; done < num_bytes;) {
    const ssize_t n =
        pread(store_->fd_, to + done, num_bytes - done, static_cast<off_t>(place_ + offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      fail("{}: cannot read kept states: {}", printable(store_->folder_),
           n < 0 ? strerror(errno) : "the file ends early");
    }
    done += static_cast<size_t>(n);
  }
}

StateStore::StateStore(uint64_t max_bytes, const std::string& folder)
    : max_bytes_(max_bytes), folder_(folder) {
  if (folder.empty()) return;
  std::string path = folder + "/indexcache-states.XXXXXX";
  fd_ = mkostemp(path.data(), O_CLOEXEC);
  if (fd_ < 0) fail("{}: cannot create a file in it: {}", printable(folder), strerror(errno));
  unlink(path.c_str());
}

StateStore::~StateStore() {
  CHECK_EQ(used_bytes_, 0u);
  if (fd_ >= 0) close(fd_);
}

std::optional<StoredBytes> StateStore::take(size_t num_bytes, bool must) {
  if (!must && (num_bytes > max_bytes_ || used_bytes_ > max_bytes_ - num_bytes))
    return std::nullopt;
  StoredBytes bytes;
  if (fd_ < 0) {
    bytes.memory_ = HostMemory(num_bytes);
  } else if (auto& places = free_places_[num_bytes]; !places.empty()) {
    bytes.place_ = places.back();
    places.pop_back();
  } else {
    bytes.place_ = file_end_;
    file_end_ += num_bytes;
  }
  bytes.store_ = this;
  bytes.num_bytes_ = num_bytes;
  used_bytes_ += num_bytes;
  return bytes;
}

void StateStore::give_back(StoredBytes& bytes) {
  used_bytes_ -= bytes.num_bytes_;
  if (fd_ >= 0) free_places_[bytes.num_bytes_].push_back(bytes.place_);
}

}  // namespace indexcache
