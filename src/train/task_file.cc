#include "train/task_file.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/progress.h"
#include "train/parallel.h"

namespace indexcache {
namespace {

Json chat_record(const std::vector<TaskSegment>& segments) {
  Json messages = Json::array();
  for (const TaskSegment& segment : segments) {
    // The words that lead to the answer are the assistant's.
    constexpr std::string_view kAnswer = "\nAnswer: ";
    if (segment.is_answer) {
      std::string& said = messages.back()["content"].get_ref<std::string&>();
      said += segment.text.substr(0, segment.text.size() - 1);
    } else {
      const size_t lead = segment.text.rfind(kAnswer);
      CHECK(lead != std::string::npos);
      messages.push_back({{"role", "user"}, {"content", segment.text.substr(0, lead)}});
      messages.push_back(
          {{"role", "assistant"}, {"content", segment.text.substr(lead + kAnswer.size())}});
    }
  }
  return {{"messages", std::move(messages)}};
}

Json plain_record(const std::vector<TaskSegment>& segments) {
  Json list = Json::array();
  for (const TaskSegment& segment : segments)
    list.push_back({{"text", segment.text}, {"answer", segment.is_answer}});
  return {{"segments", std::move(list)}};
}

std::string text_of_record(std::string_view json, const std::string& where) {
  const Json parsed = parse_json(json, where);
  const JsonObject record(parsed, where);
  if (!record.has("segments")) return record.string("text");
  if (!record.get("segments").is_array()) record.wrong("segments", "a list");
  std::string text;
  for (const Json& segment : record.get("segments"))
    text += JsonObject(segment, where + ": segments").string("text");
  return text;
}

}  // namespace

std::vector<std::string> load_texts(const std::vector<std::string>& jsonl_paths, size_t max_bytes) {
  uint64_t total = 0;
  std::vector<MappedFile> files;
  for (const std::string& path : jsonl_paths) {
    files.emplace_back(path);
    total += files.back().bytes().size();
  }
  std::vector<std::string> texts;
  uint64_t passed = 0, taken = 0;
  for (const MappedFile& file : files) {
    const std::string_view all(reinterpret_cast<const char*>(file.bytes().data()),
                               file.bytes().size());
    size_t line = 1;
    for (size_t begin = 0; begin < all.size(); ++line) {
      const size_t end = std::min(all.find('\n', begin), all.size());
      const std::string_view record = all.substr(begin, end - begin);
      begin = end + 1;
      if (record.empty()) continue;
      // Taken where the share taken so far has fallen behind.
      const bool take = static_cast<double>(taken) * static_cast<double>(total) <=
                        static_cast<double>(max_bytes) * static_cast<double>(passed);
      passed += record.size();
      if (!take) continue;
      taken += record.size();
      const std::string where = fmt::format("{}: line {}", file.path(), line);
      texts.push_back(text_of_record(record, where));
    }
  }
  return texts;
}

uint64_t make_tasks_jsonl(const TaskFiller& filler, const TaskFileOptions& options,
                          const std::string& out_path) {
  if (options.min_tokens < 1 || options.max_tokens < options.min_tokens)
    fail("tasks: lengths from {} to {} tokens, expected 1 or more and in this order",
         options.min_tokens, options.max_tokens);
  if (options.total_tokens < 1)
    fail("tasks: total_tokens is {}, expected at least 1", options.total_tokens);

  struct Plan {
    uint64_t seed;
    int64_t tokens;
    bool chat;
  };
  std::vector<Plan> plans;
  Rng rng(options.seed);
  const double octaves =
      std::log2(static_cast<double>(options.max_tokens) / static_cast<double>(options.min_tokens));
  for (int64_t total = 0; total < options.total_tokens;) {
    const double length =
        static_cast<double>(options.min_tokens) * std::exp2(octaves * rng.uniform());
    const bool chat = rng.uniform() < options.chat_share;
    plans.push_back({rng.next(), static_cast<int64_t>(std::llround(length)), chat});
    total += plans.back().tokens;
  }

  AtomicFile file(out_path);
  Progress progress("tasks", static_cast<int64_t>(plans.size()), "tasks");
  const size_t step = static_cast<size_t>(std::max(options.num_threads, 1)) * 64;
  for (size_t begin = 0; begin < plans.size(); begin += step) {
    std::vector<std::string> lines(std::min(step, plans.size() - begin));
    run_parallel(lines.size(), options.num_threads, [&](size_t i) {
      const Plan& plan = plans[begin + i];
      const auto segments = make_training_text(plan.seed, plan.tokens, filler);
      const Json record = plan.chat ? chat_record(segments) : plain_record(segments);
      lines[i] = record.dump() + "\n";
    });
    for (const std::string& line : lines) file.write(line);
    progress.update(static_cast<int64_t>(begin + lines.size()));
  }
  file.commit();
  return plans.size();
}

}  // namespace indexcache
