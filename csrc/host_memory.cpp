#include "host_memory.hpp"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>

namespace kvcached {
namespace {

constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();

// Names of the memory controller's files in the two versions of cgroups.
struct Dialect {
  const char* limit;
  const char* usage;
  const char* reclaimable;  // key of memory.stat: file cache that gives way by itself
};
constexpr Dialect kV1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
constexpr Dialect kV2 = {"memory.max", "memory.current", "inactive_file"};

// The file's one number; kNone where it is missing or says "max".
uint64_t read_number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  return file >> value ? value : kNone;
}

// The number after `key` in a file of "key value" lines.
uint64_t read_field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  std::string rest;
  uint64_t value = 0;
  while (file >> name) {
    if (name == key && file >> value) return value;
    file.clear();
    std::getline(file, rest);
  }
  return kNone;
}

uint64_t minus(uint64_t a, uint64_t b) {
  return a > b ? a - b : 0;
}

// Lowers the two figures to what the cgroup at root+path and its ancestors leave.
void apply_limits(const Dialect& dialect, const std::string& root, std::string path,
                  uint64_t* free_bytes, uint64_t* total_bytes) {
  while (true) {
    const std::string folder = root + path + "/";
    const uint64_t limit = read_number(folder + dialect.limit);
    const uint64_t usage = read_number(folder + dialect.usage);
    if (limit != kNone && usage != kNone) {
      uint64_t cache = read_field(folder + "memory.stat", dialect.reclaimable);
      if (cache == kNone) cache = 0;
      *total_bytes = std::min(*total_bytes, limit);
      *free_bytes = std::min(*free_bytes, minus(limit, minus(usage, cache)));
    }
    if (path.empty()) return;
    path.erase(path.find_last_of('/'));
  }
}

// Lines of /proc/self/cgroup: "0::/path" for version 2, "4:memory:/path" for version 1.
void apply_cgroups(const std::string& proc, const std::string& root, uint64_t* free_bytes,
                   uint64_t* total_bytes) {
  std::ifstream file(proc + "/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    std::string path = line.substr(second + 1);
    while (!path.empty() && path.back() == '/') path.pop_back();
    if (!path.empty() && path.front() != '/') continue;
    if (controllers == ",,") {
      apply_limits(kV2, root, path, free_bytes, total_bytes);
    } else if (controllers.find(",memory,") != std::string::npos) {
      apply_limits(kV1, root + "/memory", path, free_bytes, total_bytes);
    }
  }
}

}  // namespace

Status host_memory_info(size_t* free_bytes, size_t* total_bytes, const std::string& proc,
                        const std::string& cgroup) {
  const uint64_t total_kib = read_field(proc + "/meminfo", "MemTotal:");
  const uint64_t free_kib = read_field(proc + "/meminfo", "MemAvailable:");
  if (total_kib == kNone || free_kib == kNone) {
    return {Code::kUnavailable, proc + "/meminfo does not say how much memory there is"};
  }
  uint64_t total = total_kib * 1024;
  uint64_t free = free_kib * 1024;
  apply_cgroups(proc, cgroup, &free, &total);
  *free_bytes = std::min(free, total);
  *total_bytes = total;
  return Status::ok();
}

}  // namespace kvcached
