#include "server/http_server.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/string.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <list>
#include <thread>
#include <tuple>
#include <utility>

#include "base/log.h"
#include "server/auth.h"

// GCC 12 does not see that a coroutine frame is freed by the allocator that made it (GCC bug
// 100137).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif

namespace indexcache {

// In coroutines here no expression with co_await makes a temporary that needs a destructor: GCC 12
// destroys some of them twice (GCC bugs 99576, 100611, 102454).

namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using tcp = asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using boost::system::error_code;

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);
// How often a waiting request looks whether its client is still there.
constexpr auto kPresenceCheck = std::chrono::milliseconds(200);
constexpr uint64_t kSmallBody = 64 << 10;
// Descriptors that are left to the rest of the program, or half of them where there are few.
constexpr rlim_t kOwnDescriptors = 64;

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1e3));
}

ApiError out_of_memory() {
  ApiError error(503, "out of memory", {}, "out_of_memory");
  error.retry_after_seconds = 1;
  return error;
}

const char* reason_phrase(int status) {
  return http::obsolete_reason(static_cast<http::status>(status)).data();
}

std::string hex_id() {
  static std::atomic<uint64_t> next{
      static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())};
  // Mixed, so that ids of one server do not look alike.
  uint64_t z = next.fetch_add(1) * 0x9E3779B97F4A7C15ull;
  z ^= z >> 29;
  return fmt::format("{:016x}", z * 0xBF58476D1CE4E5B9ull);
}

// A timer that other threads can ring. It stays valid after its connection is gone.
struct Bell {
  explicit Bell(asio::io_context& io) : timer(io) {}
  asio::steady_timer timer;
  std::atomic<bool> rung{false};
};

// One of those that are open. It is idle while no byte of its next request has come, and when none
// is to come any more.
struct Connection {
  beast::tcp_stream* stream;
  bool idle = false, displaced = false;
};

int64_t descriptors_for_connections() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return INT64_MAX;
  const rlim_t left = limit.rlim_cur - std::min(limit.rlim_cur / 2, kOwnDescriptors);
  return static_cast<int64_t>(std::clamp<rlim_t>(left, 1, INT64_MAX));
}

// A part of what all bodies together may take, given back at its end.
class BodyShare {
 public:
  BodyShare(uint64_t& taken, uint64_t most) : taken_(taken), most_(most) {}
  ~BodyShare() { give_back(); }
  BodyShare(const BodyShare&) = delete;
  BodyShare& operator=(const BodyShare&) = delete;

  // One body larger than all may take together comes alone. Small ones do not count, so that
  // clients who are slow with large ones stop nobody else.
  bool take(uint64_t bytes) {
    if (bytes <= kSmallBody) return true;
    if (taken_ > 0 && taken_ + bytes > most_) return false;
    taken_ += bytes;
    mine_ = bytes;
    return true;
  }
  void give_back() { taken_ -= std::exchange(mine_, 0); }

 private:
  uint64_t& taken_;
  uint64_t most_, mine_ = 0;
};

}  // namespace

struct HttpServer::State {
  State(App& app_, const HttpServerOptions& options_)
      : app(app_), options(options_), acceptor(io) {}

  App& app;
  HttpServerOptions options;
  bool loopback = true;
  std::atomic<int64_t> answering{0};
  int64_t connections_limit = 0;
  std::list<Connection> connections;  // the idle ones in the order in which they became so
  int64_t num_connections = 0;        // without those displaced; both of the server's thread
  uint64_t bodies_bytes = 0;          // that bodies may take which are here; of the server's thread
  std::atomic<bool> stopping{false};
  asio::io_context io{1};  // its end is the end of the connections, which use what stands above
  asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
  tcp::acceptor acceptor;
  std::weak_ptr<bool> accepting;  // gone with the loop that accepts
  asio::thread_pool worker{1}, long_worker{1}, text_worker{1};
  std::thread thread;

