#include "server/api_request.h"

#include <algorithm>
#include <cmath>

namespace indexcache {

namespace {

// One body, read field by field. An explicit null is as good as nothing.
class Fields {
 public:
  explicit Fields(const Json& body) : body_(body) {
    if (!body.is_object()) refuse({}, "body: found {}, expected a JSON object", json_excerpt(body));
  }

  // The field, or null. Fields that were never asked for are unknown.
  const Json* find(const char* name) {
    known_.emplace_back(name);
    const auto it = body_.find(name);
    return it == body_.end() || it->is_null() ? nullptr : &*it;
  }

  [[noreturn]] static void wrong(const char* name, const Json& value, const std::string& expected) {
    refuse(name, "\"{}\" is {}, expected {}", name, json_excerpt(value), expected);
  }

  static int64_t checked_integer(const char* name, const Json& value, int64_t min, int64_t max) {
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX});
    if (!fits || value.get<int64_t>() < min || value.get<int64_t>() > max)
      wrong(name, value, fmt::format("an integer from {} to {}", min, max));
    return value.get<int64_t>();
  }

  int64_t integer(const char* name, int64_t fallback, int64_t min, int64_t max) {
    const Json* value = find(name);
    return value ? checked_integer(name, *value, min, max) : fallback;
  }

  double number(const char* name, double fallback, double min, double max, bool above_min = false) {
    const Json* value = find(name);
    if (value == nullptr) return fallback;
    const double found = value->is_number() ? value->get<double>() : NAN;
    if (!(found >= min && found <= max) || (above_min && found == min)) {
      wrong(name, *value,
            fmt::format("a number {} {} {} {}", above_min ? "above" : "from", min,
                        above_min ? "and at most" : "to", max));
    }
    return found;
  }

  bool boolean(const char* name, bool fallback) {
    const Json* value = find(name);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) wrong(name, *value, "true or false");
    return value->get<bool>();
  }

  std::string text(const char* name, size_t max_bytes) {
    const Json* value = find(name);
    if (value == nullptr) return {};
    if (!value->is_string() || value->get_ref<const std::string&>().size() > max_bytes)
      wrong(name, *value, fmt::format("a string of at most {} bytes", max_bytes));
    return value->get<std::string>();
  }

  // Taken and without effect here.
  void ignore(std::initializer_list<const char*> names) {
    for (const char* name : names) find(name);
  }

  // Supported only with the value that changes nothing.
  void only(const char* name, const Json& neutral) {
    const Json* value = find(name);
    if (value == nullptr || *value == neutral) return;
    if (value->is_number() && neutral.is_number() && value->get<double>() == neutral.get<double>())
      return;
    if ((neutral.is_array() || neutral.is_object()) && value->empty() &&
        value->type() == neutral.type()) {
      return;
    }
    refuse(name, "\"{}\" is not supported by this server; leave it out or give {}", name,
           json_excerpt(neutral));
  }

  void reject_unknown() const {
    for (const auto& [key, value] : body_.items()) {
      if (std::ranges::find(known_, key) == known_.end())
        refuse(printable(key, 60), "unknown field \"{}\"", printable(key, 60));
    }
  }

 private:
  const Json& body_;
  std::vector<std::string> known_;
};

const Tokenizer& tokenizer_of(const ServedModel& model, const char* param) {
  if (!model.tokenizer) refuse(param, "this model has no tokenizer: give token ids in \"prompt\"");
  return *model.tokenizer;
}

std::vector<int32_t> checked_ids(const char* name, const Json& ids, const ServedModel& model) {
  std::vector<int32_t> out;
  out.reserve(ids.size());
  for (const Json& id : ids)
    out.push_back(static_cast<int32_t>(Fields::checked_integer(name, id, 0, model.vocab_size - 1)));
  return out;
}

std::vector<int32_t> encode(const ServedModel& model, const std::string& text,
                            bool add_special_tokens, const char* param) {
  try {
    return tokenizer_of(model, param).encode(text, add_special_tokens, true);
  } catch (const ApiError&) {
    throw;
  } catch (const Error& error) {
    refuse(param, "{}", error.what());
  }
}

