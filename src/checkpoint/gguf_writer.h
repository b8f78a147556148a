// Writing GGUF version 3, the container that llama.cpp and its relatives read. What keys and
// tensors a model needs is not known here.
//
//   "GGUF", u32 version, u64 tensors, u64 entries
//   entries  {string key, u32 type, value}; a string is u64 length and bytes, an array u32 type,
//            u64 length and values
//   tensors  {string name, u32 rank, u64 dims (fastest first), u32 type, u64 offset}
//   data     at a multiple of 32, each tensor padded to one
//
// All numbers are little-endian. The file appears whole or not at all, and never in place of
// another.
//
// Errors: something at the path, a value that the tensor's type cannot hold (with the tensor's
// name), any failed write. Names repeated or too long, and a source that gives more or fewer rows,
// are bugs of the caller (CHECK).
//
// Source: ggml's docs/gguf.md.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "checkpoint/ggml_types.h"
#include "tensor/tensor.h"

namespace indexcache {

using GgufValue = std::variant<uint32_t, int32_t, float, bool, std::string, std::vector<int32_t>,
                               std::vector<float>, std::vector<bool>, std::vector<std::string>>;
using GgufMetadata = std::vector<std::pair<std::string, GgufValue>>;

struct GgufTensor {
  std::string name;
  GgmlType type;
  Shape shape;  // slowest first, as everywhere in this program; the file has them reversed

  int64_t row_elements() const { return shape.back(); }
  uint64_t num_bytes() const;
};

constexpr uint64_t kGgufAlignment = 32;

// Gives the rows of one tensor, in order, one by one. Called once a tensor, in the order of the
// file.
using RowSink = std::function<void(std::span<const float>)>;
using RowSource = std::function<void(const GgufTensor&, const RowSink&)>;

// All bytes before the tensor data.
std::string gguf_header(const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors);
uint64_t gguf_file_bytes(const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors);

void write_gguf(const std::string& path, const GgufMetadata& metadata,
                const std::vector<GgufTensor>& tensors, const RowSource& source);

}  // namespace indexcache
