// Bodies of /v1/completions and /v1/chat/completions as one struct. Everything is checked: a field
// that is unknown, not supported, of the wrong type or out of range is an ApiError that names it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/api_error.h"
#include "server/limits.h"
#include "server/served_model.h"

namespace indexcache {

struct CompletionRequest {
  bool chat = false;
  std::vector<std::vector<int32_t>> prompts;
  std::vector<std::string> stops;
  GenerationRequest generation;  // all but the prompt; max_tokens -1: as many as fit
  bool own_seed = false;         // no seed was given
  int64_t n = 1;
  bool echo = false;
  bool stream = false, include_usage = false;
  bool logprobs = false;  // and how many others: generation.num_logprobs
  bool skip_special = true;
  std::string log_text;  // the prompt, for --log-prompts
};

// Parses a body. Error texts begin with "body".
Json parse_body(std::string_view body, const ServerLimits& limits);

CompletionRequest parse_completion(const Json& body, const ServedModel& model,
                                   const ServerLimits& limits);
CompletionRequest parse_chat(const Json& body, const ServedModel& model, const ServerLimits& limits,
                             int64_t unix_time);

// Bodies of /tokenize and /detokenize, and their answers.
Json tokenize_answer(const Json& body, const ServedModel& model, const ServerLimits& limits,
                     int64_t unix_time);
Json detokenize_answer(const Json& body, const ServedModel& model);

}  // namespace indexcache
