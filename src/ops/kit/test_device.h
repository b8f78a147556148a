// Runs an op of a test on a GPU: its operands are copied there, its outputs back.
//
// The test of an op says what its operands are, in a function that translates each pointer:
//
//   RmsNormArgs to_device(DeviceOperands& device, RmsNormArgs args) {
//     device.rows(args.x, args.num_rows, args.row_elements, args.ldx);
//     ...
//
// Operands that overlap on the host (an op in place, heads as slices of one matrix) overlap in the
// same way on the GPU. Each stretch of memory is an allocation of its own, so that the emulation,
// or compute-sanitizer, sees an access beyond it. All of it is copied back: what must not change is
// the test's to check.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "device/gpus.h"
#include "ops/kit/exec.h"
#include "ops/kit/paged.h"

namespace indexcache {

#ifdef INDEXCACHE_CUDA_EMULATION
inline constexpr bool kCudaIsEmulated = true;
#else
inline constexpr bool kCudaIsEmulated = false;
#endif

// Whether this machine can run on a device; says once why not.
inline bool can_run(Device device) {
  if (device == Device::kCpu) return true;
  static const std::string why = cuda_unavailable_reason();
  static const bool said = [] {
    if (!why.empty()) std::printf("skipped on a GPU: %s\n", why.c_str());
    return true;
  }();
  (void)said;
  return why.empty();
}

class DeviceOperands {
 public:
  explicit DeviceOperands(CudaStream& stream) : stream_(stream) {}

  // `count` elements at `pointer`, which is to become an address on the GPU.
  template <class T>
  void elements(T*& pointer, int64_t count) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
    if (pointer == nullptr || count == 0) {
      pointer = nullptr;
      return;
    }
    const uintptr_t end = begin + static_cast<uintptr_t>(count) * sizeof(T);
    if (stage_ == Stage::kCollect) {
      stretches_.push_back({begin, end, !std::is_const_v<T>, {}});
    } else {
      const Stretch& stretch = find(begin);
      pointer =
          reinterpret_cast<T*>(stretch.memory.data() + stretch.offset + (begin - stretch.begin));
    }
  }
  template <class T>
  void rows(T*& pointer, int64_t num_rows, int64_t row_elements, int64_t stride) {
    elements(pointer, num_rows == 0 ? 0 : (num_rows - 1) * stride + row_elements);
  }
  // A pool of which the host has `num_bytes`.
  void pool(PagedRows& rows, int64_t num_bytes) { elements(rows.base, num_bytes); }

  // The runs, with their page tables.
  const SeqSpan* seqs(std::span<const SeqSpan> seqs) {
    std::vector<SeqSpan> translated(seqs.begin(), seqs.end());
    for (SeqSpan& seq : translated) {
      elements(seq.pages, (seq.first_position + seq.num_tokens + kPageTokens - 1) / kPageTokens);
    }
    return upload(translated);
  }

  // Translated structs that the host reads, for as long as this object lives.
  template <class T>
  std::span<const T> keep(std::vector<T> values) {
    auto kept = std::make_shared<std::vector<T>>(std::move(values));
    kept_.push_back(kept);
    return *kept;
  }

  // What exists on the GPU only.
  template <class T>
  const T* upload(const std::vector<T>& values) {
    if (stage_ == Stage::kCollect || values.empty()) return nullptr;
    uploads_.emplace_back(values.size() * sizeof(T));
    stream_.copy_in(uploads_.back().data(), values.data(), values.size() * sizeof(T));
    stream_.wait();
    return reinterpret_cast<const T*>(uploads_.back().data());
  }

  void allocate() {
    std::sort(stretches_.begin(), stretches_.end(),
              [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
    std::vector<Stretch> merged;
    for (Stretch& stretch : stretches_) {
      if (!merged.empty() && stretch.begin < merged.back().end) {
        merged.back().end = std::max(merged.back().end, stretch.end);
        merged.back().written |= stretch.written;
      } else {
        merged.push_back(std::move(stretch));
      }
    }
    stretches_ = std::move(merged);
    for (Stretch& stretch : stretches_) {
      // As far off alignment as on the host, for operands that may be unaligned.
      stretch.offset = stretch.begin % 16;
      stretch.memory = CudaMemory(stretch.offset + stretch.end - stretch.begin);
      stream_.copy_in(stretch.memory.data() + stretch.offset,
                      reinterpret_cast<const void*>(stretch.begin), stretch.end - stretch.begin);
    }
    stage_ = Stage::kTranslate;
  }

  void copy_back() {
    for (Stretch& stretch : stretches_) {
      if (!stretch.written) continue;
      stream_.copy_out(reinterpret_cast<void*>(stretch.begin),
                       stretch.memory.data() + stretch.offset, stretch.end - stretch.begin);
    }
  }

 private:
  enum class Stage { kCollect, kTranslate };
  struct Stretch {
    uintptr_t begin, end;
    bool written;
    CudaMemory memory;
    uintptr_t offset = 0;
  };

  const Stretch& find(uintptr_t begin) const {
    auto after = std::upper_bound(stretches_.begin(), stretches_.end(), begin,
                                  [](uintptr_t at, const Stretch& s) { return at < s.begin; });
    return *(after - 1);
  }

  CudaStream& stream_;
  Stage stage_ = Stage::kCollect;
  std::vector<Stretch> stretches_;
  std::vector<CudaMemory> uploads_;
  std::vector<std::shared_ptr<void>> kept_;
};

// Runs an op on operands of the host.
template <class Args>
void run_on(Exec& exec, void (*op)(Exec&, const Args&), const Args& args) {
  if (exec.device == Device::kCpu) {
    op(exec, args);
    return;
  }
  DeviceOperands operands(exec.cuda());
  to_device(operands, args);
  operands.allocate();
  op(exec, to_device(operands, args));
  operands.copy_back();
  exec.wait();
}

// The same with one implementation, by name.
template <class Args>
void run_on(Device device, void (*op)(Exec&, const Args&), const char* op_name,
            const std::string& impl, const Args& args, int num_threads) {
  Exec exec(num_threads, device);
  exec.forced[op_name] = impl;
  run_on(exec, op, args);
}

}  // namespace indexcache
