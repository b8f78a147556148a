// A request and its answer, without any HTTP library: what connections (server/http_server.h) and
// the routes (server/app.h) tell each other.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace indexcache {

struct HttpRequest {
  std::string method;         // "GET"
  std::string target;         // as it was sent
  std::string path;           // the target up to '?', nothing decoded
  std::string authorization;  // empty: none, or more than one
  std::string body;
  std::string id;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers;
  std::string body;
};

// What the log says of an answer beside its status.
struct AnswerNote {
  int64_t prompt_tokens = -1, generated_tokens = -1;  // -1: none
  std::string finish;
  std::string prompt;  // only with --log-prompts
};

// An answer that is made while others are. All of it is called on the server's thread.
class Exchange {
 public:
  virtual ~Exchange() = default;

  struct Progress {
    std::string chunk;  // more of a streamed body
    bool more = false;  // there is more already: call again without waiting
    bool done = false;
    bool failed = false;  // a streamed body ends here, without its proper end
  };
  // What is new since the last call; call again after `wake` was called. bad_alloc if some of it
  // was lost for want of memory, which is final: abort(). When it is done and streams() is false,
  // response() is the answer.
  virtual Progress poll() = 0;
  virtual bool streams() const = 0;
  virtual HttpResponse response() = 0;
  virtual AnswerNote note() const = 0;
  virtual void abort() = 0;  // the client is gone
};

struct Answer {
  HttpResponse response;  // with a streaming exchange: its status and headers
  std::unique_ptr<Exchange> exchange;
};

// Called from any thread.
using Wake = std::function<void()>;

}  // namespace indexcache
