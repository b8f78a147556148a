#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "checkpoint/foreign_file.h"
#include "checkpoint/problem_list.h"
#include "checkpoint/shard_index.h"

namespace indexcache {

namespace fs = std::filesystem;

namespace {

constexpr const char* kSingleName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";

std::string shown(const fs::path& path) { return printable(path.string(), 400); }

bool is_inside(const fs::path& file, const fs::path& folder) {
  return std::mismatch(folder.begin(), folder.end(), file.begin(), file.end()).first ==
         folder.end();
}

bool is_there(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error);
}

// What a folder without a checkpoint holds, with the kind of each file that is known not to be
// safetensors.
std::string describe_folder(const fs::path& folder) {
  constexpr size_t kMaxEntries = 10'000, kMaxListed = 20;
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
    if (names.size() == kMaxEntries) break;
  }
  if (error) return fmt::format("it cannot be listed: {}", error.message());
  if (names.empty()) return "it is empty";
  std::sort(names.begin(), names.end());
  std::string text = "it holds ";
  for (size_t i = 0; i < std::min(names.size(), kMaxListed); ++i) {
    text += fmt::format("{}{}", i ? ", " : "", printable(names[i]));
    const fs::path path = folder / names[i];
    const std::string extension = path.extension().string();
    if (extension != ".gguf" && extension != ".bin" && extension != ".pt" && extension != ".pth") {
      continue;
    }
    if (!fs::is_regular_file(path, error)) continue;
    try {
      const MappedFile file(path.string());
      if (const auto kind = foreign_file_kind(file.bytes())) text += fmt::format(" ({})", *kind);
    } catch (const Error&) {
      // The kind only helps the reader of another error; a file that cannot be read is listed by
      // name.
    }
  }
  if (names.size() > kMaxListed) text += fmt::format(" and {} more", names.size() - kMaxListed);
  return text;
}

uint64_t sum_bytes(const TensorMap& tensors) {
  uint64_t total = 0;
  for (const auto& [name, view] : tensors) total += static_cast<uint64_t>(view.num_bytes());
  return total;
}

void require_shards(const fs::path& folder, const std::string& index_path,
                    const ShardIndex& index) {
  size_t num_missing = 0;
  std::string missing;
  for (const std::string& shard : index.shards) {
    if (is_there(folder / shard)) continue;
    missing += fmt::format("{}{}", num_missing++ ? ", " : "", printable(shard, 255));
  }
  if (num_missing > 0) {
    fail("{}: {} of {} shards are missing (is the download complete?): {}",
         printable(index_path, 400), num_missing, index.shards.size(), missing);
  }
  for (const std::string& shard : index.shards) check_stays_inside(folder, folder / shard);
}

}  // namespace

void check_stays_inside(const std::string& folder, const std::string& file) {
  std::error_code error;
  const fs::path root = fs::canonical(folder, error);
  if (error) fail("{}: cannot resolve: {}", shown(folder), error.message());
  const fs::path target = fs::canonical(file, error);
  if (error) fail("{}: cannot resolve: {}", shown(file), error.message());
  if (is_inside(target, root)) return;
  for (fs::path at = root; at.has_relative_path(); at = at.parent_path()) {
    const fs::path repository = at.parent_path();
    if (at.filename() == "snapshots" && repository.filename().string().starts_with("models--")) {
      if (is_inside(target, repository / "blobs")) return;
      break;
    }
  }
  fail(
      "{}: is a link to {}, outside the model's folder {}; expected the file itself, or a link "
      "into "
      "the blobs of the same Hugging Face cache repository",
      shown(file), shown(target), shown(root));
}

Checkpoint Checkpoint::open(const std::string& path) {
  const fs::path given(path);
  std::error_code error;
  const fs::file_status status = fs::status(given, error);
  if (!fs::exists(status)) {
    fail("{}: not found, expected a model folder or a .safetensors file", shown(given));
  }
  Checkpoint checkpoint;
  if (!fs::is_directory(status)) {
    checkpoint = open_file(path);
  } else {
    const fs::path single = given / kSingleName, index = given / kIndexName;
    const bool has_single = is_there(single), has_index = is_there(index);
    if (!has_single && !has_index) {
      fail("{}: no checkpoint: expected {} or {} with its shards; {}", shown(given), kSingleName,
           kIndexName, describe_folder(given));
    }
    check_stays_inside(given, has_index ? index : single);
    checkpoint = has_index ? open_shards(path, index.string()) : open_file(single.string());
    if (has_index && has_single &&
        (checkpoint.files_.size() != 1 || checkpoint.files_[0].path() != single)) {
      fail("{}: found both {} and {} with other shards; expected one of them, remove the other",
           shown(given), kSingleName, kIndexName);
    }
  }
  checkpoint.path = path;
  checkpoint.total_bytes = sum_bytes(checkpoint.tensors_);
  return checkpoint;
}

