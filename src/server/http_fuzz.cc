// Random bytes on a connection. Whatever they are, what comes back is a row of whole HTTP answers,
// errors in the API's form, and the next client gets the same good answer as ever. A second server
// gets the same bytes and has a key: who does not give it gets 200 for /health and the page alone.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/log.h"
#include "server/http_server.h"
#include "text/byte_level.h"

using namespace indexcache;

namespace {

void require(bool holds, const char* what, std::string_view seen = {}) {
  if (holds) return;
  fmt::print(stderr, "{}: {}\n", what, printable(seen, 2000));
  std::abort();
}

// Answers at once with the end of the prompt, so that nothing depends on time.
class QuickGenerator : public Generator {
 public:
  uint64_t submit(GenerationRequest request, Scheduler::OnEvent on_event, Refusal*) override {
    GenerationEvent event;
    event.kind = GenerationEvent::Kind::kPromptDone;
    const auto logprob = [](int32_t token) { return TokenLogprob{token, -1, 0, {{token, -1}}}; };
    if (request.num_prompt_logprobs >= 0)
      for (size_t i = 1; i < request.prompt.size(); ++i)
        event.prompt_logprobs.push_back(logprob(request.prompt[i]));
    on_event(std::move(event));
    for (int64_t i = 0; i < std::min<int64_t>(request.max_tokens, 3); ++i) {
      GenerationEvent token;
      token.token = request.prompt.back();
      if (request.num_logprobs >= 0) token.logprob = logprob(token.token);
      on_event(std::move(token));
    }
    GenerationEvent end;
    end.kind = GenerationEvent::Kind::kFinished;
    on_event(std::move(end));
    return ++last_id_;
  }
  void cancel(uint64_t) override {}
  bool drain(double) override { return true; }
  SchedulerStats stats() const override { return {}; }

 private:
  std::atomic<uint64_t> last_id_{0};
};

const std::string kKey = "secret", kHealth = R"({"status":"ok"})";

struct FuzzedServer {
  explicit FuzzedServer(const std::vector<std::string>& api_keys)
      : app(app_options(api_keys)), http(app, http_options()) {
    auto model = std::make_shared<ServedModel>();
    model->name = "bytes";
    model->generator = &generator;
    model->tokenizer = Tokenizer::parse(byte_level_tokenizer_json(260), "fuzz");
    model->text.chat_template.emplace("{% for m in messages %}{{ m.content }}{% endfor %}", "fuzz",
                                      Json::object());
    model->context = 4096;
    model->vocab_size = 260;
    model->longest_token = longest_token_bytes(*model->tokenizer);
    model->eos_tokens = {256};
    model->plan = "FFSS";
    app.set_model(std::move(model));
    http.start();
  }
  static AppOptions app_options(const std::vector<std::string>& api_keys) {
    AppOptions options;
    options.api_keys = api_keys;
    options.cors_origins = {"https://app.example"};
    options.limits.header_bytes = 4096;
    options.limits.body_bytes = 16384;
    return options;
  }
  static HttpServerOptions http_options() {
    HttpServerOptions options;
    options.port = 0;
    options.access_log = false;
    return options;
  }

  QuickGenerator generator;
  App app;
  HttpServer http;
};

// The fuzzer's own alarm interrupts calls.
int connect_to(uint16_t port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  while (true) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    require(fd >= 0, "no socket", strerror(errno));
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return fd;
    require(errno == EINTR, "the server takes no connection", strerror(errno));
    close(fd);
  }
}

std::string answers_to(uint16_t port, std::string_view bytes) {
  const int fd = connect_to(port);
  while (!bytes.empty()) {
    const ssize_t sent = TEMP_FAILURE_RETRY(send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL));
    if (sent <= 0) break;  // refused before all of it was read
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  shutdown(fd, SHUT_WR);
  std::string answer;
  char part[65536];
  for (ssize_t n; (n = TEMP_FAILURE_RETRY(recv(fd, part, sizeof part, 0))) > 0;)
    answer.append(part, static_cast<size_t>(n));
  // No TIME_WAIT, or the ports run out.
  const linger at_once = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  close(fd);
  return answer;
}

