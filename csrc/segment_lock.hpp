// The ledger's lock: one word of the shared file, behind a mutex of this process.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>

#include "liveness.hpp"
#include "segment_layout.hpp"

namespace kvcached {

// How long a process waits for a lock that a live process holds, before it reports a shortage.
constexpr std::chrono::milliseconds kLockWait{200};

class SegmentLock {
 public:
  // `slot` is this handle's number in the lock word; `liveness` holds the slot's byte.
  void attach(layout::LockLine* line, Liveness* liveness, uint32_t slot);

  // True when taken, from a dead holder if need be. False when a live holder did not let go in
  // time. A holder that has timed out once is not waited for again until it lets go.
  bool lock(std::chrono::nanoseconds wait = kLockWait);
  // Takes the lock only if that needs no waiting at all.
  bool try_lock();
  void unlock();
  // After this nobody can take the lock through this object. Waits for who has it now.
  void retire();

 private:
  bool lock_word(std::chrono::steady_clock::time_point deadline);
  bool steal(uint32_t word);

  static constexpr uint32_t kWaiters = 0x80000000u;

  std::timed_mutex mutex_;
  std::atomic<bool> retired_{false};
  layout::LockLine* line_ = nullptr;
  Liveness* liveness_ = nullptr;
  uint32_t mine_ = 0;
  std::atomic<uint32_t> stalled_{0};  // the holder that the last wait ran out on
};

// Holds the lock for a scope, if it could be taken.
class SegmentGuard {
 public:
  explicit SegmentGuard(SegmentLock& lock) : lock_(lock), held_(lock.lock()) {}
  SegmentGuard(SegmentLock& lock, std::try_to_lock_t) : lock_(lock), held_(lock.try_lock()) {}
  ~SegmentGuard() {
    if (held_) lock_.unlock();
  }
  SegmentGuard(const SegmentGuard&) = delete;
  SegmentGuard& operator=(const SegmentGuard&) = delete;
  explicit operator bool() const { return held_; }

 private:
  SegmentLock& lock_;
  bool held_;
};

}  // namespace kvcached
