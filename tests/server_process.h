// A server that runs as a program of its own, and the small random model that it serves.
#pragma once

#include <cstdlib>
#include <functional>

#include "server/server_test_kit.h"
#include "tests/program.h"

namespace indexcache {

// A small random model, made once.
inline const std::string& model_folder() {
  static const std::string folder = [] {
    std::string pattern = ::testing::TempDir() + "/server-XXXXXX";
    std::string path = std::string(mkdtemp(pattern.data())) + "/tiny";
    const ProgramResult made = run_program({"synth", "tiny", "--layers", "4", "-o", path});
    EXPECT_EQ(made.exit_code, 0) << made.err;
    return path;
  }();
  return folder;
}

class Server {
 public:
  // `prepare` runs in the new process before the program.
  explicit Server(std::vector<std::string> flags,
                  const std::vector<std::pair<std::string, std::string>>& environment = {},
                  const std::function<void()>& prepare = {})
      : log_(memfd_create("log", MFD_CLOEXEC)) {
    flags.insert(flags.begin(), "serve");
    std::vector<char*> argv = {const_cast<char*>(INDEXCACHE_BINARY)};
    for (const std::string& flag : flags) argv.push_back(const_cast<char*>(flag.c_str()));
    argv.push_back(nullptr);
    child_ = fork();
    if (child_ == 0) {
      dup2(log_, STDERR_FILENO);
      for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
      if (prepare) prepare();
      execv(INDEXCACHE_BINARY, argv.data());
      _exit(127);
    }
  }
  ~Server() {
    if (child_ > 0) {
      ::kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
    ::close(log_);
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  bool wait_for_log(const std::string& text) {
    for (int i = 0; i < 3000; ++i) {
      if (log().find(text) != std::string::npos) return true;
      if (i > 100 && i % 50 == 0 && ::kill(child_, 0) != 0) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
  bool listening() {
    constexpr const char* kWhere = "listening on http://127.0.0.1:";
    if (!wait_for_log(kWhere)) return false;
    const std::string text = log();
    port_ = static_cast<uint16_t>(std::stoi(text.substr(text.find(kWhere) + strlen(kWhere))));
    return true;
  }
  bool ready() { return listening() && wait_for_log("serving "); }
  std::string log() const { return read_fd(log_); }
  uint16_t port() const { return port_; }
  std::string ask(const std::string& request) {
    RawClient client(port_);
    client.send(request);
    return client.receive(30);
  }
  void signal(int number) { ::kill(child_, number); }
  int64_t num_descriptors() const {
    const std::filesystem::directory_iterator open(fmt::format("/proc/{}/fd", child_));
    return std::distance(open, std::filesystem::directory_iterator());
  }
  double cpu_seconds() const {
    clockid_t clock;
    timespec used = {};
    if (clock_getcpuclockid(child_, &clock) == 0) clock_gettime(clock, &used);
    return static_cast<double>(used.tv_sec) + static_cast<double>(used.tv_nsec) * 1e-9;
  }
  // One that goes on for a minute is killed.
  int exit_code() {
    int status = 0;
    for (int i = 0; waitpid(child_, &status, WNOHANG) == 0; ++i) {
      if (i == 6000) ::kill(child_, SIGKILL);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  int log_;
  pid_t child_ = -1;
  uint16_t port_ = 0;
};

}  // namespace indexcache
