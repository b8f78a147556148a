// Runs the real program and keeps all that it says.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

namespace indexcache {

// AddressSanitizer reserves 14 TiB of address space for its shadow: a limit on it would stop the
// program before main().
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kLimitAddressSpace = false;
#elif defined(__has_feature)
inline constexpr bool kLimitAddressSpace = !__has_feature(address_sanitizer);
#else
inline constexpr bool kLimitAddressSpace = true;
#endif

struct ProgramOptions {
  std::string input;                           // standard input
  uint64_t address_space = uint64_t{4} << 30;  // RLIMIT_AS; 0: none
  bool interrupt_on_output = false;            // SIGINT once something is on stdout
  double kill_after = 0;                       // SIGKILL after so many seconds; 0: never
  uint32_t failing_read = 0;                   // reads of exactly so many bytes fail; 0: none
  std::vector<std::pair<std::string, std::string>> environment;  // beside our own
};

struct ProgramResult {
  int exit_code = -1;  // -1: killed by `signal`
  int signal = 0;
  bool timed_out = false;
  std::string out, err;
};

inline constexpr double kProgramSeconds = 60;

inline std::string read_fd(int fd) {
  struct stat info;
  fstat(fd, &info);
  std::string text(static_cast<size_t>(info.st_size), '\0');
  const ssize_t n = pread(fd, text.data(), text.size(), 0);
  text.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
  return text;
}

// The kernel does `action` at each read() of exactly `num_bytes` bytes, in this process and what it
// becomes. Returns what the system call returned.
inline int64_t filter_reads(uint32_t num_bytes, uint32_t action, uint32_t flags) {
  constexpr uint32_t kLowWord = offsetof(seccomp_data, args) + 2 * sizeof(uint64_t);
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kLowWord),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, num_bytes, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, action),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {std::size(filter), filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return -1;
  return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

// Plays a broken disk: such a read gets EIO.
inline void fail_reads(uint32_t num_bytes) {
  if (filter_reads(num_bytes, SECCOMP_RET_ERRNO | EIO, 0) != 0) _exit(126);
}

// Plays a disk that does not answer: such a read waits for a supervisor, and there is none. What it
// would listen on stays open, or the read would fail.
inline void hang_reads(uint32_t num_bytes) {
  const int64_t listener =
      filter_reads(num_bytes, SECCOMP_RET_USER_NOTIF, SECCOMP_FILTER_FLAG_NEW_LISTENER);
  if (listener < 0 || fcntl(static_cast<int>(listener), F_SETFD, 0) != 0) _exit(126);
}

inline ProgramResult run_program(const std::vector<std::string>& args,
                                 const ProgramOptions& options = {}) {
  ProgramResult result;
  std::vector<char*> argv = {const_cast<char*>(INDEXCACHE_BINARY)};
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  const int in = memfd_create("in", MFD_CLOEXEC), out = memfd_create("out", MFD_CLOEXEC),
            err = memfd_create("err", MFD_CLOEXEC);
  if (pwrite(in, options.input.data(), options.input.size(), 0) < 0) return result;
  const pid_t child = fork();
  if (child == 0) {
    dup2(in, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(err, STDERR_FILENO);
    if (kLimitAddressSpace && options.address_space > 0) {
      const rlimit limit = {options.address_space, options.address_space};
      setrlimit(RLIMIT_AS, &limit);
    }
    if (options.failing_read > 0) fail_reads(options.failing_read);
    for (const auto& [name, value] : options.environment) setenv(name.c_str(), value.c_str(), 1);
    execv(INDEXCACHE_BINARY, argv.data());
    _exit(127);
  }
  const auto start = std::chrono::steady_clock::now();
  int status = 0;
  bool interrupted = false;
  while (waitpid(child, &status, WNOHANG) == 0) {
    struct stat info;
    if (options.interrupt_on_output && !interrupted && fstat(out, &info) == 0 && info.st_size > 0) {
      interrupted = true;
      kill(child, SIGINT);
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (options.kill_after > 0 && elapsed.count() > options.kill_after) kill(child, SIGKILL);
    if (elapsed.count() > kProgramSeconds && !result.timed_out) {
      result.timed_out = true;
      kill(child, SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) result.signal = WTERMSIG(status);
  result.out = read_fd(out);
  result.err = read_fd(err);
  for (const int fd : {in, out, err}) close(fd);
  return result;
}

// The lines of a text that begin with "error: ".
inline std::vector<std::string> error_lines(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    if (line.starts_with("error: ")) lines.push_back(line);
    begin = end + 1;
  }
  return lines;
}

// What every failure owes: the exit code, no death by a signal, one "error: " line that ends
// stderr, nothing on stdout.
inline void expect_failure(const ProgramResult& result, int exit_code) {
  EXPECT_FALSE(result.timed_out);
  EXPECT_EQ(result.signal, 0);
  EXPECT_EQ(result.exit_code, exit_code) << result.err;
  EXPECT_EQ(result.out, "");
  if (exit_code != 1) return;
  EXPECT_EQ(error_lines(result.err).size(), 1u) << result.err;
  // Lists go on in indented lines.
  const size_t error = result.err.starts_with("error: ") ? 0 : result.err.find("\nerror: ") + 1;
  for (size_t end = result.err.find('\n', error); end + 1 < result.err.size();
       end = result.err.find('\n', end + 1)) {
    EXPECT_EQ(result.err.substr(end + 1, 2), "  ") << result.err;
  }
}

inline bool program_is_built() { return access(INDEXCACHE_BINARY, X_OK) == 0; }

}  // namespace indexcache
