// Random bodies. The first byte chooses the path, the rest is the body: it is refused with an
// ApiError of status 4xx, or it gives a request that keeps the limits.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/log.h"
#include "server/api_request.h"
#include "text/byte_level.h"

using namespace indexcache;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

const ServedModel& model() {
  static const ServedModel model = [] {
    ServedModel made;
    made.name = "bytes";
    made.tokenizer = Tokenizer::parse(byte_level_tokenizer_json(260), "fuzz");
    made.text.chat_template.emplace(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ tools | tojson }}",
        "fuzz", Json::object());
    made.context = 4096;
    made.vocab_size = 260;
    made.longest_token = longest_token_bytes(*made.tokenizer);
    made.eos_tokens = {256};
    return made;
  }();
  return model;
}

void check(const CompletionRequest& request, const ServerLimits& limits) {
  const auto num_prompts = static_cast<int64_t>(request.prompts.size());
  require(num_prompts >= 1 && num_prompts * request.n <= limits.num_choices);
  for (const auto& prompt : request.prompts) {
    require(!prompt.empty());
    require(static_cast<int64_t>(prompt.size()) + request.generation.max_tokens <= model().context);
    for (const int32_t id : prompt) require(id >= 0 && id < model().vocab_size);
  }
  int64_t held = 0;
  for (const auto& prompt : request.prompts) {
    const auto length = static_cast<int64_t>(prompt.size());
    const int64_t most = request.generation.max_tokens < 0 ? model().context - length
                                                           : request.generation.max_tokens;
    require(request.generation.min_tokens <= most);
    if (!request.stream) held += request.n * most * (request.generation.num_logprobs + 1);
  }
  require(held <= limits.num_logprobs);
  for (const std::string& stop : request.stops) require(!stop.empty());
  check_sampling_params(request.generation.sampling);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  const ServerLimits limits;
  try {
    const Json json = parse_body(body, limits);
    switch (data[0] % 4) {
      case 0:
        check(parse_completion(json, model(), limits), limits);
        break;
      case 1:
        check(parse_chat(json, model(), limits, 0), limits);
        break;
      case 2:
        dump(tokenize_answer(json, model(), limits, 0));
        break;
      default:
        dump(detokenize_answer(json, model()));
    }
  } catch (const ApiError& error) {
    require(error.status >= 400 && error.status < 500);
    require(!error_response(error).body.empty());
  }
  return 0;
}
