#include "train/tokenize.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/progress.h"
#include "base/sha256.h"
#include "train/parallel.h"
#include "train/token_file.h"

namespace indexcache {
namespace {

constexpr std::string_view kEndOfText = "<|endoftext|>";
constexpr size_t kBatchBytes = 1 << 20;  // of lines that one thread takes at a time

int32_t special_id(const Tokenizer& tokenizer, std::string_view token, const std::string& where) {
  const std::optional<int32_t> id = tokenizer.token_id(token);
  if (!id) fail("{}: the tokenizer has no token {}", where, token);
  return *id;
}

class DocumentBuilder {
 public:
  DocumentBuilder(const Tokenizer& tokenizer, const std::string& where)
      : tokenizer_(tokenizer), where_(where) {
    add_ids(tokenizer.encode("", /*add_special_tokens=*/true, /*parse_special=*/false), 1);
    first_ = document_.tokens.size();
  }

  void add(std::string_view text, uint8_t weight) {
    try {
      add_ids(tokenizer_.encode(text, false, false), weight);
    } catch (const Error& error) {
      fail("{}: {}", where_, error.what());
    }
  }
  void add_special(std::string_view token, uint8_t weight) {
    add_ids({special_id(tokenizer_, token, where_)}, weight);
  }
  DocumentTokens finish() {
    if (document_.tokens.size() == first_) fail("{}: the document is empty", where_);
    if (document_.tokens.back() != special_id(tokenizer_, kEndOfText, where_))
      add_special(kEndOfText, 1);
    return std::move(document_);
  }

 private:
  void add_ids(const std::vector<int32_t>& ids, uint8_t weight) {
    document_.tokens.insert(document_.tokens.end(), ids.begin(), ids.end());
    document_.weights.insert(document_.weights.end(), ids.size(), weight);
  }

  const Tokenizer& tokenizer_;
  const std::string& where_;
  DocumentTokens document_;
  size_t first_ = 0;
};

const Json& items(const JsonObject& record, const char* key) {
  const Json& list = record.get(key);
  if (!list.is_array() || list.empty()) record.wrong(key, "a list that is not empty");
  return list;
}

void add_messages(const JsonObject& record, const std::string& where,
                  const TokenizeOptions& options, DocumentBuilder& document) {
  for (const Json& item : items(record, "messages")) {
    const JsonObject message(item, where + ": messages");
    const std::string role = message.string("role");
    if (role != "system" && role != "user" && role != "assistant")
      message.wrong("role", "system, user or assistant");
    const bool answer = role == "assistant";
    document.add_special("<|" + role + "|>", options.prompt_weight);
    document.add(message.string("content"), answer ? options.answer_weight : options.prompt_weight);
    if (answer) document.add_special(kEndOfText, options.answer_weight);
  }
}

// A stretch of an input: whole lines, or a whole text file.
struct Batch {
  size_t input;
  std::string_view text;
  size_t first_line;  // from 1; 0: a text file
};

std::vector<Batch> cut(size_t input, const MappedFile& file, bool lines) {
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                              file.bytes().size());
  if (!lines) return {{input, text, 0}};
  std::vector<Batch> batches;
  size_t line = 1;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = std::min(begin + kBatchBytes, text.size());
    end = std::min(text.find('\n', end - 1), text.size() - 1) + 1;
    const std::string_view part = text.substr(begin, end - begin);
    batches.push_back({input, part, line});
    line += static_cast<size_t>(std::ranges::count(part, '\n'));
    begin = end;
  }
  return batches;
}

