// The routes: what each path answers. Before a model is given, /health says 503 and all else asks
// to come back.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "server/completion.h"

namespace indexcache {

struct AppOptions {
  std::vector<std::string> api_keys;      // none: everyone may
  std::vector<std::string> cors_origins;  // "*": all; none: CORS is off
  ServerLimits limits;
};

class App {
 public:
  explicit App(AppOptions options) : options_(std::move(options)) {}

  void set_model(std::shared_ptr<const ServedModel> model);
  // From now on /health says 503 and no request is taken.
  void set_draining() { draining_ = true; }

  static bool generates(const std::string& path);  // tokens, unlike /tokenize

  // What can be said before the body is read; throws ApiError.
  void check_head(const HttpRequest& request) const;
  // `wake` is called when an exchange of this answer has something new. Throws ApiError. May be
  // called from several threads.
  Answer handle(const HttpRequest& request, Wake wake);

  Metrics& metrics() { return metrics_; }
  const AppOptions& options() const { return options_; }

 private:
  std::shared_ptr<const ServedModel> model() const;  // null while loading
  std::shared_ptr<const ServedModel> ready_model() const;
  HttpResponse health() const;
  Answer complete(const HttpRequest& request, bool chat, Wake wake);

  AppOptions options_;
  Metrics metrics_;
  std::atomic<bool> draining_{false};
  mutable std::mutex mutex_;
  std::shared_ptr<const ServedModel> model_;
};

// The page at "/" (web/index.html, by way of CMake).
extern const std::string_view kServerPage;

}  // namespace indexcache
