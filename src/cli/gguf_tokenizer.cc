#include "cli/gguf_tokenizer.h"

#include <filesystem>
#include <set>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "checkpoint/checkpoint.h"
#include "text/tokenizer_json.h"

namespace indexcache {

namespace {

// llama.cpp's token types.
constexpr int32_t kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5;

// What tells llama.cpp's pre-tokenizers apart: the patterns of the Splits, in order, then
// "ByteLevel" where that splits too.
struct PreTokenizer {
  const char* name;
  std::vector<std::string> patterns;
};

const std::string kWords =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string kWordsAndDigits =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string kDeepseekWords =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

const std::vector<PreTokenizer>& pre_tokenizers() {
  static const std::vector<PreTokenizer> all = {
      {"glm4", {kWords}},
      {"deepseek-v3", {R"(\p{N}{1,3})", "[一-龥぀-ゟ゠-ヿ]+", kDeepseekWords}},
      {"qwen2", {kWordsAndDigits}},
      {"gpt-2", {"ByteLevel"}},
  };
  return all;
}

// Line ends in a pattern may be written as such or escaped.
std::string with_escaped_line_ends(const std::string& pattern) {
  std::string out;
  for (const char c : pattern) out += c == '\r' ? "\\r" : c == '\n' ? "\\n" : std::string(1, c);
  return out;
}

// The file was parsed before (parse_tokenizer_file), so what is there has the right types.
std::vector<std::string> split_patterns(const Json& file, const std::string& where) {
  const JsonObject top(file.at("pre_tokenizer"), where);
  const Json stages =
      top.string("type") == "Sequence" ? top.get("pretokenizers") : Json::array({top.raw()});
  std::vector<std::string> patterns;
  for (const Json& item : stages) {
    const JsonObject stage(item, where);
    if (stage.string("type") == "ByteLevel") {
      if (stage.boolean_or("use_regex", true)) patterns.push_back("ByteLevel");
      continue;
    }
    const JsonObject pattern = stage.object("pattern");
    const bool isolates = pattern.has("Regex") && stage.string("behavior") == "Isolated" &&
                          !stage.boolean_or("invert", false);
    patterns.push_back(isolates ? with_escaped_line_ends(pattern.string("Regex"))
                                : json_excerpt(item));
  }
  return patterns;
}

std::string pre_tokenizer_name(const Json& json, const TokenizerFile& file,
                               const std::string& where) {
  const std::vector<std::string> patterns = split_patterns(json, where);
  if (file.add_prefix_space)
    fail("{}: add_prefix_space is true, llama.cpp's byte-level tokenizers have no such thing",
         where);
  // Without merges every byte is a token, wherever the text is split.
  if (file.merges.empty()) return "gpt-2";
  for (const PreTokenizer& pre : pre_tokenizers()) {
    if (pre.patterns != patterns) continue;
    // The same patterns; the name also says that whole words go before merges.
    if (file.ignore_merges && pre.patterns == std::vector{kWords}) return "llama-bpe";
    if (file.ignore_merges) break;
    return pre.name;
  }
  std::string found;
  for (const std::string& pattern : patterns) found += "\n  " + printable(pattern, 400);
  fail("{}: llama.cpp has no pre-tokenizer for these patterns (ignore_merges {}):{}", where,
       file.ignore_merges, found);
}

// As llama.cpp's converter decides it, because DeepSeek does not mark <｜User｜> as special.
bool is_control(const AddedToken& token) {
  const std::string& text = token.content;
  return token.special || (text.starts_with("<|") && text.ends_with("|>")) ||
         (text.starts_with("<｜") && text.ends_with("｜>"));
}

std::string chat_template(const std::string& folder) {
  const std::string file = folder + "/chat_template.jinja",
                    config_path = folder + "/tokenizer_config.json";
  if (std::filesystem::exists(file)) {
    check_stays_inside(folder, file);
    return read_text_file(file, kMaxTokenizerBytes);
  }
  if (!std::filesystem::exists(config_path)) return "";
  check_stays_inside(folder, config_path);
  const Json config = load_json(config_path);
  if (!config.is_object() || !config.contains("chat_template")) return "";
  const Json& text = config.at("chat_template");
  return text.is_string() ? text.get<std::string>() : "";
}

void add_special_ids(const TokenizerFile& file, const ModelConfig& config, GgufTokenizer* out) {
  GgufMetadata& metadata = out->metadata;
  if (config.bos_token_id) {
    metadata.emplace_back("tokenizer.ggml.bos_token_id",
                          static_cast<uint32_t>(*config.bos_token_id));
  }
  // The end of a text, of a turn, of a message.
  const char* keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                        "tokenizer.ggml.eom_token_id"};
  for (size_t i = 0; i < config.eos_token_id.size() && i < std::size(keys); ++i)
    metadata.emplace_back(keys[i], static_cast<uint32_t>(config.eos_token_id[i]));
  if (config.eos_token_id.empty()) {
    out->notes.push_back(
        "config.json has no eos_token_id: llama.cpp takes what it finds by name, and its default");
  }
  if (config.eos_token_id.size() > std::size(keys)) {
    out->notes.push_back(fmt::format("of {} eos_token_id only the first {} are in the file",
                                     config.eos_token_id.size(), std::size(keys)));
  }
  const bool begins_with_bos =
      config.bos_token_id && file.prefix == std::vector{*config.bos_token_id};
  metadata.emplace_back("tokenizer.ggml.add_bos_token", begins_with_bos);
  metadata.emplace_back("tokenizer.ggml.add_eos_token", false);
  if ((!begins_with_bos && !file.prefix.empty()) || !file.suffix.empty()) {
    out->notes.push_back(
        "tokenizer.json puts special tokens around a text that are not just bos: they are left to "
        "the chat template");
  }
}

}  // namespace

