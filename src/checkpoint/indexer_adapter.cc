#include "checkpoint/indexer_adapter.h"

#include "base/error.h"

namespace indexcache {

namespace {
constexpr const char* kFormat = "indexcache-indexers";
constexpr const char* kVersion = "1";
}  // namespace

IndexerAdapter open_indexer_adapter(const std::string& path) {
  IndexerAdapter adapter;
  adapter.tensors = Checkpoint::open(path);
  const auto field = [&](const char* key) {
    const auto found = adapter.tensors.metadata.find(key);
    if (found == adapter.tensors.metadata.end()) {
      fail("{}: not a file of trained indexers: its metadata has no \"{}\"", printable(path), key);
    }
    return found->second;
  };
  if (const std::string format = field("format"); format != kFormat) {
    fail("{}: not a file of trained indexers: format is \"{}\", expected \"{}\"", printable(path),
         printable(format), kFormat);
  }
  if (const std::string version = field("version"); version != kVersion) {
    fail("{}: version is \"{}\", expected \"{}\"", printable(path), printable(version), kVersion);
  }
  adapter.plan = field("plan");
  adapter.model_fingerprint = field("model_fingerprint");
  adapter.how = field("how");
  return adapter;
}

IndexPlan adapter_plan(const IndexerAdapter& adapter, int num_layers) {
  return plan_from_string(adapter.plan, num_layers,
                          fmt::format("{}: \"plan\"", printable(adapter.tensors.path, 400)));
}

void write_indexer_adapter(const std::string& path, const IndexerAdapter& adapter,
                           std::vector<TensorSpec> specs, const TensorSource& source) {
  stream_safetensors(path, std::move(specs),
                     {{"format", kFormat},
                      {"version", kVersion},
                      {"plan", adapter.plan},
                      {"model_fingerprint", adapter.model_fingerprint},
                      {"how", adapter.how}},
                     source);
}

}  // namespace indexcache
