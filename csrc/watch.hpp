// Processes that end together. A thread of our own watches pidfds: without Python, so that an
// interpreter that is busy, or already shutting down, cannot delay it. Where the other process
// watches too, its watching thread's death is what counts (Linux 6.9 or newer): it comes before the
// kernel takes down the memory, so that all processes of an instance go down side by side.
#pragma once

#include <vector>

namespace kvcached {

// Ends this process with SIGKILL, `grace_s` seconds after any of `pids` has ended. A pid that is
// gone already counts as ended. Returns at once; there is no way back.
void end_with(const std::vector<int>& pids, double grace_s);

}  // namespace kvcached
