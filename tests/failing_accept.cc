// Preloaded into a server: each connection finds accept() failing with one errno of the list
// ACCEPT_ERRORS after another, until the list is through.
#include <dlfcn.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>

namespace {

std::atomic<const char*> errors_left{nullptr};

// 0: the list is through.
int next_error() {
  const char* left = errors_left;
  if (left == nullptr) left = std::getenv("ACCEPT_ERRORS");
  if (left == nullptr) return 0;
  char* end = nullptr;
  const int error = static_cast<int>(std::strtol(left, &end, 10));
  errors_left = *end == ',' ? end + 1 : end;
  return error;
}

}  // namespace

extern "C" int accept(int listener, sockaddr* address, socklen_t* length) {
  using Accept = int (*)(int, sockaddr*, socklen_t*);
  static const auto real = reinterpret_cast<Accept>(dlsym(RTLD_NEXT, "accept"));
  pollfd waiting = {listener, POLLIN, 0};
  if (poll(&waiting, 1, 0) == 1) {
    if (const int error = next_error(); error != 0) {
      errno = error;
      return -1;
    }
  }
  return real(listener, address, length);
}
