#include "segment_lock.hpp"

#include <algorithm>

#include "futex.hpp"

namespace kvcached {

namespace {
// Death does not ring: while waiting, look at this interval whether the holder still lives.
constexpr std::chrono::milliseconds kLook{3};
constexpr std::chrono::milliseconds kStalledWait{1};
constexpr int kSpins = 64;
}  // namespace

void SegmentLock::attach(layout::LockLine* line, Liveness* liveness, uint32_t slot) {
  line_ = line;
  liveness_ = liveness;
  mine_ = slot + 1;
  // The slot's last holder may have died with the lock. Only the slot's holder can write this
  // number into the word, and that is us: so it is stale, and nobody could see that after now.
  uint32_t word = line_->word.load();
  if ((word & ~kWaiters) == mine_ && line_->word.compare_exchange_strong(word, 0)) {
    futex_wake(line_->word);
  }
}

bool SegmentLock::try_lock() {
  if (!mutex_.try_lock()) return false;
  uint32_t free = 0;
  if (!retired_.load() &&
      line_->word.compare_exchange_strong(free, mine_, std::memory_order_acquire)) {
    return true;
  }
  mutex_.unlock();
  return false;
}

bool SegmentLock::lock(std::chrono::nanoseconds wait) {
  uint32_t stalled = stalled_.load(std::memory_order_relaxed);
  if (stalled != 0) {
    bool same = (line_->word.load(std::memory_order_relaxed) & ~kWaiters) == stalled;
    if (same) wait = std::min<std::chrono::nanoseconds>(wait, kStalledWait);
  }
  auto deadline = SteadyClock::now() + wait;
  if (!mutex_.try_lock_until(deadline)) {
    line_->timeouts.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  if (retired_.load()) {
    mutex_.unlock();
    return false;
  }
  if (lock_word(deadline)) {
    stalled_.store(0, std::memory_order_relaxed);
    return true;
  }
  mutex_.unlock();
  line_->timeouts.fetch_add(1, std::memory_order_relaxed);
  return false;
}

bool SegmentLock::lock_word(SteadyClock::time_point deadline) {
  std::atomic<uint32_t>& word = line_->word;
  for (int spin = 0; spin < kSpins; ++spin) {
    uint32_t free = 0;
    if (word.compare_exchange_weak(free, mine_, std::memory_order_acquire)) return true;
  }
  while (true) {
    uint32_t seen = word.load();
    if (seen == 0) {
      // Others may sleep too, and the waker wakes one: keep the mark.
      if (word.compare_exchange_strong(seen, mine_ | kWaiters)) return true;
      continue;
    }
    if ((seen & kWaiters) == 0) {
      if (!word.compare_exchange_strong(seen, seen | kWaiters)) continue;
      seen |= kWaiters;
    }
    if (steal(seen)) return true;
    auto left = deadline - SteadyClock::now();
    if (left.count() <= 0) {
      stalled_.store(seen & ~kWaiters, std::memory_order_relaxed);
      return false;
    }
    futex_wait(word, seen, std::min<std::chrono::nanoseconds>(left, kLook));
  }
}

bool SegmentLock::steal(uint32_t seen) {
  uint32_t holder = (seen & ~kWaiters) - 1;
  // A number that no slot has can only come from a damaged file: nobody holds it.
  bool known = holder < layout::kMaxSlots;
  // With the byte in hand the holder is dead, and no new process can take over its number.
  if (known && !liveness_->take(layout::slot_byte(holder))) return false;
  bool stolen = line_->word.compare_exchange_strong(seen, mine_ | kWaiters);
  if (known) liveness_->drop(layout::slot_byte(holder));
  if (stolen) line_->stolen.fetch_add(1, std::memory_order_relaxed);
  return stolen;
}

void SegmentLock::unlock() {
  uint32_t old = line_->word.load(std::memory_order_relaxed);
  // Ours, with or without the mark. Anything else would be a lock stolen from a live process;
  // leave it to whoever holds it then.
  while ((old & ~kWaiters) == mine_) {
    if (line_->word.compare_exchange_weak(old, 0, std::memory_order_release)) {
      if ((old & kWaiters) != 0) futex_wake(line_->word, 1);
      break;
    }
  }
  mutex_.unlock();
}

void SegmentLock::retire() {
  retired_.store(true);
  std::lock_guard<std::timed_mutex> guard(mutex_);
}

}  // namespace kvcached
