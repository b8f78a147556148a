// Reading the safetensors format: u64 little-endian N, N bytes of JSON header, tensor data.
//
//   header  {"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets": [begin,
//   end]}, ...}
//
// Every rule of the format's reference reader is checked before any tensor is handed out: sizes
// with 64-bit checked arithmetic, data without hole or overlap, and ending exactly where the file
// ends. JSON whitespace around the header is read (the reference does), never written. Repeated
// names, nesting and fields other than the three are errors. Values are not looked at: see
// nonfinite.h.
//
// Errors carry the reference's word: HeaderTooSmall, HeaderTooLarge, InvalidHeaderLength,
// InvalidHeaderDeserialization, InvalidOffset, ValidationOverflow, TensorInvalidInfo,
// MetadataIncompleteBuffer. A file of another kind is named.
//
// Source: safetensors README ("Format") and safetensors/src/tensor.rs.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>

#include "tensor/tensor.h"

namespace indexcache {

// Ordered by name. A map, because pointers to its elements hold while a checkpoint grows and its
// lookups cannot be made slow by chosen names.
using TensorMap = std::map<std::string, TensorView, std::less<>>;
using Metadata = std::map<std::string, std::string, std::less<>>;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr size_t kMaxTensors = 1'000'000;  // ours: eight times the largest published checkpoint
constexpr size_t kMaxMetadataEntries = 100'000;
constexpr size_t kMaxRank = 64;

struct SafetensorsFile {
  TensorMap tensors;  // views into the bytes that were parsed
  Metadata metadata;
  uint64_t data_bytes = 0;
};

// `where` (a path) begins every error message. The views live as long as `bytes`.
SafetensorsFile parse_safetensors(std::span<const uint8_t> bytes, const std::string& where);

std::string supported_dtypes();  // "BOOL, U8, ...", for messages

}  // namespace indexcache
