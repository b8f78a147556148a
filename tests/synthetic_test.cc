// Weights of SyntheticKind::kSimilar select as their header says: neighbouring layers and
// neighbouring tokens much alike, distant ones less.
#include "model/synthetic.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "checkpoint/config.h"
#include "engine/engine.h"
#include "model/shapes.h"

namespace indexcache {
namespace {

constexpr int kLayers = 16;
constexpr int64_t kContext = 2048, kTopK = 96;

// A third of the depth of the 30B shape, and narrow.
ModelConfig deep_and_narrow() {
  ModelConfig config = named_shape("tiny");
  config.num_hidden_layers = kLayers;
  config.mlp_layer_types.assign(kLayers, MlpType::kDense);
  config.index_plan = all_full_plan(kLayers);
  config.intermediate_size = 64;
  config.vocab_size = 4096;
  config.indexer.index_topk = kTopK;
  config.attention.num_attention_heads = 2;
  return parse_config(config_json(config), "deep and narrow");
}

double overlap(const int32_t* a, const int32_t* b) {
  std::vector<int32_t> both;
  std::set_intersection(a, a + kTopK, b, b + kTopK, std::back_inserter(both));
  return static_cast<double>(both.size()) / kTopK;
}

TEST(Synthetic, SimilarLayersAndTokensSelectAlike) {
  const ModelConfig config = deep_and_narrow();
  const ModelSource source{
      config, synthetic_checkpoint(config, DType::kF32, 5, SyntheticKind::kSimilar), true};
  Engine engine(source, {.context = kContext, .batch_tokens = 512});
  std::map<int, std::vector<int32_t>> selections;  // of the last pass
  ForwardTap tap;
  tap.selection = [&](int layer, Selection selection) {
    selections[layer].assign(selection.positions.begin(), selection.positions.end());
  };
  SequenceCache sequence;
  prefill(engine, sequence, topical_tokens(kContext, config.vocab_size, 6), nullptr, {.tap = &tap});
  const auto between_layers = [&](int distance) {
    double sum = 0, count = 0;
    for (int layer = 0; layer + distance < kLayers; ++layer) {
      for (int64_t t = 0; t < 512; t += 7, ++count) {
        sum += overlap(&selections[layer][static_cast<size_t>(t * kTopK)],
                       &selections[layer + distance][static_cast<size_t>(t * kTopK)]);
      }
    }
    return sum / count;
  };
  double tokens = 0;
  for (size_t t = 0; t < 511; ++t)
    tokens += overlap(&selections[3][t * kTopK], &selections[3][(t + 1) * kTopK]) / 511;
  const double near = between_layers(1), far = between_layers(kLayers - 1);
  std::printf(
      "overlap of layers: %.3f of neighbours, %.3f at a distance of 6, %.3f of %d; of "
      "neighbouring tokens %.3f\n",
      near, between_layers(6), far, kLayers - 1, tokens);
  EXPECT_GT(near, 0.65);
  EXPECT_LT(near, 0.98);
  EXPECT_LT(far, near - 0.05);
  EXPECT_GT(tokens, 0.3);
}

TEST(Synthetic, TopicalTokensComeInRuns) {
  for (const int64_t vocab : {100, 256, 1000}) {
    const std::vector<int32_t> tokens = topical_tokens(20000, vocab, 9);
    int64_t changes = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      ASSERT_GE(tokens[i], 0);
      ASSERT_LT(tokens[i], vocab);
      changes += i > 0 && tokens[i] % kSyntheticTopics != tokens[i - 1] % kSyntheticTopics;
    }
    EXPECT_GT(changes, 20000 / 64 / 2);
    EXPECT_LT(changes, 20000 / 64 * 2);
  }
}

}  // namespace
}  // namespace indexcache
