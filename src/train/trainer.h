// A training run: one of the paper's stages over a model, with everything that makes a long job
// bearable.
//
//   pretrain  dense attention, language loss; for models made from nothing
//   warmup    dense attention, only the indexers learn
//   sparse    attention over the selection: the language loss trains the backbone, the indexer loss
//             over the selected tokens trains the indexers
//
// Sources: DeepSeek-V3.2 report section 2.1.1 (stages), IndexCache section 3.2 (multi-layer loss).
//
// A run owns its folder: `log.csv`, `loss.html`, `steps/<step>/` (the newest two checkpoints of the
// run) and, at the end, `model/` in the hub's layout, or `indexers.safetensors` where the backbone
// is frozen. A killed run goes on from its last checkpoint, and sees the same batches as an
// uninterrupted one.
#pragma once

#include "train/network.h"

//
#include <string>
#include <vector>

namespace indexcache {

enum class Stage { kPretrain, kWarmup, kSparse };

struct SequencePhase {
  int64_t row_tokens;
  int64_t steps;  // 0 in the last phase: the rest
};

struct TrainOptions {
  Stage stage = Stage::kPretrain;
  std::string model;      // folder to start from; empty: a new network of `config`
  std::string config;     // config.json of a new network
  std::string tokenizer;  // folder whose tokenizer files go into model/; empty: `model`'s
  std::string out;
  std::vector<std::pair<std::string, double>> data;           // token files and their shares
  std::vector<std::pair<std::string, std::string>> held_out;  // name, token file
  std::string plan;         // override; empty: what the config says
  bool multi_layer = true;  // false: per-layer indexer loss
  bool freeze_backbone = false;

  int64_t steps = 1000;
  std::vector<SequencePhase> sequence = {{2048, 0}};
  int64_t batch_tokens = 65536;
  int64_t micro_tokens = 32768;
  double lr = 1.5e-3;
  double indexer_lr = 1e-3;
  int64_t lr_warmup_steps = 100;
  double lr_final = 0.05;  // of lr; cosine in between
  double weight_decay = 0.1;
  double beta2 = 0.95;
  double clip = 1.0;
  double expert_balance_rate = 1e-3;
  uint64_t seed = 1;

  std::string device = "cpu";  // or "cuda", "cuda:1"
  bool bf16 = false;
  bool checkpoint_activations = false;
  DType save_dtype = DType::kBF16;
  uint64_t max_shard_bytes = 5'000'000'000;
  int64_t save_every = 500;
  int64_t held_out_every = 250;
  int64_t held_out_tokens = 262144;
  int64_t log_every = 10;
  double stop_after_seconds = 0;  // 0: never; else save and stop, to be resumed
  bool resume = false;
};

enum class TrainResult { kDone, kStopped };
TrainResult train(const TrainOptions& options);

// Of a step, 0-based.
double learning_rate_factor(const TrainOptions& options, int64_t step);
int64_t row_tokens_of(const TrainOptions& options, int64_t step);

}  // namespace indexcache