// Megabytes take seconds to cut into tokens: what cannot fit however it is cut is refused before.
// (Not counted is white space that an added token swallows.)
void check_bytes(const ServedModel& model, const std::string& text, const char* param) {
  if (model.longest_token == 0) return;
  const auto least = static_cast<int64_t>(text.size() / model.longest_token);
  if (least <= model.context) return;
  throw ApiError(400,
                 fmt::format("the context holds {} tokens, but the prompt has {} bytes, which are "
                             "at least {} tokens",
                             model.context, text.size(), least),
                 param, "context_length_exceeded");
}

void check_model(Fields& fields, const ServedModel& model) {
  const std::string name = fields.text("model", 1024);
  if (!name.empty() && name != model.name) {
    throw ApiError(404,
                   fmt::format("the model \"{}\" is not served here, \"{}\" is",
                               printable(name, 100), model.name),
                   "model", "model_not_found");
  }
}

// What both kinds of request share.
void read_common(Fields& fields, const ServedModel& model, const ServerLimits& limits,
                 CompletionRequest* out) {
  check_model(fields, model);
  GenerationRequest& generation = out->generation;
  SamplingParams& sampling = generation.sampling;
  sampling.temperature = fields.number("temperature", 1, 0, 2);
  sampling.top_p = fields.number("top_p", 1, 0, 1, true);
  sampling.min_p = fields.number("min_p", 0, 0, 1);
  // -1 switches it off too, as vLLM has it.
  sampling.top_k = std::max<int64_t>(fields.integer("top_k", 0, -1, INT32_MAX), 0);
  out->own_seed = fields.find("seed") == nullptr;
  sampling.seed = static_cast<uint64_t>(fields.integer("seed", 0, INT64_MIN, INT64_MAX));
  out->n = fields.integer("n", 1, 1, limits.num_choices);
  out->stream = fields.boolean("stream", false);
  if (const Json* options = fields.find("stream_options")) {
    if (!out->stream) refuse("stream_options", "\"stream_options\" needs \"stream\": true");
    Fields inner(*options);
    out->include_usage = inner.boolean("include_usage", false);
    inner.only("continuous_usage_stats", false);
    inner.ignore({"include_obfuscation"});
    inner.reject_unknown();
  }
  if (const Json* stop = fields.find("stop")) {
    const auto add = [&](const Json& item) {
      if (!item.is_string()) Fields::wrong("stop", item, "a string");
      const std::string& text = item.get_ref<const std::string&>();
      if (text.empty() || text.size() > limits.stop_bytes)
        refuse("stop", "a stop string has {} bytes, expected 1 to {}", text.size(),
               limits.stop_bytes);
      out->stops.push_back(text);
    };
    if (stop->is_array()) {
      if (static_cast<int64_t>(stop->size()) > limits.num_stops)
        refuse("stop", "found {} stop strings, expected at most {}", stop->size(),
               limits.num_stops);
      for (const Json& item : *stop) add(item);
    } else {
      add(*stop);
    }
    if (!out->stops.empty()) tokenizer_of(model, "stop");
  }
  if (!fields.boolean("ignore_eos", false)) generation.stop_tokens = model.eos_tokens;
  if (const Json* ids = fields.find("stop_token_ids")) {
    if (!ids->is_array() || ids->size() > 64)
      Fields::wrong("stop_token_ids", *ids, "an array of at most 64 token ids");
    for (const int32_t id : checked_ids("stop_token_ids", *ids, model))
      generation.stop_tokens.push_back(id);
  }
  generation.min_tokens = fields.integer("min_tokens", 0, 0, model.context);
  generation.cache_salt = fields.text("cache_salt", 256);
  out->skip_special = fields.boolean("skip_special_tokens", true);
  fields.only("frequency_penalty", 0);
  fields.only("presence_penalty", 0);
  fields.only("repetition_penalty", 1);
  fields.only("logit_bias", Json::object());
  fields.ignore(
      {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"});
}

void check_lengths(CompletionRequest* out, const ServedModel& model, const ServerLimits& limits,
                   const char* param) {
  const auto choices = static_cast<int64_t>(out->prompts.size()) * out->n;
  if (choices > limits.num_choices) {
    refuse("n", "{} prompts with n = {} make {} answers, expected at most {}", out->prompts.size(),
           out->n, choices, limits.num_choices);
  }
  int64_t num_logprobs = 0;
  for (const std::vector<int32_t>& prompt : out->prompts) {
    const auto length = static_cast<int64_t>(prompt.size());
    if (length == 0) refuse(param, "a prompt is empty, expected at least one token");
    const int64_t wanted =
        std::max<int64_t>(out->generation.max_tokens, out->generation.max_tokens < 0 ? 1 : 0);
    if (length > model.context || wanted > model.context - length) {
      throw ApiError(
          400,
          fmt::format("the context holds {} tokens, but the prompt has {} and {} are to be "
                      "generated: {} in all",
                      model.context, length, wanted, length + wanted),
          param, "context_length_exceeded");
    }
    const int64_t most =
        out->generation.max_tokens < 0 ? model.context - length : out->generation.max_tokens;
    if (out->generation.min_tokens > most) {
      refuse("min_tokens", "\"min_tokens\" is {}, but at most {} are to be generated",
             out->generation.min_tokens, most);
    }
    // What is streamed is not held, but for the prompt's, which come all at once.
    num_logprobs += out->n * (length * (out->generation.num_prompt_logprobs + 1) +
                              (out->stream ? 0 : most * (out->generation.num_logprobs + 1)));
  }
  if (num_logprobs > limits.num_logprobs) {
    refuse(out->chat ? "top_logprobs" : "logprobs",
           "the answers could hold {} logprobs, expected at most {}: stream them, or ask for fewer "
           "logprobs, tokens or prompts at once",
           num_logprobs, limits.num_logprobs);
  }
}

}  // namespace

Json parse_body(std::string_view body, const ServerLimits& limits) {
  try {
    return parse_json(body, "body", limits.json_depth);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), {}, "invalid_json");
  }
}

