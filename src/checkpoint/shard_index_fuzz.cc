// Any text as model.safetensors.index.json: either an Error, or plain shard names and places that
// exist; and whatever this reader takes, the general JSON parser must take as well.
#include "base/error.h"
#include "base/json.h"
#include "checkpoint/shard_index.h"

using namespace indexcache;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  ShardIndex index;
  try {
    index = parse_shard_index(text, "fuzz");
  } catch (const Error&) {
    return 0;
  }
  for (const std::string& shard : index.shards) {
    CHECK(shard.find('/') == std::string::npos && shard.ends_with(".safetensors"));
  }
  Json document;
  try {
    document = parse_json(text, "fuzz");
  } catch (const Error& e) {
    // The keys and numbers beside weight_map are skipped, not kept: only there the document may be
    // stricter.
    const std::string message = e.what();
    CHECK(message.find("duplicate key") != std::string::npos ||
          message.find("out of range") != std::string::npos ||
          message.find("number overflow") != std::string::npos);
    return 0;
  }
  const Json& weight_map = document.at("weight_map");
  CHECK_EQ(weight_map.size(), index.weight_map.size());
  for (const auto& [name, shard] : weight_map.items()) {
    CHECK(index.shards.at(index.weight_map.at(name)) == shard.get<std::string>());
  }
  return 0;
}