  const ServerLimits& limits() const { return app.options().limits; }
  void log(const std::string& line) const { info("{}", line); }

  asio::thread_pool& worker_for(const HttpRequest& request);
  void run();
  asio::awaitable<void> accept_loop(std::shared_ptr<bool> alive);
  bool displace_longest_idle();
  void turn_away(tcp::socket socket);
  asio::awaitable<void> serve(beast::tcp_stream stream);

  struct Head {  // of a request, as far as answers depend on it
    HttpRequest request;
    bool http11 = true, keep_alive = true, head_only = false;
    std::string origin, wanted_headers;  // the second: of a preflight
    Clock::time_point begun = Clock::now();
    std::string peer;
  };
  using Parser = http::request_parser<http::string_body>;

  Head read_head(const Parser& parser) const;
  void check_headers(const Parser& parser, const Head& head) const;
  std::string head_text(const Head& head, const HttpResponse& response, bool chunked) const;
  void note_answer(const Head& head, int status, const AnswerNote& note);
  asio::awaitable<bool> write(beast::tcp_stream& stream, const std::string& text);
  asio::awaitable<bool> send(beast::tcp_stream& stream, const Head& head,
                             const HttpResponse& response, const AnswerNote& note);
  asio::awaitable<bool> send_exchange(beast::tcp_stream& stream, const Head& head, Answer& answer,
                                      Bell& bell);
  asio::awaitable<bool> answer_preflight(beast::tcp_stream& stream, const Head& head);
  std::string cors_origin(const std::string& origin) const;
};

// --- reading ---

HttpServer::State::Head HttpServer::State::read_head(const Parser& parser) const {
  const auto& message = parser.get();
  Head head;
  head.request.method = std::string(message.method_string());
  head.request.target = std::string(message.target());
  head.request.path = head.request.target.substr(0, head.request.target.find('?'));
  head.request.id = hex_id();
  if (message.count(http::field::authorization) == 1)
    head.request.authorization = std::string(message[http::field::authorization]);
  head.http11 = message.version() == 11;
  head.keep_alive = message.keep_alive();
  head.head_only = message.method() == http::verb::head;
  head.origin = std::string(message[http::field::origin]);
  head.wanted_headers = std::string(message[http::field::access_control_request_headers]);
  return head;
}

std::string HttpServer::State::cors_origin(const std::string& origin) const {
  for (const std::string& allowed : app.options().cors_origins) {
    if (allowed == "*") return "*";
    if (allowed == origin) return origin;
  }
  return {};
}

void HttpServer::State::check_headers(const Parser& parser, const Head& head) const {
  const auto& message = parser.get();
  if (message.version() != 11 && message.version() != 10)
    throw ApiError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here", {}, "http_version");
  const auto count = [&](http::field field) { return message.count(field); };
  if (count(http::field::transfer_encoding) > 0 && count(http::field::content_length) > 0)
    throw ApiError(400, "both Content-Length and Transfer-Encoding are given", {}, "bad_framing");
  // Any other coding leaves open where the body ends: what follows could pass for a request.
  if (count(http::field::transfer_encoding) > 0 &&
      (!head.http11 || !beast::iequals(message[http::field::transfer_encoding], "chunked"))) {
    throw ApiError(400, "the only Transfer-Encoding is chunked, in HTTP/1.1", {}, "bad_framing");
  }
  if (count(http::field::content_length) > 1 || count(http::field::transfer_encoding) > 1 ||
      count(http::field::host) > 1) {
    throw ApiError(400, "a header that must be single is repeated", {}, "bad_framing");
  }
  if (head.http11 && count(http::field::host) == 0)
    throw ApiError(400, "the Host header is missing", {}, "bad_host");
  for (const char c : head.request.target)
    if (static_cast<uint8_t>(c) <= 0x20 || c == 0x7F)
      throw ApiError(400, "the target holds a control character", {}, "bad_target");
  const std::string host(message[http::field::host]);
  if (loopback && count(http::field::host) > 0 && !is_loopback_host(host) &&
      !is_allowed_host(host, options.allowed_hosts)) {
    throw ApiError(
        403, fmt::format("the Host {} is not this server's (--allowed-host)", printable(host, 100)),
        {}, "foreign_host");
  }
  // A page of another origin may read nothing without CORS, and must not set anything off either.
  const bool same_origin =
      head.origin.empty() || head.origin == "http://" + host || head.origin == "https://" + host;
  if (!same_origin && cors_origin(head.origin).empty()) {
    throw ApiError(
        403, fmt::format("requests from {} are not taken (--cors)", printable(head.origin, 100)),
        {}, "foreign_origin");
  }
  if (count(http::field::content_encoding) > 0 &&
      message[http::field::content_encoding] != "identity")
    throw ApiError(415, "compressed bodies are not supported", {}, "content_encoding");
  if (const auto length = parser.content_length(); length && *length > limits().body_bytes) {
    throw ApiError(
        413,
        fmt::format("the body has {} bytes, expected at most {}", *length, limits().body_bytes), {},
        "body_too_large");
  }
}

