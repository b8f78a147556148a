// Writing safetensors: one file, or a folder of shards with an index, in the two layouts that the
// model hubs use.
//
// The bytes depend on the arguments alone: tensors ordered by element size (largest first) and then
// by name, so that every tensor is aligned to its elements; the header begins with '{' and is
// padded with spaces until the data starts at a multiple of 8. Each file appears whole or not at
// all (base/atomic_file.h).
//
// Errors: names that are not UTF-8, "__metadata__", repeated or too many; a header over the
// format's limit; any failed write. A source that gives more or fewer bytes than the spec asks for
// is a bug of the caller (CHECK).
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/safetensors.h"

namespace indexcache {

struct TensorSpec {
  std::string name;
  DType dtype;
  Shape shape;

  uint64_t num_bytes() const;
};

// Gives the bytes of one tensor, in any number of pieces, to the sink. Called once a tensor, in the
// order of the file.
using ByteSink = std::function<void(std::span<const uint8_t>)>;
using TensorSource = std::function<void(const TensorSpec&, const ByteSink&)>;

// The bytes before the tensor data. Sorts `specs` into the order of the file.
std::string safetensors_header(std::vector<TensorSpec>* specs, const Metadata& metadata,
                               const std::string& where);

void write_safetensors(const std::string& path,
                       const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const Metadata& metadata = {});

// The same with one tensor in memory at a time.
void stream_safetensors(const std::string& path, std::vector<TensorSpec> specs,
                        const Metadata& metadata, const TensorSource& source);

// model.safetensors.index.json: the shard (a plain file name) of each tensor, and the bytes of all.
void write_shard_index(const std::string& path,
                       const std::map<std::string, std::string>& weight_map, uint64_t total_bytes);

// Fills shards in the order of `specs`, each up to `max_shard_bytes` of tensor data (a larger
// tensor gets a shard of its own). One shard is written as model.safetensors; more as
// model-00001-of-000NN.safetensors and, last, model.safetensors.index.json. Returns the names of
// the files. A folder that holds a checkpoint of the other layout is an error, because a reader
// could not tell which one is meant.
std::vector<std::string> write_sharded_safetensors(const std::string& folder,
                                                   std::vector<TensorSpec> specs,
                                                   const Metadata& metadata,
                                                   uint64_t max_shard_bytes,
                                                   const TensorSource& source);

}  // namespace indexcache
