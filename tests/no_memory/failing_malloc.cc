// Preloaded into a program: after main() has begun, the first NO_MEMORY_AFTER calls of malloc and
// its kin find memory; the next finds none and makes the file NO_MEMORY_SEEN, and with
// NO_MEMORY_FOR_GOOD set, nor does any after it.
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>

extern "C" {

// glibc's own.
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

std::atomic<int64_t> num_left{INT64_MAX};
bool for_good = false;
const char* seen = "";
int (*program_main)(int, char**, char**) = nullptr;

bool finds_memory() {
  const int64_t left = num_left.fetch_sub(1);
  if (left > 0 || (left < 0 && !for_good)) return true;
  if (left == 0) close(open(seen, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  errno = ENOMEM;
  return false;
}

int limited_main(int argc, char** argv, char** environment) {
  if (const char* path = std::getenv("NO_MEMORY_SEEN")) seen = path;
  for_good = std::getenv("NO_MEMORY_FOR_GOOD") != nullptr;
  if (const char* after = std::getenv("NO_MEMORY_AFTER")) num_left = std::atoll(after);
  return program_main(argc, argv, environment);
}

}  // namespace

extern "C" {

void* malloc(size_t size) { return finds_memory() ? __libc_malloc(size) : nullptr; }
void* calloc(size_t n, size_t size) { return finds_memory() ? __libc_calloc(n, size) : nullptr; }
void* realloc(void* p, size_t size) { return finds_memory() ? __libc_realloc(p, size) : nullptr; }
void* memalign(size_t a, size_t size) {
  return finds_memory() ? __libc_memalign(a, size) : nullptr;
}
void* aligned_alloc(size_t a, size_t size) { return memalign(a, size); }
int posix_memalign(void** p, size_t a, size_t size) {
  *p = memalign(a, size);
  return *p == nullptr ? ENOMEM : 0;
}

int __libc_start_main(int (*main)(int, char**, char**), int argc, char** argv, void (*init)(),
                      void (*fini)(), void (*rtld_fini)(), void* stack_end) {
  program_main = main;
  using Start =
      int (*)(int (*)(int, char**, char**), int, char**, void (*)(), void (*)(), void (*)(), void*);
  const auto start = reinterpret_cast<Start>(dlsym(RTLD_NEXT, "__libc_start_main"));
  return start(limited_main, argc, argv, init, fini, rtld_fini, stack_end);
}
}