// --- writing ---

std::string HttpServer::State::head_text(const Head& head, const HttpResponse& response,
                                         bool chunked) const {
  const bool keep = head.keep_alive && !stopping;
  std::string text =
      fmt::format("HTTP/1.1 {} {}\r\nContent-Type: {}\r\nX-Request-Id: {}\r\n", response.status,
                  reason_phrase(response.status), response.content_type, head.request.id);
  for (const auto& [name, value] : response.headers) text += fmt::format("{}: {}\r\n", name, value);
  text += "X-Content-Type-Options: nosniff\r\n";
  if (const std::string origin = cors_origin(head.origin);
      !head.origin.empty() && !origin.empty()) {
    text += fmt::format(
        "Access-Control-Allow-Origin: {}\r\nVary: Origin\r\n"
        "Access-Control-Expose-Headers: X-Request-Id, Retry-After, Retry-After-Ms\r\n",
        origin);
  }
  if (chunked) {
    text += "Transfer-Encoding: chunked\r\n";
  } else if (response.status != 204 && response.content_type != "text/event-stream") {
    text += fmt::format("Content-Length: {}\r\n", response.body.size());
  }
  if (!keep) {
    text += "Connection: close\r\n";
  } else if (!head.http11) {
    text += "Connection: keep-alive\r\n";
  }
  return text + "\r\n";
}

void HttpServer::State::note_answer(const Head& head, int status, const AnswerNote& note) {
  app.metrics().add_response(status);
  if (!options.access_log) return;
  const double seconds = std::chrono::duration<double>(Clock::now() - head.begun).count();
  log(access_line(options.log, head.request, status, seconds, note, head.peer));
}

asio::awaitable<bool> HttpServer::State::write(beast::tcp_stream& stream, const std::string& text) {
  stream.expires_after(milliseconds(limits().write_seconds));
  const auto [error, bytes] = co_await asio::async_write(stream, asio::buffer(text), kAwait);
  stream.expires_never();
  co_return !error;
}

// False when the connection is to be closed.
asio::awaitable<bool> HttpServer::State::send(beast::tcp_stream& stream, const Head& head,
                                              const HttpResponse& response,
                                              const AnswerNote& note) {
  note_answer(head, response.status, note);
  std::string text = head_text(head, response, false);
  if (!head.head_only) text += response.body;
  const bool sent = co_await write(stream, text);
  co_return sent&& head.keep_alive && !stopping;
}

