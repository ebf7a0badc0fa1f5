// The mapping thread of an arena: it maps and unmaps pages while the engine and its device work.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "account.hpp"
#include "arena.hpp"

namespace kvcached {

// Events since the mapper was opened, in pages (fence_failures: in calls).
struct MapperCounters {
  int64_t kept = 0;            // wanted again before they were unmapped
  int64_t cancelled = 0;       // given up before they were mapped
  int64_t ahead_refused = 0;   // refused by the device while nobody needed them
  int64_t fence_failures = 0;  // fences that could not be recorded or asked
};

// Every page is wanted or not, mapped or not; the thread makes the second follow the first. Pages
// that a step needs come first, all of them in one go; then unmaps whose fence has passed, a few at
// a time, and pages mapped ahead, one at a time. Handles of unmapped pages serve the maps that wait
// and are released as soon as none does.
//
// The books: the member holds what exists plus what is charged and not there yet (`pending`). Bytes
// are booked before the thread may create them and released after they are gone, so a reader of
// the ledger may see too much for a moment and never too little. A page that the device refuses is
// rolled back and stays pending: tried again when someone waits for it, refunded when the pool
// gives it up. (Refunded at once, its bytes could be leased for another page of the same instance,
// and a step that then uses both could only fail.)
//
// Locks, outermost first: the GIL, mutex_, the arena's, the backend's. Nobody waits for mutex_ with
// the GIL held. The thread holds mutex_ for its bookkeeping and lets go of it around everything
// that takes long: calls of the arena, and leases. Only the thread changes the arena.
//
// Any thread may call any method. In a forked child, where the thread does not exist and the
// memory is the parent's, methods fail and the destructor is never run: its locks may be held.
class Mapper {
 public:
  using Pages = std::vector<int64_t>;

  // The arena must be empty and used by nobody else, its pool limit at least its size. Its zeros
  // are booked by the member already.
  static Status open(std::shared_ptr<Arena> arena, std::shared_ptr<MemberHandle> member,
                     std::shared_ptr<Mapper>* mapper);
  ~Mapper();
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // Commands of the page pool, carried out by the thread: pages to unmap once the work that is
  // enqueued on `stream` by now is done, pages that the next step needs, pages to map ahead. Books
  // the bytes of pages that were not wanted until now, which are under a lease of the owner; a
  // page that is still there is kept and its new lease refunded. Nothing happens if a page does
  // not fit.
  Status submit(const Pages& unmap, const Pages& needed, const Pages& ahead, uintptr_t stream);
  // Pages whose bytes this member holds already (MemberHandle::pin).
  Status need(const Pages& pages);
  // Unmaps every page behind a fence.
  Status clear(uintptr_t stream);
  // Waits until these wanted pages are mapped, trying those again that were refused before. Says
  // what the device answered if it refuses; `mapped` is false where the time was not enough.
  Status wait(const Pages& pages, double seconds, bool* mapped);
  // Refunds those of the pages that are not mapped; they count as refused.
  Status give_up(const Pages& pages);
  // Waits until the thread has nothing left that it can do. `done` is false if the time was not
  // enough, or pages wait for a fence that could not be recorded.
  Status drain(double seconds, bool* done);
  // Ends the thread and refunds what it has not mapped. Pages stay mapped, and charged.
  void close();

  Status missing(const Pages& pages, int64_t* count) const;
  Status counters(MapperCounters* counters) const;
  // As of the thread's last work.
  Status quarantined_bytes(int64_t* bytes) const;
  // Adds everything up, once the thread has no work in its hands.
  Status check();

 private:
  enum class Want : uint8_t { kGone, kAhead, kNeeded };
  // Mapping and unmapping: in the thread's hands.
  enum class Phase : uint8_t { kHole, kMapping, kMapped, kUnmapping };

  struct Page {
    Want want = Want::kGone;
    Phase phase = Phase::kHole;
    bool pending = false;  // charged, and not there yet
    bool refused = false;  // wanted, and not to be tried until someone asks again
    bool named = false;    // by the call that is being checked
    uint64_t leaving = 0;  // the number of the batch that will unmap it
  };
  // Pages that wait for the same fence. One that is kept goes out of its batch by its number.
  struct Leaving {
    uint64_t number = 0;
    Fence fence;  // unset once it has passed
    Pages pages;
  };
  using Lock = std::unique_lock<std::mutex>;

  Mapper(std::shared_ptr<Arena> arena, std::shared_ptr<MemberHandle> member);
  Status start();

  // These need mutex_; those that take the lock let go of it meanwhile.
  Status check_open() const;
  Status check_commands(const Pages& unmap, const Pages& needed, const Pages& ahead);
  Status check_page(int64_t page) const;
  Page& at(int64_t page) { return pages_[static_cast<size_t>(page)]; }
  const Page& at(int64_t page) const { return pages_[static_cast<size_t>(page)]; }
  void drop(int64_t page, Pages* leaving);
  void want(int64_t page, Want want);
  void set_pending(Page& page, bool pending);
  void leave(Pages pages, uintptr_t stream);
  void settle_books();
  int64_t unbooked() const;
  void poke();

  void run();
  bool map_needed(Lock& lock);
  bool map_ahead(Lock& lock);
  bool unmap_some(Lock& lock);
  bool trim_some(Lock& lock);
  void sleep(Lock& lock);
  static bool waits(const Page& page) {
    return page.phase == Phase::kHole && page.pending && !page.refused;
  }
  void take_ahead(Pages* pages);
  Status try_map(Lock& lock, const Pages& pages, bool may_pin);
  void finish_map(const Pages& pages, const Status& status);
  bool fence_passed(Leaving& batch);

  const std::shared_ptr<Arena> arena_;
  const std::shared_ptr<MemberHandle> member_;
  const int64_t page_bytes_;

  mutable std::mutex mutex_;         // guards what follows
  std::condition_variable wake_;     // the thread waits on it
  std::condition_variable changed_;  // everyone else does
  std::vector<Page> pages_;
  std::deque<int64_t> needed_, ahead_;  // may name pages that no longer wait
  std::deque<Leaving> leaving_;         // oldest first
  Pages unfenced_;                      // no fence could be had: the next submission tries again
  uint64_t batches_ = 0;
  int64_t created_bytes_ = 0;      // the arena's, as of the thread's last work
  int64_t quarantined_bytes_ = 0;  // likewise
  int64_t pending_pages_ = 0;
  Status refusal_;  // the last one of needed pages
  MapperCounters counters_;
  bool busy_ = false;  // work is in the thread's hands
  bool idle_ = false;  // the thread sleeps until it is woken
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace kvcached
