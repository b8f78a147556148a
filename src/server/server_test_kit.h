// A stand-in for the engine, and a client that speaks raw bytes.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "base/log.h"
#include "server/http_server.h"
#include "text/byte_level.h"

namespace indexcache {

// Answers every prompt with the prompt itself, over and over: its tokens depend on nothing else.
// A prompt that begins with token 0 never gets an answer; with token 1, its logits are NaN; with
// token 2, the engine fails.
class EchoGenerator : public Generator {
 public:
  EchoGenerator() : thread_([this] { run(); }) {}
  ~EchoGenerator() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  uint64_t submit(GenerationRequest request, Scheduler::OnEvent on_event,
                  Refusal* refusal) override {
    ++num_submits;
    const std::lock_guard pass(gate);
    const std::lock_guard lock(mutex_);
    if (draining_) {
      *refusal = {Refusal::Kind::kDraining, "draining", 1};
      return 0;
    }
    if (static_cast<int64_t>(jobs_.size()) >= max_jobs) {
      *refusal = {Refusal::Kind::kQueueFull, "the queue is full", 0.25};
      ++stats_.refused;
      return 0;
    }
    if (until_bad_alloc-- == 0) throw std::bad_alloc();
    ++stats_.accepted;
    last_salt_ = request.cache_salt;
    jobs_[++last_id_] = {std::move(request), std::move(on_event), -1};
    changed_.notify_all();
    return last_id_;
  }

  void cancel(uint64_t id) override {
    const std::lock_guard lock(mutex_);
    const auto it = jobs_.find(id);
    if (it == jobs_.end()) return;
    it->second.on_event(finished(FinishReason::kCancelled));
    jobs_.erase(it);
    ++stats_.cancelled;
    changed_.notify_all();
  }

  bool drain(double timeout_seconds) override {
    std::unique_lock lock(mutex_);
    draining_ = true;
    const bool done = changed_.wait_for(lock, std::chrono::duration<double>(timeout_seconds),
                                        [&] { return jobs_.empty(); });
    for (auto& [id, job] : jobs_) job.on_event(finished(FinishReason::kDrained));
    jobs_.clear();
    return done;
  }

  SchedulerStats stats() const override {
    const std::lock_guard lock(mutex_);
    SchedulerStats stats = stats_;
    stats.running = static_cast<int64_t>(jobs_.size());
    stats.pages = stats.free_pages = 8;
    stats.fault = fault_;
    return stats;
  }

  std::string last_salt() const {
    const std::lock_guard lock(mutex_);
    return last_salt_;
  }

  bool wait_until_idle() const {
    for (int i = 0; i < 500; ++i) {
      if (stats().running == 0) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }

  std::atomic<int64_t> max_jobs = 256;
  std::atomic<int64_t> step_microseconds = 0;
  std::atomic<int64_t> num_submits = 0;
  std::mutex gate;                            // held by a test: submit() waits
  std::atomic<int64_t> until_bad_alloc = -1;  // requests, before one finds no memory

 private:
  struct Job {
    GenerationRequest request;
    Scheduler::OnEvent on_event;
    int64_t done = -1;  // tokens; -1: the prompt is not done
  };

  static GenerationEvent finished(FinishReason reason) {
    GenerationEvent event;
    event.kind = GenerationEvent::Kind::kFinished;
    event.reason = reason;
    return event;
  }

  static TokenLogprob logprob(int32_t token, int n) {
    TokenLogprob out;
    out.token = token;
    out.logprob = -0.25 - token / 3.0;
    for (int i = 0; i < n; ++i) out.top.emplace_back((token + i) % 256, out.logprob - i / 7.0);
    return out;
  }

  // One event of one job; true when the job has ended.
  bool advance(Job& job) {
    const GenerationRequest& request = job.request;
    const auto& prompt = request.prompt;
    GenerationEvent event;
    if (prompt[0] == 0) return false;
    if (prompt[0] == 1 || prompt[0] == 2) {
      if (prompt[0] == 2) fault_ = "the test broke it";
      event = finished(prompt[0] == 1 ? FinishReason::kNanLogits : FinishReason::kEngineFault);
      event.message = "broken on purpose";
      job.on_event(std::move(event));
      return true;
    }
    if (job.done < 0) {
      event.kind = GenerationEvent::Kind::kPromptDone;
      if (request.num_prompt_logprobs >= 0)
        for (size_t i = 1; i < prompt.size(); ++i)
          event.prompt_logprobs.push_back(logprob(prompt[i], request.num_prompt_logprobs));
      job.done = 0;
      stats_.prompt_tokens += static_cast<int64_t>(prompt.size());
      job.on_event(std::move(event));
      return false;
    }
    if (job.done >= request.max_tokens) {
      job.on_event(finished(FinishReason::kLength));
      ++stats_.finished;
      return true;
    }
    event.token = prompt[static_cast<size_t>(job.done) % prompt.size()];
    if (job.done >= request.min_tokens &&
        std::ranges::find(request.stop_tokens, event.token) != request.stop_tokens.end()) {
      job.on_event(finished(FinishReason::kStop));
      ++stats_.finished;
      return true;
    }
    if (request.num_logprobs >= 0) event.logprob = logprob(event.token, request.num_logprobs);
    ++job.done;
    ++stats_.generated_tokens;
    job.on_event(std::move(event));
    return false;
  }

  void run() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      bool moved = false;
      for (auto it = jobs_.begin(); it != jobs_.end();) {
        if (it->second.request.prompt[0] != 0) moved = true;
        bool ended = false;
        try {
          ended = advance(it->second);
        } catch (const std::bad_alloc&) {  // the test's concern is the server: once more
        }
        it = ended ? jobs_.erase(it) : std::next(it);
      }
      changed_.notify_all();
      if (const int64_t step = step_microseconds; step > 0) {
        lock.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(step));
        lock.lock();
      } else if (!moved) {
        changed_.wait_for(lock, std::chrono::milliseconds(5));
      }
    }
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, Job> jobs_;
  uint64_t last_id_ = 0;
  SchedulerStats stats_;
  std::string fault_, last_salt_;
  bool stop_ = false, draining_ = false;
  std::thread thread_;
};