Checkpoint Checkpoint::open_file(const std::string& file_path) {
  Checkpoint checkpoint;
  MappedFile file(file_path);
  SafetensorsFile contents = parse_safetensors(file.bytes(), file_path);
  checkpoint.tensors_ = std::move(contents.tensors);
  checkpoint.metadata = std::move(contents.metadata);
  checkpoint.files_.push_back(std::move(file));
  return checkpoint;
}

Checkpoint Checkpoint::open_shards(const std::string& folder, const std::string& index_path) {
  const ShardIndex index = parse_shard_index(read_text_file(index_path), index_path);
  require_shards(folder, index_path, index);

  Checkpoint checkpoint;
  checkpoint.has_index_ = true;
  ProblemList problems;
  size_t num_unnamed = 0, num_tensors = 0;
  std::string first_unnamed;
  for (size_t s = 0; s < index.shards.size(); ++s) {
    const std::string& shard = index.shards[s];
    MappedFile file((fs::path(folder) / shard).string());
    SafetensorsFile contents = parse_safetensors(file.bytes(), file.path());
    num_tensors += contents.tensors.size();
    if (num_tensors > kMaxTensors) {
      fail("{}: the shards together have more than {} tensors", printable(index_path, 400),
           kMaxTensors);
    }
    for (auto it = contents.tensors.begin(); it != contents.tensors.end();) {
      auto node = contents.tensors.extract(it++);
      const std::string& name = node.key();
      const auto place = index.weight_map.find(name);
      if (place == index.weight_map.end()) {
        if (num_unnamed++ == 0) first_unnamed = fmt::format("\"{}\" in {}", printable(name), shard);
      } else if (place->second != s) {
        problems.add([&] {
          return fmt::format("tensor \"{}\" is in {}, the index says only in {}", printable(name),
                             printable(shard, 255), printable(index.shards[place->second], 255));
        });
      } else {
        checkpoint.tensors_.insert(std::move(node));
      }
    }
    if (s == 0) checkpoint.metadata = std::move(contents.metadata);
    checkpoint.files_.push_back(std::move(file));
  }
  if (checkpoint.tensors_.size() != index.weight_map.size()) {
    for (const auto& [name, s] : index.weight_map) {
      if (checkpoint.tensors_.contains(name)) continue;
      problems.add([&] {
        return fmt::format("tensor \"{}\" is not in {}, where the index says it is",
                           printable(name), printable(index.shards[s], 255));
      });
    }
  }
  if (problems.count() > 0) {
    fail("{}: index and shards disagree about {} tensors:{}", printable(index_path, 400),
         problems.count(), problems.text());
  }
  if (num_unnamed > 0) {
    warn("{}: {} tensors of the shards are not in the index and are left out, the first is {}",
         printable(index_path, 400), num_unnamed, first_unnamed);
  }
  return checkpoint;
}

const TensorView* Checkpoint::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, view] : tensors_) names.push_back(name);
  return names;
}

const std::string& Checkpoint::file_of(const TensorView& view) const {
  for (const MappedFile& file : files_) {
    const uint8_t* begin = file.bytes().data();
    if (view.data >= begin && view.data <= begin + file.bytes().size()) return file.path();
  }
  return path;
}

void Checkpoint::add(std::string name, Tensor tensor) {
  static const uint8_t nothing = 0;
  TensorView view = tensor.view();
  // An empty tensor owns no memory, and must not look absent for that.
  if (!view.present()) view.data = &nothing;
  total_bytes += static_cast<uint64_t>(view.num_bytes());
  CHECK(tensors_.emplace(std::move(name), std::move(view)).second);
  owned_.push_back(std::move(tensor));
}

}  // namespace indexcache
