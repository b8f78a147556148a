#include "checkpoint/shard_index.h"

#include "base/error.h"
#include "checkpoint/json_reader.h"
#include "checkpoint/safetensors.h"

namespace indexcache {

namespace {

bool is_plain_shard_name(std::string_view name) {
  return name.size() <= 255 && name.ends_with(".safetensors") && name.front() != '.' &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

void parse_weight_map(JsonReader* reader, const std::string& where, ShardIndex* index) {
  std::string tensor, shard;
  std::map<std::string, size_t, std::less<>> places;
  reader->begin_object();
  while (reader->next_key(&tensor)) {
    reader->string(&shard, "a file name");
    if (!is_plain_shard_name(shard)) {
      fail(
          "{}: weight_map: tensor \"{}\" is in \"{}\", expected the plain name of a .safetensors "
          "file in the same folder",
          where, printable(tensor), printable(shard));
    }
    const auto [place, is_new] = places.emplace(shard, index->shards.size());
    if (is_new) index->shards.push_back(shard);
    if (index->shards.size() > kMaxShards) {
      fail("{}: weight_map names more than {} files", where, kMaxShards);
    }
    const size_t count = index->weight_map.size();
    index->weight_map.emplace_hint(index->weight_map.end(), tensor, place->second);
    if (index->weight_map.size() == count) {
      fail("{}: weight_map: duplicate tensor \"{}\"", where, printable(tensor));
    }
    if (index->weight_map.size() > kMaxTensors) {
      fail("{}: weight_map has more than {} tensors", where, kMaxTensors);
    }
  }
}

}  // namespace

ShardIndex parse_shard_index(std::string_view text, const std::string& where_in) {
  const std::string where = printable(where_in, 400);
  JsonReader reader(text, fmt::format("{}: not valid JSON", where));
  ShardIndex index;
  bool seen = false;
  std::string key;
  reader.begin_object();
  while (reader.next_key(&key)) {
    if (key == "weight_map") {
      if (seen) reader.fail_here("duplicate key \"weight_map\"");
      seen = true;
      parse_weight_map(&reader, where, &index);
    } else {
      reader.skip_value();
    }
  }
  reader.end();
  if (!seen) fail("{}: key \"weight_map\" is missing", where);
  if (index.weight_map.empty()) fail("{}: weight_map is empty", where);
  return index;
}

}  // namespace indexcache