// A model of bytes: token ids are the bytes of its text.
inline std::shared_ptr<ServedModel> byte_model(Generator* generator) {
  auto model = std::make_shared<ServedModel>();
  model->name = "bytes";
  model->generator = generator;
  model->tokenizer = Tokenizer::parse(byte_level_tokenizer_json(260), "test");
  model->longest_token = longest_token_bytes(*model->tokenizer);
  model->text.chat_template.emplace("{% for m in messages %}{{ m.content }}{% endfor %}", "test",
                                    Json::object());
  model->context = 4096;
  model->vocab_size = 260;
  model->eos_tokens = {256};
  model->plan = "FFSS";
  return model;
}

// A connection that sends what it is told and reads what comes.
class RawClient {
 public:
  explicit RawClient(uint16_t port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  ~RawClient() { close(); }
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }

  // One answer; empty if none comes in time. What follows it is kept for the next call.
  std::string receive(double seconds = 10, bool head_only = false) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (true) {
      if (const size_t size = answer_size(head_only); size > 0) {
        std::string answer = buffer_.substr(0, size);
        buffer_.erase(0, size);
        return answer;
      }
      if (closed_ || std::chrono::steady_clock::now() > deadline) return std::exchange(buffer_, {});
      read_some();
    }
  }

  bool closed_by_peer(double seconds = 5) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (!closed_ && std::chrono::steady_clock::now() < deadline) read_some();
    return closed_;
  }

  int fd() const { return fd_; }
  bool connected() const { return connected_; }

 private:
  void read_some() {
    pollfd waiting = {fd_, POLLIN, 0};
    if (poll(&waiting, 1, 50) <= 0) return;
    char bytes[65536];
    const ssize_t n = recv(fd_, bytes, sizeof bytes, 0);
    if (n <= 0) {
      closed_ = true;
    } else {
      buffer_.append(bytes, static_cast<size_t>(n));
    }
  }

  // Of the complete answer at the beginning of the buffer; 0 if it is not complete.
  size_t answer_size(bool head_only) const {
    const size_t head = buffer_.find("\r\n\r\n");
    if (head == std::string::npos) return 0;
    if (head_only || buffer_.starts_with("HTTP/1.1 100")) return head + 4;
    const size_t field = buffer_.find("\r\nContent-Length: ");
    if (field < head) {
      const size_t size = head + 4 + std::stoul(buffer_.substr(field + 18));
      return buffer_.size() >= size ? size : 0;
    }
    if (buffer_.find("\r\nTransfer-Encoding: chunked") < head) {
      const size_t end = buffer_.find("\r\n0\r\n\r\n", head);
      return end == std::string::npos ? 0 : end + 7;
    }
    return buffer_.starts_with("HTTP/1.1 204") ? head + 4 : 0;
  }

  int fd_;
  bool connected_ = false, closed_ = false;
  std::string buffer_;
};

inline int status_of(const std::string& answer) {
  return answer.starts_with("HTTP/1.1 ") ? std::stoi(answer.substr(9, 3)) : 0;
}
inline std::string body_of(const std::string& answer) {
  const size_t head = answer.find("\r\n\r\n");
  return head == std::string::npos ? "" : answer.substr(head + 4);
}
// The data of a chunked body.
inline std::string unchunked(std::string_view body) {
  std::string out;
  while (!body.empty()) {
    const size_t line = body.find("\r\n");
    if (line == body.npos) break;
    const size_t size = std::stoul(std::string(body.substr(0, line)), nullptr, 16);
    if (size == 0 || body.size() < line + 2 + size) break;
    out += body.substr(line + 2, size);
    body.remove_prefix(std::min(body.size(), line + 4 + size));
  }
  return out;
}
// An answer without what differs from request to request.
inline std::string without_ids(std::string body) {
  for (const char* name : {"\"id\":\"", "\"created\":"}) {
    for (size_t at = 0; (at = body.find(name, at)) != std::string::npos;) {
      at += std::strlen(name);
      body.erase(at, body.find_first_of("\",", at) - at);
    }
  }
  return body;
}

inline std::string post(const std::string& path, const std::string& body,
                        const std::string& headers = "") {
  return "POST " + path +
         " HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + std::to_string(body.size()) + "\r\n" +
         headers + "\r\n" + body;
}
inline std::string get(const std::string& path, const std::string& headers = "") {
  return "GET " + path + " HTTP/1.1\r\nHost: localhost\r\n" + headers + "\r\n";
}

struct TestServer {
  explicit TestServer(AppOptions app_options = {}, HttpServerOptions http_options = {})
      : app(std::move(app_options)), http(app, quiet(http_options)) {
    app.set_model(byte_model(&generator));
    http.start();
  }
  static HttpServerOptions quiet(HttpServerOptions options) {
    options.port = 0;
    options.access_log = false;
    return options;
  }

  std::string ask(const std::string& request, double seconds = 10) {
    RawClient client(http.port());
    EXPECT_TRUE(client.connected());
    client.send(request);
    return client.receive(seconds);
  }

  EchoGenerator generator;  // outlives what uses it
  App app;
  HttpServer http;
};

}  // namespace indexcache