asio::awaitable<bool> HttpServer::State::answer_preflight(beast::tcp_stream& stream,
                                                          const Head& head) {
  HttpResponse response;
  response.status = 204;
  // Clients add headers of their own, which do nothing here: a page is let in by its origin alone.
  const std::string allowed =
      head.wanted_headers.empty() ? "authorization, content-type" : head.wanted_headers;
  response.headers = {{"Access-Control-Allow-Methods", "GET, POST, OPTIONS"},
                      {"Access-Control-Allow-Headers", allowed},
                      {"Access-Control-Max-Age", "600"}};
  const AnswerNote note;
  const bool open = co_await send(stream, head, response, note);
  co_return open;
}

namespace {

// The peer has closed its side, or the connection is broken.
bool peer_is_gone(tcp::socket& socket) {
  tcp_info state = {};
  socklen_t size = sizeof state;
  if (getsockopt(socket.native_handle(), IPPROTO_TCP, TCP_INFO, &state, &size) != 0) return true;
  return state.tcpi_state != TCP_ESTABLISHED;
}

std::string chunk_of(const std::string& text) {
  return fmt::format("{:x}\r\n{}\r\n", text.size(), text);
}

}  // namespace

asio::awaitable<bool> HttpServer::State::send_exchange(beast::tcp_stream& stream, const Head& head,
                                                       Answer& answer, Bell& bell) {
  Exchange& exchange = *answer.exchange;
  Head answer_head = head;
  std::string text;
  if (exchange.streams()) {
    // HTTP/1.0 knows no chunks: there the end of the connection is the end of the body.
    if (!head.http11) answer_head.keep_alive = false;
    text = head_text(answer_head, answer.response, head.http11);
  }
  while (true) {
    bell.rung = false;
    Exchange::Progress progress;
    bool found_memory = true;
    try {
      progress = exchange.poll();
    } catch (const std::bad_alloc&) {
      found_memory = false;
    }
    if (!found_memory) {
      exchange.abort();
      const AnswerNote note = exchange.note();
      if (exchange.streams() && text.empty()) {  // its head has gone out
        note_answer(head, 500, note);
        co_return false;
      }
      const HttpResponse response = error_response(out_of_memory());
      const bool open = co_await send(stream, head, response, note);
      co_return open;
    }
    if (progress.done && !exchange.streams()) {
      // Long answers take time to write down, which belongs to no other connection.
      HttpResponse response;
      const auto build = [&]() -> asio::awaitable<void> {
        try {
          response = exchange.response();
        } catch (const std::bad_alloc&) {
          response = error_response(out_of_memory());
        }
        co_return;
      };
      co_await asio::co_spawn(worker, build, asio::use_awaitable);
      const AnswerNote note = exchange.note();
      const bool open = co_await send(stream, head, response, note);
      co_return open;
    }
    if (!progress.chunk.empty()) text += head.http11 ? chunk_of(progress.chunk) : progress.chunk;
    if (progress.done && !progress.failed && head.http11) text += "0\r\n\r\n";
    bool gone = false;
    if (!text.empty()) {
      const bool sent = co_await write(stream, text);
      gone = !sent;
      text.clear();
    }
    if (progress.done && !gone) {
      note_answer(head, progress.failed ? 500 : 200, exchange.note());
      co_return !progress.failed && answer_head.keep_alive && !stopping;
    }
    if (progress.more) {
      co_await asio::post(io, asio::use_awaitable);
    } else if (!gone && !bell.rung) {
      bell.timer.expires_after(kPresenceCheck);
      co_await bell.timer.async_wait(kAwait);
    }
    if (gone || peer_is_gone(stream.socket())) {
      exchange.abort();
      note_answer(head, 499, exchange.note());
      co_return false;
    }
  }
}

// --- connections ---

// Seconds of work on a long body, or on a text from which nothing is generated, are before no
// request that a client waits for token by token.
asio::thread_pool& HttpServer::State::worker_for(const HttpRequest& request) {
  if (!App::generates(request.path)) return text_worker;
  return request.body.size() > kSmallBody ? long_worker : worker;
}

