// One answer in the making: tokens in, text and logprobs in the API's form out. Characters that are
// not complete and what may be the beginning of a stop string are held back.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "server/api_request.h"
#include "server/stop_strings.h"

namespace indexcache {

class Choice {
 public:
  Choice(const ServedModel& model, const CompletionRequest& request,
         const std::vector<int32_t>& prompt);

  // What may go out after this event, with the logprobs of the tokens that it ends.
  struct Piece {
    std::string text;
    Json logprobs;  // null: none
  };
  // After kPromptDone: the prompt itself if it is echoed, with its logprobs.
  Piece prompt_done(const std::vector<TokenLogprob>& logprobs);
  Piece token(int32_t token, const std::optional<TokenLogprob>& logprob);
  Piece finish();  // the rest

  bool stopped() const { return stops_.stopped(); }  // by a stop string
  int64_t num_tokens() const { return num_tokens_; }

 private:
  struct Entry {
    int64_t offset;  // in characters
    size_t byte;     // of the answer's text where the token begins
    int32_t token;
    std::optional<TokenLogprob> logprob;
  };
  Piece piece(std::string text, bool all);
  Json logprobs_json(const std::vector<Entry>& entries) const;
  Json chat_logprobs(const std::vector<Entry>& entries) const;
  Json legacy_logprobs(const std::vector<Entry>& entries) const;
  std::string token_text(int32_t token) const;
  std::string decoded(int32_t token);

  const ServedModel& model_;
  const CompletionRequest& request_;
  const std::vector<int32_t>& prompt_;
  std::optional<StreamDecoder> decoder_;
  StopStrings stops_;
  std::vector<Entry> pending_;
  int64_t characters_ = 0;  // decoded so far, prompt included if it is echoed
  size_t bytes_ = 0;        // decoded so far
  size_t sent_bytes_ = 0;
  int64_t num_tokens_ = 0;
};

}  // namespace indexcache