std::vector<DocumentTokens> tokenize_batch(const Batch& batch, const std::string& path,
                                           const Tokenizer& tokenizer,
                                           const TokenizeOptions& options) {
  if (batch.first_line == 0) return {tokenize_text(batch.text, path, tokenizer)};
  std::vector<DocumentTokens> documents;
  size_t line = batch.first_line;
  for (size_t begin = 0; begin < batch.text.size(); ++line) {
    const size_t end = std::min(batch.text.find('\n', begin), batch.text.size());
    const std::string_view record = batch.text.substr(begin, end - begin);
    begin = end + 1;
    // The last line often ends the file with a newline too many.
    if (record.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    documents.push_back(
        tokenize_record(record, fmt::format("{}: line {}", path, line), tokenizer, options));
  }
  return documents;
}

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace

DocumentTokens tokenize_text(std::string_view text, const std::string& where,
                             const Tokenizer& tokenizer) {
  DocumentBuilder document(tokenizer, where);
  document.add(text, 1);
  return document.finish();
}

DocumentTokens tokenize_record(std::string_view json, const std::string& where,
                               const Tokenizer& tokenizer, const TokenizeOptions& options) {
  const Json parsed = parse_json(json, where);
  const JsonObject record(parsed, where);
  const int kinds =
      record.has("text") + record.has("prompt") + record.has("segments") + record.has("messages");
  if (kinds != 1)
    fail(
        "{}: expected exactly one of \"text\", \"prompt\", \"segments\" and \"messages\", found "
        "{}",
        where, kinds);
  DocumentBuilder document(tokenizer, where);
  if (record.has("text")) {
    document.add(record.string("text"), 1);
  } else if (record.has("prompt")) {
    document.add(record.string("prompt"), options.prompt_weight);
    document.add(record.string("completion"), options.answer_weight);
  } else if (record.has("segments")) {
    for (const Json& item : items(record, "segments")) {
      const JsonObject segment(item, where + ": segments");
      document.add(segment.string("text"), segment.boolean_or("answer", false)
                                               ? options.answer_weight
                                               : options.prompt_weight);
    }
  } else {
    add_messages(record, where, options, document);
  }
  return document.finish();
}

TokenFileSummary build_token_file(const std::vector<std::string>& inputs,
                                  const std::string& tokenizer_path, const TokenizeOptions& options,
                                  const std::string& out_path) {
  if (inputs.empty()) fail("{}: no inputs were given", out_path);
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
  std::vector<MappedFile> files;
  std::vector<Batch> batches;
  uint64_t text_bytes = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    files.emplace_back(inputs[i]);
    if (files[i].bytes().empty()) fail("{}: the file is empty", inputs[i]);
    text_bytes += files[i].bytes().size();
    const auto parts = cut(i, files[i], inputs[i].ends_with(".jsonl"));
    batches.insert(batches.end(), parts.begin(), parts.end());
  }

  TokenFileWriter writer(out_path, static_cast<uint64_t>(tokenizer.vocab_size()));
  std::vector<uint64_t> documents_of(inputs.size());
  TokenFileSummary summary = {0, 0, 0, text_bytes};
  Progress progress("tokenising", static_cast<int64_t>(text_bytes >> 20), "MiB");
  uint64_t done = 0;
  const size_t step = static_cast<size_t>(std::max(options.num_threads, 1)) * 8;
  for (size_t begin = 0; begin < batches.size(); begin += step) {
    const size_t count = std::min(step, batches.size() - begin);
    std::vector<std::vector<DocumentTokens>> results(count);
    run_parallel(count, options.num_threads, [&](size_t i) {
      const Batch& batch = batches[begin + i];
      results[i] = tokenize_batch(batch, inputs[batch.input], tokenizer, options);
    });
    for (size_t i = 0; i < count; ++i) {
      for (const DocumentTokens& document : results[i]) {
        writer.add(document.tokens, document.weights);
        summary.answer_tokens +=
            static_cast<uint64_t>(std::ranges::count(document.weights, options.answer_weight));
      }
      documents_of[batches[begin + i].input] += results[i].size();
      done += batches[begin + i].text.size();
    }
    progress.update(static_cast<int64_t>(done >> 20));
  }
  for (size_t i = 0; i < inputs.size(); ++i)
    if (documents_of[i] == 0) fail("{}: the file has no documents", inputs[i]);
  summary.documents = writer.num_documents();
  summary.tokens = writer.num_tokens();
  if (options.answer_weight == options.prompt_weight) summary.answer_tokens = 0;

  std::vector<std::string> hashes(files.size());
  run_parallel(files.size(), options.num_threads,
               [&](size_t i) { hashes[i] = sha256_hex(text_of(files[i])); });
  Json settings;
  settings["tokenizer_sha256"] = sha256_hex(text_of(MappedFile(tokenizer_path)));
  settings["prompt_weight"] = options.prompt_weight;
  settings["answer_weight"] = options.answer_weight;
  settings["inputs"] = Json::array();
  for (size_t i = 0; i < files.size(); ++i)
    settings["inputs"].push_back({{"name", std::filesystem::path(inputs[i]).filename().string()},
                                  {"bytes", files[i].bytes().size()},
                                  {"sha256", hashes[i]},
                                  {"documents", documents_of[i]}});
  writer.finish(settings.dump());
  return summary;
}

}  // namespace indexcache
