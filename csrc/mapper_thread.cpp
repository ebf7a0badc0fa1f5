// The mapper's thread: what it does, and in which order.
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <system_error>

#include "mapper.hpp"

namespace kvcached {
namespace {

// How often an outstanding fence is looked at; without one the thread sleeps until it is woken.
constexpr std::chrono::microseconds kPoll{500};
// What may stand before a page that a step needs: a few tenths of a millisecond of driver calls.
constexpr size_t kPagesAtOnce = 8;

}  // namespace

Status Mapper::start() {
  // Signals belong to the engine's threads, which wait to be interrupted by them; faults of this
  // thread's own must still end the process.
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  Status status;
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    status = {Code::kUnavailable, std::string("mapper: no thread for it: ") + error.what()};
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return status;
}

void Mapper::run() {
  pthread_setname_np(pthread_self(), "kvcached-map");
  Lock lock(mutex_);
  while (!stop_) {
    if (map_needed(lock)) continue;
    // Unmapping first: its handles then serve the pages that are mapped ahead.
    const bool unmapped = unmap_some(lock);
    const bool mapped = map_ahead(lock);
    const bool trimmed = trim_some(lock);
    if (!unmapped && !mapped && !trimmed) sleep(lock);
  }
}

bool Mapper::map_needed(Lock& lock) {
  Pages pages;
  for (const int64_t page : needed_) {
    Page& entry = at(page);
    if (!waits(entry)) continue;
    entry.phase = Phase::kMapping;
    pages.push_back(page);
  }
  needed_.clear();
  if (pages.empty()) return false;
  const Status status = try_map(lock, pages, true);
  finish_map(pages, status);
  return true;
}

// Takes the next page that is to be mapped ahead into the thread's hands, if it still waits.
void Mapper::take_ahead(Pages* pages) {
  const int64_t page = ahead_.front();
  ahead_.pop_front();
  Page& entry = at(page);
  if (entry.want != Want::kAhead || !waits(entry)) return;
  entry.phase = Phase::kMapping;
  pages->push_back(page);
}

bool Mapper::map_ahead(Lock& lock) {
  Pages pages;
  while (!ahead_.empty() && pages.empty()) take_ahead(&pages);
  if (pages.empty()) return false;
  const Status status = try_map(lock, pages, false);
  // The others would be refused too, one driver call after the other.
  while (!status.is_ok() && !ahead_.empty()) take_ahead(&pages);
  finish_map(pages, status);
  return true;
}

// Maps pages that are in the thread's hands, or says why not. What is in quarantine beside them
// comes on top of what the owner has leased: for pages that are needed it is leased here.
Status Mapper::try_map(Lock& lock, const Pages& pages, bool may_pin) {
  int64_t extra = unbooked();
  busy_ = true;
  lock.unlock();
  Status status;
  int64_t grown = 0;
  int64_t released = 0;
  if (extra > 0) (void)arena_->retry_quarantine(&released);
  extra -= released;
  if (extra > 0 && !(may_pin && member_->pin(extra) == Grant::kGranted)) {
    status = {Code::kOutOfMemory, "no lease for " + std::to_string(extra) + " bytes more, beside " +
                                      std::to_string(arena_->quarantined_bytes()) +
                                      " bytes in quarantine"};
  } else {
    status = arena_->map(pages, &grown);
  }
  const int64_t quarantined = static_cast<int64_t>(arena_->quarantined_bytes());
  // A page whose unmap was refused is free again when the retry of that succeeds: that may pass.
  if (status.code() == Code::kDriver && quarantined > 0) {
    status = {Code::kOutOfMemory, status.message()};
  }
  lock.lock();
  busy_ = false;
  created_bytes_ += grown - released;
  quarantined_bytes_ = quarantined;
  return status;
}

void Mapper::finish_map(const Pages& pages, const Status& status) {
  for (const int64_t page : pages) {
    Page& entry = at(page);
    entry.phase = status.is_ok() ? Phase::kMapped : Phase::kHole;
    if (status.is_ok()) {
      set_pending(entry, false);
    } else if (entry.want == Want::kGone) {  // given up meanwhile
      ++counters_.cancelled;
      set_pending(entry, false);
    } else {
      // Its lease stays: the scheduler counts on the page, and may hand its blocks out any moment.
      entry.refused = true;
      if (entry.want == Want::kNeeded) {
        refusal_ = status;
      } else {
        ++counters_.ahead_refused;
      }
    }
  }
  settle_books();
  changed_.notify_all();
}

// Whether the batch may be unmapped. A fence that cannot be asked is as good as none.
bool Mapper::fence_passed(Leaving& batch) {
  if (!batch.fence) return true;
  bool done = false;
  if (!batch.fence.done(&done).is_ok()) {
    ++counters_.fence_failures;
    for (const int64_t page : batch.pages) {
      if (at(page).leaving != batch.number) continue;
      at(page).leaving = 0;
      unfenced_.push_back(page);
    }
    batch.pages.clear();
    done = true;
  }
  if (done) batch.fence = Fence();
  return done;
}

// Fences of one stream pass in their order, and an engine uses one: only the oldest is asked.
bool Mapper::unmap_some(Lock& lock) {
  if (leaving_.empty() || !fence_passed(leaving_.front())) return false;
  Leaving& batch = leaving_.front();
  Pages pages;
  while (!batch.pages.empty() && pages.size() < kPagesAtOnce) {
    const int64_t page = batch.pages.back();
    batch.pages.pop_back();
    Page& entry = at(page);
    if (entry.leaving != batch.number || entry.phase != Phase::kMapped) continue;  // kept
    entry.phase = Phase::kUnmapping;
    pages.push_back(page);
  }
  if (batch.pages.empty()) leaving_.pop_front();
  if (pages.empty()) return true;
  busy_ = true;
  lock.unlock();
  int64_t released = 0;
  (void)arena_->unmap(pages, &released);  // what it refuses is in quarantine, and still charged
  const int64_t quarantined = static_cast<int64_t>(arena_->quarantined_bytes());
  lock.lock();
  busy_ = false;
  created_bytes_ -= released;
  quarantined_bytes_ = quarantined;
  for (const int64_t page : pages) {
    at(page).phase = Phase::kHole;
    at(page).leaving = 0;
  }
  settle_books();
  changed_.notify_all();
  return true;
}

// Releases handles that no page waits for. Kept memory is charged: others may want it.
bool Mapper::trim_some(Lock& lock) {
  const size_t page_bytes = arena_->page_bytes();
  const size_t pooled = arena_->pooled_bytes();
  const size_t keep = ahead_.size() * page_bytes;
  if (pooled <= keep) return false;
  busy_ = true;
  lock.unlock();
  int64_t released = 0;
  const size_t some = std::min(pooled - keep, kPagesAtOnce * page_bytes);
  (void)arena_->trim(pooled - some, &released);
  const int64_t quarantined = static_cast<int64_t>(arena_->quarantined_bytes());
  lock.lock();
  busy_ = false;
  created_bytes_ -= released;
  quarantined_bytes_ = quarantined;
  settle_books();
  changed_.notify_all();
  return true;
}

void Mapper::sleep(Lock& lock) {
  if (!leaving_.empty()) {
    wake_.wait_for(lock, kPoll);
    return;
  }
  idle_ = true;
  changed_.notify_all();
  wake_.wait(lock);
  idle_ = false;
}

}  // namespace kvcached
