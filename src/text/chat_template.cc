#include "text/chat_template.h"

#include <filesystem>

#include "base/error.h"
#include "base/mapped_file.h"
#include "text/jinja_run.h"

namespace indexcache {

struct ChatTemplate::Impl {
  jinja::Block block;
  jinja::Variables special_tokens;
};

ChatTemplate::ChatTemplate(std::string_view source, const std::string& where,
                           const Json& special_tokens) {
  if (source.size() > kMaxChatTemplateBytes) {
    fail("{}: the chat template has {} bytes, expected at most {}", where, source.size(),
         kMaxChatTemplateBytes);
  }
  auto impl = std::make_shared<Impl>();
  try {
    impl->block = jinja::parse_template(source);
  } catch (const Error& error) {
    fail("{}: chat template: {}", where, error.what());
  }
  for (const auto& [name, value] : special_tokens.items())
    impl->special_tokens.emplace_back(name, jinja::own_value(value));
  impl_ = std::move(impl);
}

ChatPrompt ChatTemplate::render(const ChatInput& input) const {
  try {
    jinja::Variables variables = impl_->special_tokens;
    const auto set = [&](const std::string& name, jinja::Value value) {
      std::erase_if(variables, [&](const auto& variable) { return variable.first == name; });
      variables.emplace_back(name, std::move(value));
    };
    for (const auto& [name, value] : input.extra.items()) set(name, jinja::input_value(value));
    set("messages", jinja::input_value(input.messages, "role"));
    set("tools", jinja::input_value(input.tools));
    set("documents", {jinja::None{}});
    set("add_generation_prompt", {input.add_generation_prompt});
    jinja::Text text = jinja::run(impl_->block, variables, {}, input.unix_time);
    return {std::move(text.bytes), std::move(text.marks)};
  } catch (const Error& error) {
    fail("chat template: {}", error.what());
  }
}

namespace {

// A token is a text, or an object with one as "content".
std::optional<std::string> token_text(const Json& token) {
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string())
    return token["content"].get<std::string>();
  return std::nullopt;
}

// "chat_template" is a text, or a list of named ones, of which "default" is the one.
std::optional<std::string> template_text(const Json& value, const std::string& where) {
  if (value.is_null()) return std::nullopt;
  if (value.is_string()) return value.get<std::string>();
  if (value.is_array()) {
    for (const Json& item : value) {
      if (item.is_object() && is_text(item.value("name", Json()), "default") &&
          item.value("template", Json()).is_string()) {
        return item["template"].get<std::string>();
      }
    }
  }
  fail("{}: \"chat_template\" is {}, expected text, or a list with one named \"default\"", where,
       json_excerpt(value));
}

}  // namespace

TextConfig load_text_config(const std::string& model_folder) {
  TextConfig config;
  const std::string path = model_folder + "/tokenizer_config.json";
  if (std::filesystem::exists(path)) {
    config.tokenizer_config = load_json(path);
    JsonObject(config.tokenizer_config, printable(path, 400));
  }
  Json special_tokens = Json::object();
  for (const char* name : {"bos_token", "eos_token", "pad_token", "unk_token", "sep_token",
                           "cls_token", "mask_token"}) {
    const auto it = config.tokenizer_config.find(name);
    if (it == config.tokenizer_config.end() || it->is_null()) continue;
    if (const auto text = token_text(*it)) special_tokens[name] = *text;
  }
  const std::string file = model_folder + "/chat_template.jinja";
  if (std::filesystem::exists(file)) {
    config.chat_template.emplace(read_text_file(file, kMaxChatTemplateBytes), printable(file, 400),
                                 special_tokens);
  } else if (config.tokenizer_config.contains("chat_template")) {
    if (const auto text =
            template_text(config.tokenizer_config["chat_template"], printable(path, 400))) {
      config.chat_template.emplace(*text, printable(path, 400), special_tokens);
    }
  }
  return config;
}

std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const ChatPrompt& prompt) {
  return tokenizer.encode_marked(prompt.text, prompt.from_input);
}

}  // namespace indexcache
