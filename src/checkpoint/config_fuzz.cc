// Bytes as a config.json. What is accepted must round-trip, have sizes within their bounds, and
// finite rope tables.
#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/error.h"
#include "base/log.h"
#include "checkpoint/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace indexcache;
  set_log_enabled(false);
  try {
    const ModelConfig config = parse_config(
        parse_json(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz"), "fuzz");
    CHECK_EQ(config.mlp_layer_types.size(), static_cast<size_t>(config.num_hidden_layers));
    CHECK_EQ(config.index_plan.num_layers(), config.num_hidden_layers);
    for (float speed : rope_inv_freq(config.rope, config.attention.qk_rope_head_dim)) {
      CHECK(std::isfinite(speed) && speed >= 0 && speed <= 1);
    }
    CHECK(std::isfinite(rope_cos_sin_scale(config.rope)) && rope_cos_sin_scale(config.rope) > 0);
    CHECK(std::isfinite(attention_scale(config)) && attention_scale(config) > 0);
    // Through text, as a generated checkpoint goes.
    const ModelConfig again =
        parse_config(parse_json(config_json(config).dump(), "again"), "again");
    CHECK(again == config);
  } catch (const Error&) {
  }
  return 0;
}
