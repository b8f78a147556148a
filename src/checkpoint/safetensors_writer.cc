#include "checkpoint/safetensors_writer.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "base/atomic_file.h"
#include "base/checked.h"
#include "base/error.h"
#include "base/json.h"

namespace indexcache {

namespace {

std::string quoted(const std::string& text, const std::string& where) {
  try {
    return Json(text).dump();
  } catch (const Json::exception&) {
    fail("{}: the name or metadata \"{}\" is not UTF-8", where, printable(text));
  }
}

// Comes before its user in a JSON object.
class Comma {
 public:
  const char* operator()() { return std::exchange(first_, false) ? "" : ","; }

 private:
  bool first_ = true;
};

void check_specs(const std::vector<TensorSpec>& specs, const std::string& where) {
  if (specs.size() > kMaxTensors) {
    fail("{}: {} tensors, expected at most {}", where, specs.size(), kMaxTensors);
  }
  std::vector<std::string_view> names;
  names.reserve(specs.size());
  for (const TensorSpec& spec : specs) {
    if (spec.name == "__metadata__") fail("{}: a tensor cannot be named \"__metadata__\"", where);
    names.push_back(spec.name);
  }
  std::sort(names.begin(), names.end());
  const auto repeated = std::adjacent_find(names.begin(), names.end());
  if (repeated != names.end()) {
    fail("{}: two tensors are named \"{}\"", where, printable(*repeated));
  }
}

}  // namespace

uint64_t TensorSpec::num_bytes() const {
  std::optional<uint64_t> size = static_cast<uint64_t>(dtype_bytes(dtype));
  for (const int64_t dim : shape) {
    CHECK_GE(dim, 0);
    size = checked_mul(*size, static_cast<uint64_t>(dim));
    if (!size) fail("tensor \"{}\": shape {} is too large", printable(name), shape_string(shape));
  }
  return *size;
}

std::string safetensors_header(std::vector<TensorSpec>* specs, const Metadata& metadata,
                               const std::string& where) {
  check_specs(*specs, where);
  std::sort(specs->begin(), specs->end(), [](const TensorSpec& a, const TensorSpec& b) {
    const int a_bytes = dtype_bytes(a.dtype), b_bytes = dtype_bytes(b.dtype);
    return a_bytes != b_bytes ? a_bytes > b_bytes : a.name < b.name;
  });

  // The eight bytes of the length are filled in at the end.
  std::string out(8, '\0');
  out += '{';
  Comma comma;
  if (!metadata.empty()) {
    out += fmt::format("{}\"__metadata__\":{{", comma());
    Comma inner;
    for (const auto& [key, value] : metadata) {
      out += fmt::format("{}{}:{}", inner(), quoted(key, where), quoted(value, where));
    }
    out += '}';
  }
  uint64_t begin = 0;
  for (const TensorSpec& spec : *specs) {
    const std::optional<uint64_t> end = checked_add(begin, spec.num_bytes());
    if (!end) fail("{}: the tensors together are too large", where);
    out += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}", comma(),
                       quoted(spec.name, where), dtype_name(spec.dtype), shape_string(spec.shape),
                       begin, *end);
    begin = *end;
  }
  out += '}';
  out.resize(static_cast<size_t>(round_up(static_cast<int64_t>(out.size()), 8)), ' ');
  const uint64_t header_bytes = out.size() - 8;
  if (header_bytes > kMaxHeaderBytes) {
    fail("{}: the header would have {} bytes, expected at most {}", where, header_bytes,
         kMaxHeaderBytes);
  }
  for (size_t i = 0; i < 8; ++i) out[i] = static_cast<char>((header_bytes >> (8 * i)) & 0xFF);
  return out;
}

void stream_safetensors(const std::string& path, std::vector<TensorSpec> specs,
                        const Metadata& metadata, const TensorSource& source) {
  const std::string header = safetensors_header(&specs, metadata, printable(path, 400));
  AtomicFile file(path);
  file.write(header);
  for (const TensorSpec& spec : specs) {
    uint64_t written = 0;
    source(spec, [&](std::span<const uint8_t> bytes) {
      written += bytes.size();
      CHECK_LE(written, spec.num_bytes());
      file.write(bytes.data(), bytes.size());
    });
    CHECK_EQ(written, spec.num_bytes());
  }
  file.commit();
}

void write_safetensors(const std::string& path,
                       const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const Metadata& metadata) {
  std::vector<TensorSpec> specs;
  std::unordered_map<std::string_view, const uint8_t*> data;
  for (const auto& [name, view] : tensors) {
    specs.push_back({name, view.dtype, view.shape});
    CHECK(view.present() || view.num_bytes() == 0);
    data[name] = view.data;
  }
  stream_safetensors(path, std::move(specs), metadata,
                     [&](const TensorSpec& spec, const ByteSink& sink) {
                       if (spec.num_bytes() > 0) sink({data.at(spec.name), spec.num_bytes()});
                     });
}

void write_shard_index(const std::string& path,
                       const std::map<std::string, std::string>& weight_map, uint64_t total_bytes) {
  std::string text = fmt::format(
      "{{\n  \"metadata\": {{\n    \"total_size\": {}\n  }},\n  \"weight_map\": {{", total_bytes);
  const std::string where = printable(path, 400);
  Comma comma;
  for (const auto& [name, file] : weight_map)
    text += fmt::format("{}\n    {}: \"{}\"", comma(), quoted(name, where), file);
  text += "\n  }\n}\n";
  write_text_file(path, text);
}

std::vector<std::string> write_sharded_safetensors(const std::string& folder,
                                                   std::vector<TensorSpec> specs,
                                                   const Metadata& metadata,
                                                   uint64_t max_shard_bytes,
                                                   const TensorSource& source) {
  const std::filesystem::path root(folder);
  const std::string single = "model.safetensors", index = "model.safetensors.index.json";
  check_specs(specs, printable(folder, 400));

  uint64_t total_bytes = 0, shard_bytes = 0;
  std::vector<std::vector<TensorSpec>> shards(1);
  for (TensorSpec& spec : specs) {
    const uint64_t num_bytes = spec.num_bytes();
    const auto with_this = checked_add(shard_bytes, num_bytes);
    if (!shards.back().empty() && (!with_this || *with_this > max_shard_bytes)) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shard_bytes += num_bytes;
    total_bytes += num_bytes;
    shards.back().push_back(std::move(spec));
  }

  const std::string other = shards.size() == 1 ? index : single;
  if (std::filesystem::exists(root / other)) {
    fail("{}: already holds {}, and this checkpoint would be written as {}; choose an empty folder",
         printable(folder, 400), other, shards.size() == 1 ? single : index);
  }
  if (shards.size() == 1) {
    stream_safetensors((root / single).string(), std::move(shards[0]), metadata, source);
    return {single};
  }

  std::vector<std::string> files;
  std::map<std::string, std::string> weight_map;
  for (size_t i = 0; i < shards.size(); ++i) {
    files.push_back(fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size()));
    for (const TensorSpec& spec : shards[i]) weight_map[spec.name] = files.back();
    stream_safetensors((root / files.back()).string(), std::move(shards[i]), metadata, source);
  }
  write_shard_index((root / index).string(), weight_map, total_bytes);
  files.push_back(index);
  return files;
}

}  // namespace indexcache
