#include "train/data_commands.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/log.h"
#include "base/units.h"
#include "text/long_context_tasks.h"
#include "text/tokenizer.h"
#include "train/bpe_trainer.h"
#include "train/task_file.h"
#include "train/token_file.h"
#include "train/tokenize.h"

namespace indexcache {
namespace {

int all_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

struct Settings {
  std::vector<std::string> inputs;
  std::string out, tokenizer;
  int threads = all_threads();
  size_t max_mb = 64;
  BpeOptions bpe;
  int64_t model_max_length = 16384;
  TaskFileOptions tasks;
  TaskRequest example;
  std::string kind = "single";
  int prompt_weight = 1, answer_weight = 10;
};

void make_vocabulary(const Settings& s) {
  const std::vector<std::string> texts = load_texts(s.inputs, s.max_mb * 1'000'000);
  uint64_t bytes = 0;
  for (const std::string& text : texts) bytes += text.size();
  const WordCounts words = count_words(texts, s.threads);
  info("{} documents, {}, {} different words", texts.size(), format_bytes(bytes), words.size());
  const Vocabulary vocabulary = train_bpe(words, s.bpe);
  std::filesystem::create_directories(s.out);
  write_text_file(s.out + "/tokenizer.json", tokenizer_json(vocabulary));
  write_text_file(s.out + "/tokenizer_config.json", tokenizer_config_json(s.model_max_length));
  info("{}/tokenizer.json: {} tokens", s.out, vocabulary.tokens.size());
}

TaskFiller load_filler(const Settings& s) {
  TokenCounter count = count_bytes(3.5);
  if (!s.tokenizer.empty()) {
    count = [tokenizer = Tokenizer::load(s.tokenizer)](std::string_view text) {
      return static_cast<int64_t>(tokenizer.encode(text, false, false).size());
    };
  }
  return TaskFiller(load_texts(s.inputs, s.max_mb * 1'000'000), count, s.threads);
}

void make_tasks(Settings& s) {
  const TaskFiller filler = load_filler(s);
  s.tasks.num_threads = s.threads;
  info("{}: {} tasks", s.out, make_tasks_jsonl(filler, s.tasks, s.out));
}

void make_example(Settings& s) {
  const std::optional<TaskKind> kind = task_from_name(s.kind);
  if (!kind)
    fail("--kind: found {}, expected single, multikey, multivalue, variables or copy", s.kind);
  s.example.kind = *kind;
  s.example.split = TaskSplit::kHeldOut;
  const Task task = make_task(s.example, load_filler(s));
  write_text_file(s.out, task.prompt);
  write_text_file(s.out + ".answer", task.answer);
  info("{}: answer{}", s.out, task.answer.substr(0, task.answer.size() - 1));
}

void tokenize(const Settings& s) {
  TokenizeOptions options;
  options.prompt_weight = static_cast<uint8_t>(s.prompt_weight);
  options.answer_weight = static_cast<uint8_t>(s.answer_weight);
  options.num_threads = s.threads;
  const TokenFileSummary made = build_token_file(s.inputs, s.tokenizer, options, s.out);
  const TokenFile file = TokenFile::open(s.out);
  info("{}: {} documents, {} tokens ({} of answers) from {}", s.out, file.num_documents(),
       file.num_tokens(), made.answer_tokens, format_bytes(made.text_bytes));
}

CLI::App* command(CLI::App& app, const char* name, const char* what, Settings& s) {
  CLI::App* sub = app.add_subcommand(name, what);
  sub->add_option("inputs", s.inputs, "JSON lines (or, for tokenize, plain text) to read")
      ->required();
  sub->add_option("-t,--threads", s.threads, "Threads")->check(CLI::Range(1, 1024));
  return sub;
}

}  // namespace

void add_data_commands(CLI::App& app) {
  const auto s = std::make_shared<Settings>();
  CLI::App* vocabulary = command(app, "vocabulary", "Learn a byte-level BPE vocabulary", *s);
  vocabulary->add_option("-o,--out", s->out, "Folder for tokenizer.json and tokenizer_config.json")
      ->required();
  vocabulary->add_option("--size", s->bpe.vocab_size, "Tokens, special ones and bytes included")
      ->capture_default_str();
  vocabulary->add_option("--max-mb", s->max_mb, "Learn from about this many MB, evenly chosen");
  vocabulary->add_option("--model-max-length", s->model_max_length, "Context of the model, tokens")
      ->capture_default_str();
  vocabulary->callback([s] { make_vocabulary(*s); });

  CLI::App* tasks = command(app, "tasks", "Make long-context tasks around the inputs' text", *s);
  tasks->add_option("-o,--out", s->out, "JSON-lines file to write")->required();
  tasks->add_option("--tokenizer", s->tokenizer,
                    "tokenizer.json that lengths are measured with (without: 3.5 bytes a token)");
  tasks->add_option("--tokens", s->tasks.total_tokens, "Tokens in all")->capture_default_str();
  tasks->add_option("--min", s->tasks.min_tokens, "Shortest task, tokens")->capture_default_str();
  tasks->add_option("--max", s->tasks.max_tokens, "Longest task, tokens")->capture_default_str();
  tasks->add_option("--chat", s->tasks.chat_share, "Share written as chats")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  tasks->add_option("--seed", s->tasks.seed, "Seed")->capture_default_str();
  tasks->add_option("--max-mb", s->max_mb, "Use about this many MB of the text, evenly chosen");
  tasks->callback([s] { make_tasks(*s); });

  CLI::App* example = command(
      app, "example", "Write one held-out task: FILE the prompt, FILE.answer the answer", *s);
  example->add_option("-o,--out", s->out, "Text file to write")->required();
  example->add_option("--tokenizer", s->tokenizer, "tokenizer.json that lengths are measured with");
  example->add_option("--kind", s->kind, "single, multikey, multivalue, variables or copy")
      ->capture_default_str();
  example->add_option("--tokens", s->example.target_tokens, "Prompt and answer")
      ->capture_default_str();
  example->add_option("--seed", s->example.seed, "Seed")->capture_default_str();
  example->callback([s] { make_example(*s); });

  CLI::App* tokens = command(app, "tokenize", "Write a token file for the trainer", *s);
  tokens->add_option("-o,--out", s->out, "Token file to write")->required();
  tokens->add_option("--tokenizer", s->tokenizer, "tokenizer.json")->required();
  tokens->add_option("--answer-weight", s->answer_weight, "Loss weight of answer tokens")
      ->check(CLI::Range(0, 255))
      ->capture_default_str();
  tokens
      ->add_option("--prompt-weight", s->prompt_weight, "Loss weight of the other tokens of tasks")
      ->check(CLI::Range(0, 255))
      ->capture_default_str();
  tokens->callback([s] { tokenize(*s); });
}

}  // namespace indexcache
