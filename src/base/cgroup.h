// How much memory the control groups of this process still allow. In a container the machine's own
// MemAvailable says nothing of it, and the kernel kills who goes over.
#pragma once

#include <cstdint>
#include <string>

namespace indexcache {

// The least of what the memory limits of the process's group and of all groups above it leave,
// pages of files not counted, which the kernel takes back first; UINT64_MAX without a limit.
// Version 2 and, where it is mounted, the memory controller of version 1. `membership` is a
// /proc/PID/cgroup, `root` where the hierarchies are mounted.
uint64_t cgroup_room_bytes(const std::string& membership = "/proc/self/cgroup",
                           const std::string& root = "/sys/fs/cgroup");

}  // namespace indexcache
