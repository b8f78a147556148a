#include "server/app.h"

#include <algorithm>
#include <ctime>

#include "server/auth.h"

namespace indexcache {

namespace {

struct Route {
  const char* path;
  const char* method;  // a GET route answers HEAD too
};

constexpr const char* kCompletions = "/v1/completions";
constexpr const char* kChatCompletions = "/v1/chat/completions";

constexpr Route kRoutes[] = {
    {"/", "GET"},
    {"/health", "GET"},
    {"/metrics", "GET"},
    {"/tokenizer_info", "GET"},
    {"/v1/models", "GET"},
    {"/tokenize", "POST"},
    {"/detokenize", "POST"},
    {kCompletions, "POST"},
    {kChatCompletions, "POST"},
};

HttpResponse json_response(const Json& json) {
  HttpResponse response;
  response.body = dump(json);
  return response;
}

HttpResponse models_response(const ServedModel& model) {
  return json_response({{"object", "list"},
                        {"data", Json::array({{{"id", model.name},
                                               {"object", "model"},
                                               {"created", model.started},
                                               {"owned_by", "indexcache"},
                                               {"max_model_len", model.context},
                                               {"index_plan", model.plan}}})}});
}

HttpResponse tokenizer_info_response(const ServedModel& model) {
  Json info = model.text.tokenizer_config;
  if (!info.contains("eos_token")) {
    Json eos;
    if (model.tokenizer && !model.eos_tokens.empty())
      eos = std::string(model.tokenizer->token_bytes(model.eos_tokens[0]));
    info["eos_token"] = eos;
  }
  return json_response(info);
}

}  // namespace

void App::set_model(std::shared_ptr<const ServedModel> model) {
  const std::lock_guard lock(mutex_);
  model_ = std::move(model);
}

std::shared_ptr<const ServedModel> App::model() const {
  const std::lock_guard lock(mutex_);
  return model_;
}

std::shared_ptr<const ServedModel> App::ready_model() const {
  auto ready = model();
  if (ready) return ready;
  ApiError error(503, "the model is being loaded", {}, "loading");
  error.retry_after_seconds = 1;
  throw error;
}

bool App::generates(const std::string& path) {
  return path == kCompletions || path == kChatCompletions;
}

void App::check_head(const HttpRequest& request) const {
  if (!is_authorized(request.path, request.authorization, options_.api_keys)) {
    throw ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", {},
                   "invalid_api_key");
  }
  const auto route =
      std::ranges::find_if(kRoutes, [&](const Route& known) { return request.path == known.path; });
  if (route == std::end(kRoutes)) {
    throw ApiError(404, fmt::format("no such path: {}", printable(request.path, 200)), {},
                   "unknown_path");
  }
  const bool get = std::string_view(route->method) == "GET";
  if (request.method != route->method && !(get && request.method == "HEAD")) {
    ApiError error(405,
                   fmt::format("{} takes {}, not {}", route->path, get ? "GET" : "POST",
                               printable(request.method, 20)),
                   {}, "method_not_allowed");
    error.allow = get ? "GET, HEAD" : "POST";
    throw error;
  }
}

HttpResponse App::health() const {
  const auto served = model();
  const std::string fault = served ? served->generator->stats().fault : std::string();
  const char* status = !served          ? "loading"
                       : !fault.empty() ? "fault"
                       : draining_      ? "draining"
                                        : "ok";
  if (std::string_view(status) == "ok") return json_response({{"status", status}});
  ApiError error(503,
                 !served          ? "the model is being loaded"
                 : !fault.empty() ? "the engine failed: " + fault
                                  : "the server is shutting down",
                 {}, status);
  if (fault.empty()) error.retry_after_seconds = 1;
  return error_response(error);
}

Answer App::handle(const HttpRequest& request, Wake wake) {
  check_head(request);
  const std::string& path = request.path;
  if (path == "/health") return {health(), nullptr};
  if (path == "/") {
    HttpResponse page;
    page.content_type = "text/html; charset=utf-8";
    page.headers = {{"Content-Security-Policy",
                     "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                     "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                     "frame-ancestors 'none'"},
                    {"Cache-Control", "no-cache"}};
    page.body = std::string(kServerPage);
    return {std::move(page), nullptr};
  }
  const auto served = ready_model();
  if (path == "/metrics") {
    HttpResponse response;
    response.content_type = "text/plain; version=0.0.4; charset=utf-8";
    response.body = metrics_.text(served->generator->stats(), served->name, served->plan);
    return {std::move(response), nullptr};
  }
  if (path == "/v1/models") return {models_response(*served), nullptr};
  if (path == "/tokenizer_info") return {tokenizer_info_response(*served), nullptr};
  if (path == "/tokenize") {
    const Json body = parse_body(request.body, options_.limits);
    return {json_response(tokenize_answer(body, *served, options_.limits, time(nullptr))), nullptr};
  }
  if (path == "/detokenize") {
    const Json body = parse_body(request.body, options_.limits);
    return {json_response(detokenize_answer(body, *served)), nullptr};
  }
  return complete(request, path == kChatCompletions, std::move(wake));
}

Answer App::complete(const HttpRequest& request, bool chat, Wake wake) {
  const auto served = ready_model();
  if (draining_) {
    ApiError error(503, "the server is shutting down", {}, "shutting_down");
    error.retry_after_seconds = 1;
    throw error;
  }
  const int64_t now = time(nullptr);
  const Json body = parse_body(request.body, options_.limits);
  CompletionRequest parsed = chat ? parse_chat(body, *served, options_.limits, now)
                                  : parse_completion(body, *served, options_.limits);
  // Who holds one key learns nothing of the prompts of another, by time or by usage.
  parsed.generation.cache_salt = fmt::format(
      "{}:{}", key_number(request.authorization, options_.api_keys), parsed.generation.cache_salt);
  const bool stream = parsed.stream;
  Answer answer;
  answer.exchange = std::make_unique<Completion>(served, metrics_, std::move(parsed),
                                                 (chat ? "chatcmpl-" : "cmpl-") + request.id, now,
                                                 std::move(wake));
  if (stream) {
    answer.response.content_type = "text/event-stream";
    answer.response.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}};
  }
  return answer;
}

}  // namespace indexcache
