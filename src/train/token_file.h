// Training data as the trainer reads it: token ids, the loss weight of each and where documents
// begin, in one file that is mapped, not read.
//
// Layout, little-endian; every part begins at a multiple of 8 bytes:
//   "ICTOKENS", u32 version, u32 bytes per token (2 or 4)
//   tokens   [num_tokens]
//   weights  u8 [num_tokens]         of the token as a target; 0: not trained on
//   documents u64 [num_documents + 1] first token of each, then num_tokens
//   settings JSON                    made from what, how: hashes of tokenizer and inputs
//   u64 num_tokens, u64 num_documents, u64 bytes of settings, u64 vocab_size
// The counts stand at the end because the file is written in one pass.
//
// Errors: a file that is not exactly this, to the byte, or that has ids of vocab_size or more.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/atomic_file.h"
#include "base/mapped_file.h"

namespace indexcache {

class TokenFile {
 public:
  static TokenFile open(const std::string& path);

  uint64_t num_tokens() const { return weights_.size(); }
  uint64_t num_documents() const { return documents_.size() - 1; }
  uint64_t vocab_size() const { return vocab_size_; }

  // The file holds one of the two, by vocab_size (up to 65536: 16 bits); the other span is empty.
  std::span<const uint16_t> tokens() const { return tokens16_; }
  std::span<const uint32_t> tokens32() const { return tokens32_; }
  int32_t token(uint64_t i) const {
    return static_cast<int32_t>(tokens32_.empty() ? tokens16_[i] : tokens32_[i]);
  }
  std::span<const uint8_t> weights() const { return weights_; }
  // [num_documents + 1]: document d is tokens documents()[d] to documents()[d + 1].
  std::span<const uint64_t> documents() const { return documents_; }

  std::string_view settings() const { return settings_; }
  const std::string& path() const { return file_.path(); }

 private:
  MappedFile file_;
  std::span<const uint16_t> tokens16_;
  std::span<const uint32_t> tokens32_;
  std::span<const uint8_t> weights_;
  std::span<const uint64_t> documents_;
  std::string_view settings_;
  uint64_t vocab_size_ = 0;
};

// Memory: 8 bytes a document and 16 a stretch of equal weights. The file appears at finish().
class TokenFileWriter {
 public:
  TokenFileWriter(const std::string& path, uint64_t vocab_size);

  // One document; spans of equal length, not empty, ids below vocab_size.
  void add(std::span<const int32_t> tokens, std::span<const uint8_t> weights);
  uint64_t num_tokens() const { return num_tokens_; }
  uint64_t num_documents() const { return documents_.size(); }

  void finish(std::string_view settings);

 private:
  struct Run {
    uint64_t length;
    uint8_t weight;
  };
  void pad(uint64_t bytes_written);

  AtomicFile file_;
  uint64_t vocab_size_;
  uint64_t num_tokens_ = 0;
  std::vector<uint64_t> documents_;
  std::vector<Run> runs_;
};

}  // namespace indexcache