CompletionRequest parse_completion(const Json& body, const ServedModel& model,
                                   const ServerLimits& limits) {
  CompletionRequest out;
  Fields fields(body);
  read_common(fields, model, limits, &out);
  out.generation.max_tokens = fields.integer("max_tokens", 16, 0, INT32_MAX);
  out.echo = fields.boolean("echo", false);
  if (const Json* logprobs = fields.find("logprobs")) {
    out.logprobs = true;
    out.generation.num_logprobs =
        static_cast<int>(Fields::checked_integer("logprobs", *logprobs, 0, 20));
    if (out.echo) out.generation.num_prompt_logprobs = out.generation.num_logprobs;
  }
  if (out.generation.max_tokens == 0) {
    if (!out.echo) refuse("max_tokens", "\"max_tokens\" is 0, which needs \"echo\": true");
    out.generation.num_prompt_logprobs = std::max(out.generation.num_prompt_logprobs, 0);
  }
  const bool add_special_tokens = fields.boolean("add_special_tokens", true);
  fields.only("suffix", "");
  // The best of several is not what is asked for unless it is all of them.
  if (const Json* best_of = fields.find("best_of");
      best_of && (!best_of->is_number_integer() || *best_of != out.n)) {
    refuse("best_of", "\"best_of\" is not supported by this server; leave it out or give n");
  }
  const Json* prompt = fields.find("prompt");
  fields.reject_unknown();
  if (prompt == nullptr) refuse("prompt", "\"prompt\" is missing");

  const auto add_text = [&](const Json& text) {
    check_bytes(model, text.get_ref<const std::string&>(), "prompt");
    out.prompts.push_back(
        encode(model, text.get_ref<const std::string&>(), add_special_tokens, "prompt"));
    out.log_text += text.get_ref<const std::string&>();
  };
  if (prompt->is_string()) {
    add_text(*prompt);
  } else if (prompt->is_array() && !prompt->empty()) {
    if (prompt->front().is_number()) {
      out.prompts.push_back(checked_ids("prompt", *prompt, model));
    } else {
      if (static_cast<int64_t>(prompt->size()) > limits.num_choices)
        refuse("prompt", "found {} prompts, expected at most {}", prompt->size(),
               limits.num_choices);
      for (const Json& item : *prompt) {
        if (item.is_string()) {
          add_text(item);
        } else if (item.is_array()) {
          out.prompts.push_back(checked_ids("prompt", item, model));
        } else {
          Fields::wrong("prompt", item, "a string or an array of token ids");
        }
      }
    }
  } else {
    Fields::wrong("prompt", *prompt, "a string, token ids, or a non-empty array of either");
  }
  check_lengths(&out, model, limits, "prompt");
  return out;
}

