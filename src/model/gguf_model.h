// A DSA model as llama.cpp reads it from a GGUF file: architecture `glm-dsa` with the index plan as
// `attention.indexer.types`, or `deepseek32`, which has no sharing.
//
// Type rule: matrices get the type that is asked for; norms, biases, routers and the indexers'
// weights_proj are f32, as llama.cpp's own converter writes them; a matrix whose rows are no
// multiple of 32 becomes f16 where q8_0 was asked for. kv_b_proj is cut in two: per head its key
// half transposed (attn_k_b) and its value half (attn_v_b). The experts of a layer become one
// tensor. MTP layers and the indexers of shared layers are left out.
//
// What llama.cpp cannot be told, or would compute otherwise, is an Error that names the field: a
// plan with shared layers for deepseek32, the other RoPE layout of the indexer, an index_head_dim
// that is no power of two from 64 on, sparse layers before dense ones or without a shared expert,
// YaRN with other betas or unequal mscales.
//
// Source: llama.cpp 34af94cd9 (src/llama-arch.cpp, src/llama-model.cpp, src/models/glm-dsa.cpp,
// src/models/deepseek32.cpp).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "checkpoint/binder.h"
#include "checkpoint/config.h"
#include "checkpoint/gguf_writer.h"

namespace indexcache {

// One tensor of the file and the tensors of the checkpoint that it is made of.
struct GgufPart {
  enum class Layout { kRows, kKeysTransposed, kValues };
  GgufTensor tensor;
  Layout layout = Layout::kRows;
  std::vector<ScaledView> sources;  // views into the checkpoint
  std::vector<std::vector<float>> scales;
};

struct GgufModel {
  GgufMetadata metadata;  // without the tokenizer
  std::vector<GgufPart> parts;
  AttentionConfig attention;
  int num_f16_instead = 0;  // matrices that could not be q8_0

  std::vector<GgufTensor> tensors() const;
};

const char* gguf_architecture(ModelType type);  // "glm-dsa"

// Everything but the data; reads headers and scales only. The checkpoint must outlive the result.
// `name` becomes general.name.
GgufModel gguf_model(const Checkpoint& checkpoint, const ModelConfig& config, const IndexPlan& plan,
                     GgmlType type, const std::string& name);

// Adds `tokenizer`'s entries to the metadata and writes the file, one tensor's rows at a time.
// `progress` is called with the bytes of tensor data done so far, and may throw to end it.
void write_gguf_model(const GgufModel& model, const GgufMetadata& tokenizer,
                      const std::string& path,
                      const std::function<void(uint64_t bytes_done)>& progress = {});

// What llama.cpp and ik_llama.cpp do with such a file that a user should know.
std::vector<std::string> gguf_hazards(const ModelConfig& config, const IndexPlan& plan);

}  // namespace indexcache
