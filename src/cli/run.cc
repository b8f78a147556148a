// indexcache run: a prompt in, text or token ids out.

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <optional>

#include "base/json.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/progress.h"
#include "cli/options.h"
#include "cli/report.h"

namespace indexcache {

namespace {

struct RunFlags {
  CommonFlags common;
  std::optional<std::string> prompt, prompt_file, token_file;
  int64_t num_tokens = 128;
  SamplingParams sampling;
  bool ignore_eos = false, json = false;
};

std::atomic<bool> stop_requested{false};

// The first Ctrl-C ends the answer; a second one, before the engine has noticed, ends the program.
void on_interrupt(int) {
  if (stop_requested.exchange(true)) _exit(130);
}

// Ctrl-C may come while a slow reader holds the text up: it ends the answer, not the writing.
// (stdio would drop the text and call the file broken.)
void write_out(std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = write(STDOUT_FILENO, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("the standard output cannot be written: {}", strerror(errno));
    text.remove_prefix(static_cast<size_t>(n));
  }
}

// One prompt and its answer. Text goes out as it is made; token ids as one JSON line at the end.
GenerateResult answer(Engine& engine, SequenceCache& sequence, const Tokenizer* tokenizer,
                      std::span<const int32_t> prompt, const RunFlags& flags) {
  GenerateOptions options;
  options.max_tokens = flags.num_tokens;
  options.sampling = flags.sampling;
  if (!flags.ignore_eos) options.stop_tokens = engine.model.config.eos_token_id;
  options.stop = &stop_requested;
  auto progress =
      std::make_unique<Progress>("prompt", static_cast<int64_t>(prompt.size()), "tokens");
  options.on_prefill = [&](int64_t done, int64_t total) {
    progress->update(done);
    if (done == total) progress.reset();
  };
  std::optional<StreamDecoder> decoder;
  if (tokenizer != nullptr) decoder.emplace(*tokenizer, true);
  options.on_token = [&](int32_t token) {
    if (decoder && !flags.json) write_out(decoder->push(token));
  };
  GenerateResult result = generate(engine, sequence, prompt, options);
  if (flags.json) {
    Json out = generation_json(engine, result);
    if (tokenizer != nullptr) out["text"] = tokenizer->decode(result.tokens, true);
    write_out(out.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
  } else if (decoder) {
    write_out(decoder->finish() + "\n");
  } else {
    write_out(Json(result.tokens).dump() + "\n");
  }
  return result;
}

std::string read_all_stdin() {
  constexpr size_t kMaxBytes = 256u << 20;  // as of a file
  std::string text;
  char part[1 << 16];
  while (const size_t n = std::fread(part, 1, sizeof(part), stdin)) {
    text.append(part, n);
    if (text.size() > kMaxBytes)
      fail("the standard input has over {} bytes, expected a prompt of at most that", kMaxBytes);
  }
  return text;
}

// Lines from the terminal, each continuing the same context, until the input ends.
void converse(Engine& engine, const Tokenizer& tokenizer, const RunFlags& flags) {
  info("Each line continues the text. Ctrl-C stops an answer, Ctrl-D ends.");
  SequenceCache sequence;
  std::string line;
  while (fmt::print(stderr, "> "), std::getline(std::cin, line)) {
    stop_requested = false;
    const std::vector<int32_t> prompt = tokenizer.encode(line, sequence.num_tokens == 0, true);
    if (prompt.empty()) continue;
    const GenerateResult result = answer(engine, sequence, &tokenizer, prompt, flags);
    print_generation(engine, result, sequence.num_tokens);
  }
}

int run(const RunFlags& flags) {
  const RunOptions options = run_options(flags.common);
  check_sampling_params(flags.sampling);
  const ModelSource source = open_model(flags.common.model);
  std::optional<Tokenizer> tokenizer;
  std::vector<int32_t> prompt;
  const bool interactive =
      !flags.token_file && !flags.prompt_file && !flags.prompt && isatty(STDIN_FILENO);
  if (flags.token_file) {
    prompt = load_token_ids(*flags.token_file);
  } else {
    tokenizer = load_tokenizer(flags.common.model);
    if (!interactive) {
      const std::string text = flags.prompt_file ? read_text_file(*flags.prompt_file)
                               : flags.prompt    ? *flags.prompt
                                                 : read_all_stdin();
      prompt = tokenizer->encode(text, true, true);
      if (prompt.empty()) fail("the prompt is empty, expected at least one token");
    }
  }

  // Enough context for this prompt and its answer, unless -c says otherwise.
  RunOptions sized = options;
  if (sized.context == 0 && !interactive) {
    sized.context = std::min(static_cast<int64_t>(prompt.size()) + flags.num_tokens,
                             source.config.max_position_embeddings);
  }
  Engine engine(source, sized);
  print_engine(engine);
  if (source.config.eos_token_id.empty() && !flags.ignore_eos)
    warn("config.json has no eos_token_id: only -n and the context end an answer");
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  sigaction(SIGINT, &action, nullptr);
  if (interactive) {
    converse(engine, *tokenizer, flags);
    return 0;
  }
  SequenceCache sequence;
  const GenerateResult result =
      answer(engine, sequence, tokenizer ? &*tokenizer : nullptr, prompt, flags);
  print_generation(engine, result, sequence.num_tokens);
  return result.finish == GenerateResult::Finish::kInterrupted ? 130 : 0;
}

}  // namespace

void add_run_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* command =
      program->add_subcommand("run", "Generate from a prompt, or chat line by line on a terminal");
  command->footer(
      "Example: indexcache run -m models/demo -p \"The lightning indexer\" -n 64 --plan 1/4\n"
      "Without -p, -f or --tokens the prompt is read from the standard input.");
  add_model_flag(command, &flags->common, true);
  add_run_flags(command, &flags->common);
  auto* prompt = command->add_option("-p,--prompt", flags->prompt, "The prompt");
  auto* file = command->add_option("-f,--file", flags->prompt_file, "A file with the prompt")
                   ->excludes(prompt);
  command->add_option("--tokens", flags->token_file, "A JSON array of token ids; ids come out")
      ->excludes(prompt)
      ->excludes(file);
  command->add_option("-n,--predict", flags->num_tokens, "Tokens to generate")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  command->add_option("--temp", flags->sampling.temperature, "Temperature; 0 is greedy")
      ->capture_default_str();
  command->add_option("--top-k", flags->sampling.top_k, "Keep the k most likely tokens; 0: off");
  command->add_option("--top-p", flags->sampling.top_p,
                      "Keep the likeliest tokens with this much probability; 1: off");
  command->add_option("--min-p", flags->sampling.min_p,
                      "Drop tokens below this share of the best one's probability");
  command->add_option("--seed", flags->sampling.seed, "Seed of the sampler")->capture_default_str();
  command->add_flag("--ignore-eos", flags->ignore_eos, "Go on after an end-of-text token");
  command->add_flag("--json", flags->json, "One JSON object at the end in place of the text");
  command->callback([flags, exit_code] { *exit_code = run(*flags); });
}

}  // namespace indexcache
