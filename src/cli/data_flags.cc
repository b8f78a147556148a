#include "cli/data_flags.h"

#include "base/log.h"
#include "cli/options.h"

namespace indexcache {

void add_data_flags(CLI::App* command, DataFlags* flags) {
  command->add_option("-f,--file", flags->files,
                      "Text files, or .jsonl files with \"text\" in every line");
  command
      ->add_option("--tokens", flags->request.total_tokens,
                   "Tokens of text, rounded up to whole sequences")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--seq", flags->request.sequence_tokens, "Tokens of one sequence")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  command->add_option("--seed", flags->request.seed, "Seed that picks the sequences from the text")
      ->capture_default_str();
  command
      ->add_option("--skip", flags->request.skip_tokens,
                   "Leave out this many tokens of what the seed picks first: the same seed with "
                   "another --skip gives other text")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
}

TextData load_text(const DataFlags& flags, const std::string& model, const ModelConfig& config) {
  if (flags.files.empty()) fail("no text was given, expected -f FILE (text, or .jsonl)");
  TextData text{load_documents(flags.files), load_tokenizer(model), {}};
  std::optional<int32_t> end_of_text;
  if (!config.eos_token_id.empty()) end_of_text = config.eos_token_id[0];
  text.tokens = cut_sequences(text.documents, text.tokenizer, end_of_text, flags.request);
  info("text: {} sequences of {} tokens ({} in all), seed {}, SHA-256 {}",
       text.tokens.sequences.size(), text.tokens.sequence_tokens(), text.tokens.total_tokens(),
       flags.request.seed, text.tokens.hash.substr(0, 12));
  return text;
}

void check_sequence_length(int64_t sequence_tokens, const ModelConfig& config, bool accept_short) {
  const int64_t topk = config.indexer.index_topk;
  if (sequence_tokens > 2 * topk) return;
  if (sequence_tokens > topk) {
    warn("only {} of {} tokens of a sequence see more than index_topk {}; longer ones say more",
         sequence_tokens - topk, sequence_tokens, topk);
    return;
  }
  const std::string what = fmt::format(
      "sequences of {} tokens do not exceed index_topk {}: every query selects all it sees and "
      "every plan is the same",
      sequence_tokens, topk);
  if (!accept_short) fail("{}; expected --seq over {} (--force-short goes on)", what, topk);
  warn("{}", what);
}

Json data_json(const DataFlags& flags, const TokenSequences& data) {
  return {{"files", flags.files},
          {"tokens", data.total_tokens()},
          {"sequence_tokens", data.sequence_tokens()},
          {"seed", flags.request.seed},
          {"skip_tokens", flags.request.skip_tokens},
          {"sha256", data.hash}};
}

}  // namespace indexcache
