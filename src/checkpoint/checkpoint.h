// A model's tensors by name, wherever they lie: one mapped model.safetensors, mapped shards with an
// index, or memory (synthetic weights in tests and benchmarks).
//
// open() takes a folder in one of the two hub layouts, model.safetensors or
// model.safetensors.index.json with its shards, or the path of a single .safetensors file. It reads
// headers only; weights come in as they are touched.
//
// A folder may not lead outside itself: a file that is a symbolic link must resolve inside the
// folder, or inside `blobs` of the same repository of a Hugging Face cache
// (models--ORG--NAME/snapshots/<revision>/). A file that the user names directly may be any link.
//
// Errors: no or both layouts (with what the folder holds), all missing shards, tensors that index
// and shards disagree about, a tensor in two shards, and every rule of safetensors.h. Tensors of a
// shard that the index does not name are left out with one warning: the index decides.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"
#include "checkpoint/safetensors.h"
#include "tensor/tensor.h"

namespace indexcache {

// Error for a link that leads out of `folder`, by the rule above; `folder` itself may have been
// reached through links.
void check_stays_inside(const std::string& folder, const std::string& file);

class Checkpoint {
 public:
  Checkpoint() = default;  // empty, for add()
  static Checkpoint open(const std::string& path);

  std::string path;          // as given to open(); name it in errors
  Metadata metadata;         // of the first file
  uint64_t total_bytes = 0;  // of all tensors

  const TensorView* find(
      std::string_view name) const;  // null if absent; holds until the checkpoint is destroyed
  const TensorMap& tensors() const { return tensors_; }
  std::vector<std::string> names() const;
  const std::string& file_of(
      const TensorView& view) const;  // for messages: the file that holds it, else `path`

  bool has_index() const { return has_index_; }  // shards with an index, not one file

  void add(std::string name, Tensor tensor);  // CHECK that the name is new

 private:
  static Checkpoint open_file(const std::string& file_path);
  static Checkpoint open_shards(const std::string& folder, const std::string& index_path);

  TensorMap tensors_;
  std::vector<MappedFile> files_;
  std::vector<Tensor> owned_;
  bool has_index_ = false;
};

}  // namespace indexcache