asio::awaitable<void> HttpServer::State::serve(beast::tcp_stream stream) {
  struct Count {
    std::atomic<int64_t>& n;
    explicit Count(std::atomic<int64_t>& n_) : n(n_) { ++n; }
    ~Count() { --n; }
    Count(const Count&) = delete;
    Count& operator=(const Count&) = delete;
  };
  struct Place {
    State& state;
    std::list<Connection>::iterator at;
    Place(State& state_, beast::tcp_stream& stream_)
        : state(state_), at(state.connections.insert(state.connections.end(), {&stream_})) {
      ++state.num_connections;
    }
    ~Place() {
      if (!at->displaced) --state.num_connections;
      state.connections.erase(at);
    }
    void begin_idle() const {
      at->idle = true;
      state.connections.splice(state.connections.end(), state.connections, at);
    }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
  };
  const Place place(*this, stream);
  Connection& connection = *place.at;
  error_code ignored;
  stream.socket().set_option(tcp::no_delay(true), ignored);
  const auto endpoint = stream.socket().remote_endpoint(ignored);
  const std::string peer = ignored ? std::string("unknown") : endpoint.address().to_string();
  beast::flat_buffer buffer(limits().header_bytes + (64 << 10));
  for (bool open = true; open && !stopping;) {
    Parser parser;
    parser.header_limit(limits().header_bytes);
    parser.body_limit(limits().body_bytes);
    // The first byte may take its time; the rest of the header may not.
    if (buffer.size() == 0) {
      place.begin_idle();
      stream.expires_after(milliseconds(limits().idle_seconds));
      const auto [error, bytes] = co_await stream.async_read_some(buffer.prepare(4096), kAwait);
      connection.idle = false;
      if (error || connection.displaced) co_return;
      buffer.commit(bytes);
    }
    stream.expires_after(milliseconds(limits().header_seconds));
    auto [error, bytes] = co_await http::async_read_header(stream, buffer, parser, kAwait);
    const Count answer_in_work(answering);
    Head head = read_head(parser);
    head.peer = peer;
    std::optional<ApiError> refused;
    if (error) {
      // A deadline that has passed has closed the socket: there is nobody to answer.
      if (error == beast::error::timeout || error == http::error::end_of_stream ||
          error == asio::error::eof || error == asio::error::connection_reset ||
          error == asio::error::operation_aborted) {
        break;
      }
      head.keep_alive = false;
      if (error == http::error::header_limit || error == http::error::buffer_overflow) {
        refused.emplace(431,
                        fmt::format("the header has more than {} bytes", limits().header_bytes),
                        std::string(), "header_too_large");
      } else if (error == http::error::body_limit) {
        refused.emplace(413, fmt::format("the body has more than {} bytes", limits().body_bytes),
                        std::string(), "body_too_large");
      } else {
        refused.emplace(400, fmt::format("this is no HTTP request: {}", error.message()),
                        std::string(), "bad_http");
      }
    }
    bool preflight = false;
    BodyShare share(bodies_bytes, limits().bodies_bytes);
    if (!refused) {
      try {
        check_headers(parser, head);
        preflight = head.request.method == "OPTIONS" && !head.origin.empty() &&
                    !cors_origin(head.origin).empty();
        if (!preflight) app.check_head(head.request);
        if (!share.take(parser.chunked() ? limits().body_bytes
                                         : parser.content_length().value_or(0))) {
          ApiError full(503, "too many large bodies are being read at once", {},
                        "bodies_too_large");
          full.retry_after_seconds = 1;
          throw full;
        }
      } catch (const ApiError& wrong) {
        refused = wrong;
        // What follows the header is not read, so the connection cannot go on if there is a body.
        const bool has_body = parser.chunked() || parser.content_length().value_or(0) > 0;
        if (has_body || wrong.status == 400 || wrong.status == 413) head.keep_alive = false;
      }
    }
    const AnswerNote no_note;
    HttpResponse response;
    if (refused) {
      response = error_response(*refused);
      open = co_await send(stream, head, response, no_note);
      continue;
    }
    if (parser.get()[http::field::expect] == "100-continue") {
      const std::string go_on = "HTTP/1.1 100 Continue\r\n\r\n";
      open = co_await write(stream, go_on);
      if (!open) break;
    }
    stream.expires_after(milliseconds(limits().body_seconds));
    std::tie(error, bytes) = co_await http::async_read(stream, buffer, parser, kAwait);
    stream.expires_never();
    if (error) {
      head.keep_alive = false;
      if (error == http::error::body_limit) {
        refused.emplace(413, fmt::format("the body has more than {} bytes", limits().body_bytes),
                        std::string(), "body_too_large");
      } else if (error == beast::error::timeout || error == http::error::partial_message) {
        break;
      } else {
        refused.emplace(400, fmt::format("the body is not framed well: {}", error.message()),
                        std::string(), "bad_framing");
      }
      response = error_response(*refused);
      open = co_await send(stream, head, response, no_note);
      continue;
    }
    if (preflight) {
      open = co_await answer_preflight(stream, head);
      continue;
    }
    head.request.body = std::move(parser.get().body());

    // Parsing and tokenizing take time that belongs to no other connection. What has no body, as
    // /health, does not wait for that of others.
    auto bell = std::make_shared<Bell>(io);
    const Wake wake = [bell, this] {
      if (bell->rung.exchange(true)) return;
      try {
        asio::post(io, [bell] { bell->timer.cancel(); });
      } catch (const std::bad_alloc&) {  // kPresenceCheck will do
      }
    };
    Answer answer;
    const auto handle = [&]() -> asio::awaitable<void> {
      try {
        answer = app.handle(head.request, wake);
      } catch (const ApiError& wrong) {
        refused = wrong;
      } catch (const std::bad_alloc&) {
        refused = out_of_memory();
      } catch (const std::exception& wrong) {
        refused.emplace(500, wrong.what(), std::string(), "internal");
      }
      co_return;
    };
    if (head.request.method == "POST") {
      co_await asio::co_spawn(worker_for(head.request), handle, asio::use_awaitable);
    } else {
      co_await handle();
    }
    head.request.body.clear();
    head.request.body.shrink_to_fit();
    if (refused) {
      response = error_response(*refused);
      open = co_await send(stream, head, response, no_note);
    } else if (answer.exchange) {
      share.give_back();
      open = co_await send_exchange(stream, head, answer, *bell);
    } else {
      open = co_await send(stream, head, answer.response, no_note);
    }
  }
  // What the client still sends is taken for a moment, or the reset would eat the answer.
  stream.socket().shutdown(tcp::socket::shutdown_send, ignored);
  place.begin_idle();
  stream.expires_after(std::chrono::milliseconds(200));
  char rest[4096];
  for (int i = 0; i < 64; ++i) {
    const auto [error, bytes] = co_await stream.async_read_some(asio::buffer(rest), kAwait);
    if (error) break;
  }
}