namespace {

// Parts of a message's content are texts: this server reads nothing else, and fetches nothing.
void check_content(const Json& content, const std::string& param) {
  if (content.is_string()) return;
  if (!content.is_array() || content.empty())
    refuse(param, "\"{}\" is {}, expected a string or an array of text parts", param,
           json_excerpt(content));
  for (const Json& part : content) {
    const bool object = part.is_object();
    const Json type = object ? part.value("type", Json()) : Json();
    if (!object || !is_text(type, "text") || !part.value("text", Json()).is_string())
      refuse(param,
             "\"{}\" has a part of type {}; only {{\"type\": \"text\", \"text\": ...}} is "
             "supported",
             param, json_excerpt(type));
  }
}

// One string in place of parts: templates that know only strings read every message then.
Json joined_content(const Json& content) {
  if (!content.is_array()) return content;
  std::string text;
  for (const Json& part : content) text += part["text"].get_ref<const std::string&>();
  return text;
}

// Templates may write it where a message begins: a line break there could begin another one.
bool is_name(const Json& name) {
  if (!name.is_string()) return false;
  const std::string& text = name.get_ref<const std::string&>();
  return !text.empty() && text.size() <= 64 && std::ranges::all_of(text, [](char c) {
    return static_cast<uint8_t>(c) >= 0x20 && c != 0x7F;
  });
}

Json checked_messages(const Json* messages, const ServerLimits& limits) {
  if (messages == nullptr) refuse("messages", "\"messages\" is missing");
  if (!messages->is_array() || messages->empty())
    Fields::wrong("messages", *messages, "a non-empty array");
  if (static_cast<int64_t>(messages->size()) > limits.num_messages)
    refuse("messages", "found {} messages, expected at most {}", messages->size(),
           limits.num_messages);
  Json out = Json::array();
  for (size_t i = 0; i < messages->size(); ++i) {
    const Json& message = (*messages)[i];
    const std::string where = fmt::format("messages[{}]", i);
    if (!message.is_object())
      refuse(where, "\"{}\" is {}, expected an object", where, json_excerpt(message));
    const Json role = message.value("role", Json());
    constexpr const char* kRoles[] = {"system", "user", "assistant", "tool", "developer"};
    if (!std::ranges::any_of(kRoles, [&](const char* known) { return is_text(role, known); })) {
      refuse(where + ".role",
             "\"{}.role\" is {}, expected system, developer, user, assistant or tool", where,
             json_excerpt(role));
    }
    if (const Json name = message.value("name", Json()); !name.is_null() && !is_name(name)) {
      refuse(where + ".name",
             "\"{}.name\" is {}, expected a string of 1 to 64 bytes without control characters",
             where, json_excerpt(name));
    }
    Json copy = message;
    const bool calls = message.contains("tool_calls") && message["tool_calls"].is_array() &&
                       !message["tool_calls"].empty();
    if (calls) refuse(where + ".tool_calls", "tool calls are not supported by this server");
    copy.erase("tool_calls");
    if (!message.contains("content"))
      refuse(where + ".content", "\"{}.content\" is missing", where);
    check_content(message["content"], where + ".content");
    copy["content"] = joined_content(message["content"]);
    out.push_back(std::move(copy));
  }
  return out;
}

ChatPrompt render_chat(const ServedModel& model, ChatInput input) {
  if (!model.text.chat_template) {
    refuse("messages",
           "this model has no chat template; use /v1/completions, or add chat_template.jinja to "
           "its folder");
  }
  try {
    return model.text.chat_template->render(input);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), "messages", "chat_template");
  }
}

std::vector<int32_t> encode_rendered(const ServedModel& model, const ChatPrompt& prompt) {
  try {
    return encode_chat(tokenizer_of(model, "messages"), prompt);
  } catch (const ApiError&) {
    throw;
  } catch (const Error& error) {
    refuse("messages", "{}", error.what());
  }
}

void read_chat_input(Fields& fields, const ServerLimits& limits, ChatInput* input) {
  if (const Json* extra = fields.find("chat_template_kwargs")) {
    if (!extra->is_object()) Fields::wrong("chat_template_kwargs", *extra, "an object");
    input->extra = *extra;
  }
  input->add_generation_prompt = fields.boolean("add_generation_prompt", true);
  input->messages = checked_messages(fields.find("messages"), limits);
}

}  // namespace

