// model.safetensors.index.json: which shard of a checkpoint holds which tensor.
//
//   {"metadata": {"total_size": N}, "weight_map": {tensor name: file name}}
//
// Shards are plain names of .safetensors files in the folder of the index: a name with '/', "..",
// or an absolute path is an error, because an index could otherwise make the engine read any file
// of the machine. `metadata` is not used: its total_size is wrong in many published checkpoints.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace indexcache {

constexpr size_t kMaxShards = 4096;

struct ShardIndex {
  std::vector<std::string> shards;                        // in order of first mention
  std::map<std::string, size_t, std::less<>> weight_map;  // tensor name to place in `shards`
};

// `where` (a path) begins every error message.
ShardIndex parse_shard_index(std::string_view text, const std::string& where);

}  // namespace indexcache