GgufTokenizer gguf_tokenizer(const std::string& folder, const ModelConfig& config) {
  const std::string path = folder + "/tokenizer.json", where = printable(path, 400);
  GgufTokenizer out;
  if (!std::filesystem::exists(path)) {
    out.metadata.emplace_back("tokenizer.ggml.model", std::string("no_vocab"));
    out.notes.push_back("there is no tokenizer.json: the file takes token ids only");
    return out;
  }
  check_stays_inside(folder, path);
  const std::string text = read_text_file(path, kMaxTokenizerBytes);
  const TokenizerFile file = parse_tokenizer_file(text, where);
  const size_t vocab_size = static_cast<size_t>(config.vocab_size);
  if (file.tokens.size() > vocab_size) {
    fail("{}: has {} tokens, expected at most the model's vocab_size, which is {}", where,
         file.tokens.size(), vocab_size);
  }

  std::vector<std::string> tokens = file.tokens;
  std::vector<int32_t> types(tokens.size(), kNormal);
  for (const AddedToken& token : file.added_tokens)
    types[static_cast<size_t>(token.id)] = is_control(token) ? kControl : kUserDefined;
  // Rows of the embedding that no token has.
  std::set<std::string> taken(tokens.begin(), tokens.end());
  while (tokens.size() < vocab_size) {
    std::string name = fmt::format("[PAD{}]", tokens.size());
    while (!taken.insert(name).second) name += '_';
    tokens.push_back(std::move(name));
    types.push_back(kUnused);
  }
  std::vector<std::string> merges;
  for (const Merge& merge : file.merges) {
    const std::string &left = file.tokens[static_cast<size_t>(merge.left)],
                      &right = file.tokens[static_cast<size_t>(merge.right)];
    if (left.find(' ') != std::string::npos || right.find(' ') != std::string::npos) {
      fail("{}: the merge of \"{}\" and \"{}\" holds a space, which GGUF cannot say", where,
           printable(left), printable(right));
    }
    merges.push_back(left + " " + right);
  }
  GgufMetadata& metadata = out.metadata;
  metadata.emplace_back("tokenizer.ggml.model", std::string("gpt2"));
  metadata.emplace_back("tokenizer.ggml.pre",
                        pre_tokenizer_name(parse_json(text, where), file, where));
  metadata.emplace_back("tokenizer.ggml.tokens", std::move(tokens));
  metadata.emplace_back("tokenizer.ggml.token_type", std::move(types));
  metadata.emplace_back("tokenizer.ggml.merges", std::move(merges));
  add_special_ids(file, config, &out);
  if (std::string text_of_template = chat_template(folder); !text_of_template.empty())
    metadata.emplace_back("tokenizer.chat_template", std::move(text_of_template));
  return out;
}

}  // namespace indexcache
