#include "server/choice.h"

#include <algorithm>
#include <cmath>

#include "text/utf8.h"

namespace indexcache {

namespace {

int64_t count_characters(const std::string& text) {
  return std::ranges::count_if(text,
                               [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

// JSON has no infinity; -9999 is what OpenAI's servers write.
double number(double logprob) { return std::isfinite(logprob) ? logprob : -9999.0; }

}  // namespace

Choice::Choice(const ServedModel& model, const CompletionRequest& request,
               const std::vector<int32_t>& prompt)
    : model_(model), request_(request), prompt_(prompt), stops_(request.stops) {
  if (model.tokenizer) decoder_.emplace(*model.tokenizer, request.skip_special);
}

// The text of one token, as a name: bytes that are no text are spelled out, so that no two tokens
// share a name because of them.
std::string Choice::token_text(int32_t token) const {
  if (!model_.tokenizer) return fmt::format("token_id:{}", token);
  const std::string_view bytes = model_.tokenizer->token_bytes(token);
  if (bytes.empty()) return fmt::format("token_id:{}", token);
  if (!find_invalid_utf8(bytes)) return std::string(bytes);
  std::string out = "bytes:";
  for (const char c : bytes) out += fmt::format("\\x{:02x}", static_cast<uint8_t>(c));
  return out;
}

std::string Choice::decoded(int32_t token) {
  std::string text = decoder_ ? decoder_->push(token) : std::string();
  characters_ += count_characters(text);
  return text;
}

Choice::Piece Choice::prompt_done(const std::vector<TokenLogprob>& logprobs) {
  if (!request_.echo) return {};
  std::string text;
  for (size_t i = 0; i < prompt_.size(); ++i) {
    if (request_.logprobs) {
      pending_.push_back({characters_, bytes_, prompt_[i],
                          i == 0 ? std::nullopt : std::optional(logprobs[i - 1])});
    }
    const std::string part = decoded(prompt_[i]);
    bytes_ += part.size();
    text += part;
  }
  // The prompt ends here whatever the answer begins with.
  if (decoder_) {
    const std::string rest = decoder_->finish();
    characters_ += count_characters(rest);
    bytes_ += rest.size();
    text += rest;
    decoder_.emplace(*model_.tokenizer, request_.skip_special);
  }
  sent_bytes_ = bytes_;
  Piece out;
  out.text = std::move(text);
  if (request_.logprobs) out.logprobs = logprobs_json(std::exchange(pending_, {}));
  return out;
}

Choice::Piece Choice::token(int32_t token, const std::optional<TokenLogprob>& logprob) {
  if (stopped()) return {};
  ++num_tokens_;
  if (request_.logprobs) pending_.push_back({characters_, bytes_, token, logprob});
  const std::string text = decoded(token);
  bytes_ += text.size();
  return piece(stops_.push(text), stopped());
}

Choice::Piece Choice::finish() {
  std::string text;
  if (decoder_ && !stopped()) {
    const std::string rest = decoder_->finish();
    bytes_ += rest.size();
    text = stops_.push(rest);
    text += stops_.finish();
  }
  return piece(std::move(text), true);
}

// Logprobs go out with the text of their token, or with what comes after it if it has none.
Choice::Piece Choice::piece(std::string text, bool all) {
  Piece out;
  sent_bytes_ += text.size();
  out.text = std::move(text);
  std::vector<Entry> entries;
  size_t taken = 0;
  for (; taken < pending_.size(); ++taken) {
    const Entry& entry = pending_[taken];
    // A stop string ends the answer before this token began.
    const bool cut = stopped() && entry.byte >= sent_bytes_ && entry.byte < bytes_;
    if (!all && entry.byte >= sent_bytes_) break;
    if (!cut) entries.push_back(entry);
  }
  pending_.erase(pending_.begin(), pending_.begin() + static_cast<ptrdiff_t>(taken));
  if (!entries.empty()) out.logprobs = logprobs_json(entries);
  return out;
}

Json Choice::logprobs_json(const std::vector<Entry>& entries) const {
  return request_.chat ? chat_logprobs(entries) : legacy_logprobs(entries);
}

Json Choice::chat_logprobs(const std::vector<Entry>& entries) const {
  const auto item = [&](int32_t token, double logprob) {
    Json bytes = Json::array();
    if (model_.tokenizer)
      for (const char c : model_.tokenizer->token_bytes(token))
        bytes.push_back(static_cast<uint8_t>(c));
    return Json{{"token", token_text(token)}, {"logprob", number(logprob)}, {"bytes", bytes}};
  };
  Json content = Json::array();
  for (const Entry& entry : entries) {
    Json one = item(entry.token, entry.logprob->logprob);
    one["top_logprobs"] = Json::array();
    for (const auto& [token, logprob] : entry.logprob->top)
      one["top_logprobs"].push_back(item(token, logprob));
    content.push_back(std::move(one));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

Json Choice::legacy_logprobs(const std::vector<Entry>& entries) const {
  Json tokens = Json::array(), token_logprobs = Json::array(), top_logprobs = Json::array(),
       text_offset = Json::array();
  for (const Entry& entry : entries) {
    tokens.push_back(token_text(entry.token));
    text_offset.push_back(entry.offset);
    if (!entry.logprob) {
      token_logprobs.push_back(nullptr);
      top_logprobs.push_back(nullptr);
      continue;
    }
    token_logprobs.push_back(number(entry.logprob->logprob));
    Json top = Json::object();
    const auto add = [&](int32_t token, double logprob) {
      std::string name = token_text(token);
      if (top.contains(name)) name = fmt::format("token_id:{}", token);
      top[name] = number(logprob);
    };
    bool has_own = false;
    for (const auto& [token, logprob] : entry.logprob->top) {
      add(token, logprob);
      has_own = has_own || token == entry.token;
    }
    if (!has_own) add(entry.token, entry.logprob->logprob);
    top_logprobs.push_back(std::move(top));
  }
  return {{"tokens", std::move(tokens)},
          {"token_logprobs", std::move(token_logprobs)},
          {"top_logprobs", std::move(top_logprobs)},
          {"text_offset", std::move(text_offset)}};
}

}  // namespace indexcache