// Makes room for another. False if all are busy.
bool HttpServer::State::displace_longest_idle() {
  for (Connection& connection : connections) {
    error_code ignored;
    // What has come and is not read yet is a request too.
    if (!connection.idle || connection.stream->socket().available(ignored) > 0) continue;
    connection.idle = false;
    connection.displaced = true;
    --num_connections;
    connection.stream->close();
    return true;
  }
  return false;
}

// Connections over the limit hear of it, if that can be done at once.
void HttpServer::State::turn_away(tcp::socket socket) {
  app.metrics().add_response(503);
  ApiError full(503, "too many connections", {}, "too_many_connections");
  full.retry_after_seconds = 1;
  Head head;
  head.keep_alive = false;
  const HttpResponse response = error_response(full);
  const std::string text = head_text(head, response, false) + response.body;
  error_code ignored;
  socket.non_blocking(true, ignored);
  socket.write_some(asio::buffer(text), ignored);
}

// Where Asio finds no memory for an operation, the coroutine that asked for it ends: a connection,
// or the loop that accepts them, which has to begin again.
void HttpServer::State::run() {
  while (!io.stopped()) {
    try {
      if (accepting.expired() && !stopping) {
        auto alive = std::make_shared<bool>(true);
        accepting = alive;
        asio::co_spawn(io, accept_loop(std::move(alive)), asio::detached);
      }
      io.run_for(kPresenceCheck);
    } catch (const std::bad_alloc&) {
    }
  }
}

