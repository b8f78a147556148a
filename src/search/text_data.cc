#include "search/text_data.h"

#include <algorithm>
#include <numeric>

#include "base/checked.h"
#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"
#include "base/rng.h"
#include "base/sha256.h"
#include "base/units.h"

namespace indexcache {

namespace {

constexpr size_t kMaxFileBytes = size_t{1} << 31;  // what one call of the tokenizer takes

void add_json_lines(const std::string& path, std::string_view bytes,
                    std::vector<std::string>* documents) {
  int64_t number = 0;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t end = std::min(bytes.find('\n', begin), bytes.size());
    const std::string_view line = bytes.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = fmt::format("{} line {}", printable(path, 400), number);
    const Json json = parse_json(line, where);
    documents->push_back(JsonObject(json, where).string("text"));
  }
}

}  // namespace

std::vector<std::string> load_documents(const std::vector<std::string>& paths) {
  std::vector<std::string> documents;
  for (const std::string& path : paths) {
    const MappedFile file(path);
    const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()),
                                 file.bytes().size());
    if (path.ends_with(".jsonl")) {
      add_json_lines(path, bytes, &documents);
      continue;
    }
    if (bytes.size() >= kMaxFileBytes) {
      fail("{}: has {}, expected less than {} in one document; .jsonl files may be larger",
           printable(path, 400), format_bytes(bytes.size()), format_bytes(kMaxFileBytes));
    }
    documents.emplace_back(bytes);
  }
  return documents;
}

TokenSequences cut_sequences(const std::vector<std::string>& documents, const Tokenizer& tokenizer,
                             std::optional<int32_t> end_of_text, const SequenceRequest& request) {
  const int64_t length = request.sequence_tokens;
  if (length < 2) fail("sequences of {} tokens were asked for, expected at least 2", length);
  if (request.total_tokens < 1 || request.skip_tokens < 0) {
    fail("{} tokens after {} skipped were asked for, expected at least 1 after at least 0",
         request.total_tokens, request.skip_tokens);
  }
  std::vector<int32_t> stream;
  for (const std::string& document : documents) {
    if (document.empty()) continue;
    if (!stream.empty() && end_of_text) stream.push_back(*end_of_text);
    const std::vector<int32_t> ids = tokenizer.encode(document, true, false);
    stream.insert(stream.end(), ids.begin(), ids.end());
  }
  const int64_t there = static_cast<int64_t>(stream.size()) / length;
  const int64_t skipped = ceil_div(request.skip_tokens, length);
  const int64_t wanted = ceil_div(request.total_tokens, length);
  if (wanted > there - skipped) {
    fail(
        "the text has {} tokens, {} sequences of {}; expected at least {} sequences ({} tokens, "
        "after {} skipped)",
        stream.size(), there, length, skipped + wanted, wanted * length, skipped * length);
  }

  std::vector<int64_t> order(static_cast<size_t>(there));
  std::iota(order.begin(), order.end(), 0);
  Rng rng(request.seed);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);

  TokenSequences out;
  std::string bytes;
  for (int64_t i = skipped; i < skipped + wanted; ++i) {
    const auto begin = stream.begin() + order[static_cast<size_t>(i)] * length;
    out.sequences.emplace_back(begin, begin + length);
    bytes.append(reinterpret_cast<const char*>(&*begin),
                 static_cast<size_t>(length) * sizeof(int32_t));
  }
  bytes += fmt::format("{} x {}", wanted, length);
  out.hash = sha256_hex(bytes);
  return out;
}

}  // namespace indexcache
