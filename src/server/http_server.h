// Connections. Bytes from the network are parsed, limited and timed here, and nowhere else: a
// request reaches the routes (server/app.h) only when it is complete.
//
// Rules: one thread for all connections; parsing and tokenizing bodies is done on three more, one
// for requests that generate, one for those of them over 64 KiB, and one for /tokenize and
// /detokenize, so that none of these waits for a longer kind. A request
// header, a body and the client's reading each have a deadline; headers, bodies and the number of
// connections have limits. Where there is no room for another connection, the one that has been
// idle the longest is closed, and if all are busy the new one gets 503. Both Content-Length and
// Transfer-Encoding in one request, folded or repeated framing headers and bytes that are not HTTP
// are 400 and the end of the connection. A client that closes its side is gone: its request is
// cancelled.
#pragma once

#include <memory>
#include <string>

#include "server/access_log.h"
#include "server/app.h"

namespace indexcache {

struct HttpServerOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 8080;                    // 0: any free one
  std::vector<std::string> allowed_hosts;  // Host headers taken beside loopback names
  LogOptions log;
  bool access_log = true;
};

class HttpServer {
 public:
  // Binds and listens. Error when that is not possible. `app` outlives the server.
  HttpServer(App& app, const HttpServerOptions& options);
  ~HttpServer();  // closes what is still open
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  uint16_t port() const;
  bool is_loopback() const;  // only this machine reaches it
  void start();              // serves on threads of its own
  // Lets answers go out that are being made, at most for so long, then closes everything.
  void stop(double timeout_seconds);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace indexcache