asio::awaitable<void> HttpServer::State::accept_loop(std::shared_ptr<bool>) {
  asio::steady_timer pause(io);
  while (!stopping) {
    bool rest = false;
    try {
      auto [error, socket] = co_await acceptor.async_accept(kAwait);
      if (error == asio::error::operation_aborted) co_return;
      // Each client that left before it was greeted has used up its place in the queue.
      const bool left = error == asio::error::connection_aborted || error.value() == EPROTO;
      rest = error && !left;
      if (error == asio::error::no_descriptors) {  // of which accept() wants one to look at all
        displace_longest_idle();
      } else if (!error && num_connections >= connections_limit && !displace_longest_idle()) {
        turn_away(std::move(socket));
      } else if (!error) {
        asio::co_spawn(io, serve(beast::tcp_stream(std::move(socket))), asio::detached);
      }
    } catch (const std::bad_alloc&) {
      rest = true;
    }
    // Out of descriptors or memory: wait for some to be given back.
    if (rest) {
      pause.expires_after(std::chrono::milliseconds(20));
      co_await pause.async_wait(kAwait);
    }
  }
}

HttpServer::HttpServer(App& app, const HttpServerOptions& options)
    : state_(std::make_unique<State>(app, options)) {
  State& s = *state_;
  error_code error;
  const std::string host = options.host == "localhost" ? "127.0.0.1" : options.host;
  const auto address = asio::ip::make_address(host, error);
  if (error) fail("--host {}: expected an IP address or localhost", printable(options.host));
  s.loopback = address.is_loopback();
  const int64_t wanted = s.limits().connections;
  s.connections_limit = std::min(wanted, descriptors_for_connections());
  if (s.connections_limit < wanted) {
    s.log(event_line(options.log, "connections",
                     fmt::format("at most {} connections, not {}: the limit of open files "
                                 "(ulimit -n) allows no more",
                                 s.connections_limit, wanted)));
  }
  const tcp::endpoint endpoint(address, options.port);
  s.acceptor.open(endpoint.protocol(), error);
  if (!error) s.acceptor.set_option(asio::socket_base::reuse_address(true), error);
  // By itself Asio would wait for the next client, with others in the queue behind the one that
  // left.
  if (!error) s.acceptor.set_option(asio::socket_base::enable_connection_aborted(true), error);
  if (!error) s.acceptor.bind(endpoint, error);
  if (!error) s.acceptor.listen(asio::socket_base::max_listen_connections, error);
  if (error) {
    fail("cannot listen on {}:{}: {}", printable(options.host), options.port, error.message());
  }
}

HttpServer::~HttpServer() {
  if (state_->thread.joinable()) stop(0);
}

bool HttpServer::is_loopback() const { return state_->loopback; }

uint16_t HttpServer::port() const { return state_->acceptor.local_endpoint().port(); }

void HttpServer::start() {
  State& s = *state_;
  s.thread = std::thread([&s] { s.run(); });
}

void HttpServer::stop(double timeout_seconds) {
  State& s = *state_;
  s.stopping = true;
  asio::post(s.io, [&s] { s.acceptor.close(); });
  const auto deadline = Clock::now() + milliseconds(timeout_seconds);
  while (s.answering > 0 && Clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  s.io.stop();
  s.thread.join();
  for (asio::thread_pool* pool : {&s.worker, &s.long_worker, &s.text_worker}) pool->join();
}

}  // namespace indexcache
