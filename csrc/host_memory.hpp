// How much memory this process may use: the machine's, cut by the limits of its cgroups.
#pragma once

#include <cstddef>
#include <string>

#include "status.hpp"

namespace kvcached {

// `proc` and `cgroup` are the places where the kernel's files are; tests give their own.
Status host_memory_info(size_t* free_bytes, size_t* total_bytes, const std::string& proc = "/proc",
                        const std::string& cgroup = "/sys/fs/cgroup");

}  // namespace kvcached