// Takes the bytes of a chunked body off `rest`.
void take_chunks(std::string_view& rest) {
  while (true) {
    const size_t line = rest.find("\r\n");
    require(line != rest.npos && line > 0, "a chunk has no size", rest);
    const size_t size = std::stoul(std::string(rest.substr(0, line)), nullptr, 16);
    require(rest.size() >= line + 2 + size + 2, "a chunk is cut off", rest);
    rest.remove_prefix(line + 2 + size);
    require(rest.starts_with("\r\n"), "a chunk is longer than it says", rest);
    rest.remove_prefix(2);
    if (size == 0) return;
  }
}

// What anyone may see: the page, and that the server is well. Without a body its length tells.
bool is_public(const std::string& head, std::string_view body, bool with_head) {
  if (head.find("\r\nContent-Type: text/html") != head.npos) return true;
  return head.find(fmt::format("\r\nContent-Length: {}\r\n", kHealth.size())) != head.npos &&
         (with_head || body.starts_with(kHealth));
}

// An answer to HEAD has a length but no body: bytes that begin another answer or nothing at all.
void check_answers(const std::string& answer, bool with_head, bool only_public) {
  std::string_view rest = answer;
  while (!rest.empty()) {
    require(rest.starts_with("HTTP/1.1 ") && rest.size() > 12, "no HTTP answer", rest);
    const int status = std::stoi(std::string(rest.substr(9, 3)));
    require(status == 100 || (status >= 200 && status < 600), "a strange status", rest);
    require(status != 500, "a fault inside", rest);
    const size_t end = rest.find("\r\n\r\n");
    require(end != rest.npos, "a head without end", rest);
    const std::string head(rest.substr(0, end + 2));
    rest.remove_prefix(end + 4);
    require(!only_public || status != 200 || is_public(head, rest, with_head),
            "an answer without a key", answer);
    if (head.find("\r\nTransfer-Encoding: chunked\r\n") != head.npos) {
      take_chunks(rest);
      continue;
    }
    const size_t field = head.find("\r\nContent-Length: ");
    if (field == head.npos) {
      // A stream to a client of HTTP/1.0 ends with its connection.
      if (head.find("text/event-stream") != head.npos) return;
      require(status == 100 || status == 204, "a body without length", head);
      continue;
    }
    const size_t length = std::stoul(head.substr(field + 18));
    if (with_head && (rest.empty() || rest.starts_with("HTTP/1.1 "))) continue;
    require(rest.size() >= length, "a body is cut off", rest);
    if (status >= 400) {
      const Json body = parse_json(rest.substr(0, length), "answer");
      for (const char* name : {"message", "type", "param", "code"})
        require(body.at("error").contains(name), "an error of another shape", rest);
    }
    rest.remove_prefix(length);
  }
}

std::string good_answer(uint16_t port, const std::string& headers = {}) {
  const std::string body = R"({"prompt": "hello", "max_tokens": 3, "temperature": 0})";
  std::string answer = answers_to(
      port,
      fmt::format(
          "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n{}\r\n{}",
          body.size(), headers, body));
  // Ids and times differ.
  const size_t choices = answer.find("\"choices\"");
  require(answer.starts_with("HTTP/1.1 200 ") && choices != answer.npos, "no good answer", answer);
  const size_t end = answer.find("]", choices);
  return answer.substr(choices, end - choices);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static FuzzedServer plain({}), keyed({kKey});
  static const std::string good = good_answer(plain.http.port());
  static const std::string key = "Authorization: Bearer " + kKey + "\r\n";
  static int count = 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const bool with_head = bytes.find("HEAD") != bytes.npos;
  check_answers(answers_to(plain.http.port(), bytes), with_head, false);
  check_answers(answers_to(keyed.http.port(), bytes), with_head, bytes.find(kKey) == bytes.npos);
  if (++count % 32 == 0) {
    require(good_answer(plain.http.port()) == good, "a good request got another answer");
    require(good_answer(keyed.http.port(), key) == good, "a good request got another answer");
  }
  return 0;
}
