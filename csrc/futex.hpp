// Sleeping on a word that several processes share.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

namespace kvcached {

using SteadyClock = std::chrono::steady_clock;

// Sleeps while `word` holds `seen`, `timeout` at most. Returns 0 or the errno; every return may be
// spurious. Not FUTEX_PRIVATE: the word lies in a file that other processes map too.
inline int futex_wait(std::atomic<uint32_t>& word, uint32_t seen,
                      std::chrono::nanoseconds timeout) {
  if (timeout.count() <= 0) return ETIMEDOUT;
  timespec span{};
  span.tv_sec = static_cast<time_t>(timeout.count() / 1000000000);
  span.tv_nsec = static_cast<long>(timeout.count() % 1000000000);
  long result = syscall(SYS_futex, &word, FUTEX_WAIT, seen, &span, nullptr, 0);
  return result == 0 ? 0 : errno;
}

inline void futex_wake(std::atomic<uint32_t>& word, int count = INT_MAX) {
  syscall(SYS_futex, &word, FUTEX_WAKE, count, nullptr, nullptr, 0);
}

}  // namespace kvcached
