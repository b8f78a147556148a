// A model's chat template: messages in, the prompt's text out, with a note of which bytes a client
// wrote. Text equals what transformers' apply_chat_template(tokenize=False) gives with
// python3-jinja2.
//
// What of Jinja is taken: text/jinja_parser.h. Templates come with a checkpoint and messages from
// anyone, so both are untrusted: steps, output and nesting are bounded, and nothing outside the
// given values can be reached. Whatever goes wrong is an Error that begins with `where` or, in
// render(), with "chat template".
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "text/tokenizer.h"

namespace indexcache {

inline constexpr size_t kMaxChatTemplateBytes = size_t{1} << 20;

struct ChatInput {
  Json messages;  // an array of objects; "role" is one of the roles that the caller knows
  Json tools;     // an array, or null
  Json extra = Json::object();  // chat_template_kwargs: more variables, as enable_thinking
  bool add_generation_prompt = true;
  int64_t unix_time = 0;  // for strftime_now
};

struct ChatPrompt {
  std::string text;
  std::string from_input;  // a byte for each byte of text: 1 if the client wrote it; or empty
};

class ChatTemplate {
 public:
  // `special_tokens`: variables as bos_token and eos_token.
  ChatTemplate(std::string_view source, const std::string& where, const Json& special_tokens);

  ChatPrompt render(const ChatInput& input) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

// What a model folder says of text besides tokenizer.json: tokenizer_config.json (chat_template,
// special tokens) and chat_template.jinja, which wins. No template: nullopt.
struct TextConfig {
  std::optional<ChatTemplate> chat_template;
  Json tokenizer_config = Json::object();
};
TextConfig load_text_config(const std::string& model_folder);

// Token ids of a rendered prompt: added tokens are found only in what the template wrote, so that
// "<|user|>" in a message stays text.
std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const ChatPrompt& prompt);

}  // namespace indexcache