CompletionRequest parse_chat(const Json& body, const ServedModel& model, const ServerLimits& limits,
                             int64_t unix_time) {
  CompletionRequest out;
  out.chat = true;
  Fields fields(body);
  read_common(fields, model, limits, &out);
  const int64_t old_name = fields.integer("max_tokens", -1, 1, INT32_MAX);
  out.generation.max_tokens = fields.integer("max_completion_tokens", old_name, 1, INT32_MAX);
  out.logprobs = fields.boolean("logprobs", false);
  const Json* top_logprobs = fields.find("top_logprobs");
  if (top_logprobs && !out.logprobs)
    refuse("top_logprobs", "\"top_logprobs\" needs \"logprobs\": true");
  if (out.logprobs) {
    out.generation.num_logprobs = static_cast<int>(
        top_logprobs ? Fields::checked_integer("top_logprobs", *top_logprobs, 0, 20) : 0);
  }
  if (const Json* format = fields.find("response_format")) {
    if (!format->is_object() || !is_text(format->value("type", Json()), "text")) {
      refuse("response_format",
             "\"response_format\" is {}; this server writes free text only: leave it out or give "
             "{{\"type\": \"text\"}}",
             json_excerpt(*format));
    }
  }
  fields.only("tools", Json::array());
  fields.only("functions", Json::array());
  fields.only("tool_choice", "none");
  fields.only("modalities", Json::array({"text"}));
  fields.only("audio", Json::object());
  fields.only("verbosity", "medium");
  fields.ignore({"parallel_tool_calls"});
  ChatInput input;
  input.unix_time = unix_time;
  read_chat_input(fields, limits, &input);
  // Templates that know efforts read it by this name.
  if (const std::string effort = fields.text("reasoning_effort", 32); !effort.empty())
    input.extra["reasoning_effort"] = effort;
  fields.reject_unknown();
  out.log_text = dump(input.messages);
  const ChatPrompt prompt = render_chat(model, std::move(input));
  check_bytes(model, prompt.text, "messages");
  out.prompts.push_back(encode_rendered(model, prompt));
  check_lengths(&out, model, limits, "messages");
  return out;
}

Json tokenize_answer(const Json& body, const ServedModel& model, const ServerLimits& limits,
                     int64_t unix_time) {
  Fields fields(body);
  check_model(fields, model);
  const bool with_texts = fields.boolean("return_token_strs", false);
  std::vector<int32_t> ids;
  if (const Json* prompt = fields.find("prompt")) {
    if (!prompt->is_string()) Fields::wrong("prompt", *prompt, "a string");
    const bool add_special_tokens = fields.boolean("add_special_tokens", true);
    fields.reject_unknown();
    const std::string& text = prompt->get_ref<const std::string&>();
    check_bytes(model, text, "prompt");
    ids = encode(model, text, add_special_tokens, "prompt");
  } else {
    ChatInput input;
    input.unix_time = unix_time;
    if (body.contains("messages")) {
      read_chat_input(fields, limits, &input);
    } else {
      refuse("prompt", "\"prompt\" is missing");
    }
    fields.ignore({"add_special_tokens"});
    fields.reject_unknown();
    const ChatPrompt rendered = render_chat(model, std::move(input));
    check_bytes(model, rendered.text, "messages");
    ids = encode_rendered(model, rendered);
  }
  Json out = {{"count", ids.size()}, {"max_model_len", model.context}, {"tokens", ids}};
  if (with_texts) {
    Json texts = Json::array();
    for (const int32_t id : ids) texts.push_back(std::string(model.tokenizer->token_bytes(id)));
    out["token_strs"] = std::move(texts);
  }
  return out;
}

Json detokenize_answer(const Json& body, const ServedModel& model) {
  Fields fields(body);
  check_model(fields, model);
  const Json* tokens = fields.find("tokens");
  fields.reject_unknown();
  if (tokens == nullptr) refuse("tokens", "\"tokens\" is missing");
  if (!tokens->is_array()) Fields::wrong("tokens", *tokens, "an array of token ids");
  if (static_cast<int64_t>(tokens->size()) > model.context) {
    throw ApiError(400,
                   fmt::format("the context holds {} tokens, but \"tokens\" has {}", model.context,
                               tokens->size()),
                   "tokens", "context_length_exceeded");
  }
  const std::vector<int32_t> ids = checked_ids("tokens", *tokens, model);
  return {{"prompt", tokenizer_of(model, "tokens").decode(ids, false)}};
}

}  // namespace indexcache
