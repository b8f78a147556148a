#include "base/cgroup.h"

#include <algorithm>
#include <fstream>
#include <sstream>

namespace indexcache {

namespace {

struct Hierarchy {
  const char *mount, *limit, *usage;
  const char *active_file, *inactive_file;  // of memory.stat, with the groups below
};
constexpr Hierarchy kV2 = {"", "/memory.max", "/memory.current", "active_file", "inactive_file"};
constexpr Hierarchy kV1 = {"/memory", "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                           "total_active_file", "total_inactive_file"};

// UINT64_MAX where there is no number: no file, or "max".
uint64_t number_in(const std::string& path) {
  uint64_t value = 0;
  return std::ifstream(path) >> value ? value : UINT64_MAX;
}

uint64_t file_pages(const std::string& folder, const Hierarchy& hierarchy) {
  std::ifstream stat(folder + "/memory.stat");
  uint64_t sum = 0, value = 0;
  for (std::string name; stat >> name >> value;) {
    if (name == hierarchy.active_file || name == hierarchy.inactive_file) sum += value;
  }
  return sum;
}

uint64_t room(const std::string& root, const Hierarchy& hierarchy, std::string group) {
  uint64_t least = UINT64_MAX;
  for (;;) {
    const std::string folder = root + hierarchy.mount + (group == "/" ? "" : group);
    const uint64_t limit = number_in(folder + hierarchy.limit),
                   usage = number_in(folder + hierarchy.usage);
    if (limit != UINT64_MAX && usage != UINT64_MAX) {
      const uint64_t held = usage - std::min(usage, file_pages(folder, hierarchy));
      least = std::min(least, limit - std::min(limit, held));
    }
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos || group == "/") return least;
    group = slash == 0 ? "/" : group.substr(0, slash);
  }
}

}  // namespace

uint64_t cgroup_room_bytes(const std::string& membership, const std::string& root) {
  std::ifstream file(membership);
  uint64_t least = UINT64_MAX;
  // Lines "hierarchy:controllers:group"; version 2 is hierarchy 0 and names no controllers.
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string group = line.substr(second + 1);
    std::istringstream controllers(line.substr(first + 1, second - first - 1));
    if (controllers.str().empty()) least = std::min(least, room(root, kV2, group));
    for (std::string name; std::getline(controllers, name, ',');) {
      if (name == "memory") least = std::min(least, room(root, kV1, group));
    }
  }
  return least;
}

}  // namespace indexcache
