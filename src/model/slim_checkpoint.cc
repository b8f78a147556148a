#include "model/slim_checkpoint.h"

#include <algorithm>
#include <array>
#include <filesystem>

#include "base/atomic_file.h"
#include "base/atomic_folder.h"
#include "base/error.h"
#include "base/mapped_file.h"
#include "model/weights.h"
#include "plan/export_lines.h"

namespace indexcache {

namespace fs = std::filesystem;

namespace {

constexpr size_t kMaxSmallFileBytes = 256u << 20;

KeepTensor keep_for(const IndexPlan& plan) {
  std::vector<std::string> dropped;
  for (int l = 0; l < plan.num_layers(); ++l) {
    if (!plan.is_full(l)) dropped.push_back(indexer_prefix(l));
  }
  std::sort(dropped.begin(), dropped.end());
  return [dropped = std::move(dropped)](std::string_view name) {
    // Of the prefixes that are not after the name only the last can begin it: none begins another.
    const auto after = std::upper_bound(dropped.begin(), dropped.end(), name);
    return after == dropped.begin() || !name.starts_with(*std::prev(after));
  };
}

// Of these the copy has its own.
bool is_rewritten(const std::string& name) {
  return name == "config.json" || name.ends_with(".safetensors") ||
         name == "model.safetensors.index.json";
}

// Neither weights in another form, nor an index to them, nor code.
bool belongs_to_model(const std::string& name) {
  constexpr std::array kExtensions = {".json", ".jinja", ".txt", ".model", ".md"};
  return name.starts_with("LICENSE") || name.starts_with("NOTICE") ||
         (!name.ends_with(".index.json") &&
          std::any_of(kExtensions.begin(), kExtensions.end(),
                      [&](const char* extension) { return name.ends_with(extension); }));
}

void copy_small_files(const std::string& from, const std::string& to, SlimCheckpoint* slim) {
  std::error_code error;
  std::vector<fs::path> paths;
  for (fs::directory_iterator it(from, error), end; !error && it != end; it.increment(error))
    paths.push_back(it->path());
  if (error) fail("{}: cannot be listed: {}", printable(from, 400), error.message());
  std::sort(paths.begin(), paths.end());
  for (const fs::path& path : paths) {
    const std::string name = path.filename().string();
    if (is_rewritten(name)) continue;
    if (!belongs_to_model(name) || !fs::is_regular_file(path, error)) {
      slim->left_out.push_back(name);
      continue;
    }
    check_stays_inside(from, path.string());
    write_text_file(to + "/" + name, read_text_file(path.string(), kMaxSmallFileBytes));
    slim->files.push_back(name);
  }
}

}  // namespace

CopiedTensors count_slim_checkpoint(const Checkpoint& source, const IndexPlan& plan) {
  return count_copy(source, keep_for(plan));
}

SlimCheckpoint write_slim_checkpoint(const std::string& source_folder, const Checkpoint& source,
                                     const ModelConfig& config, const IndexPlan& plan,
                                     const std::string& folder, const CopyProgress& progress) {
  check_indexer_weights(plan, layers_with_indexer(list_tensors(source), config),
                        printable(source_folder, 400));
  SlimCheckpoint slim;
  AtomicFolder out(folder);
  slim.config = config_with_plan(load_json(source_folder + "/config.json"), plan);
  // What is written must be readable, and be the same model.
  const ModelConfig written = parse_config(slim.config, printable(folder, 400) + "/config.json");
  CHECK_EQ(to_string(written.index_plan), to_string(plan));
  CHECK_EQ(written.fingerprint, config.fingerprint);
  copy_small_files(source_folder, out.temporary_path(), &slim);
  slim.tensors = copy_tensors(source, keep_for(plan), out.temporary_path(), progress);
  write_text_file(out.temporary_path() + "/config.json", slim.config.dump(2) + "\n");
  out.commit();
  return slim;
}

}  // namespace indexcache
