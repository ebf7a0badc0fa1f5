// An arena: one reservation and the pages mapped into it, on one device, in one process.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.hpp"
#include "cover.hpp"
#include "handles.hpp"

namespace kvcached {

struct ArenaOptions {
  std::vector<Region> regions;
  int64_t pages = 0;
  size_t size = 0;
  size_t pool_bytes = 0;    // handles kept for reuse when pages are unmapped
  bool zero_holes = false;  // shared zeros wherever no page is (Cover)
};

// Every method may be called from any thread. In a forked child the memory is the parent's: what
// changes the arena fails, what looks at it must not be called (check_process() tells), and the
// destructor does nothing.
class Arena {
 public:
  static Status open(std::shared_ptr<Backend> backend, ArenaOptions options,
                     std::unique_ptr<Arena>* arena);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Maps all of these pages or none. `grown` is the change of created_bytes(), also on failure:
  // handles of the pool cost nothing, and memory may come out of quarantine.
  Status map(const std::vector<int64_t>& pages, int64_t* grown);
  // Unmaps all of these pages. What the driver will not give back goes into quarantine and stays
  // in created_bytes(); that is not a failure of the call. `released` is what really came back.
  Status unmap(const std::vector<int64_t>& pages, int64_t* released);
  Status trim(size_t keep_bytes, int64_t* released);
  Status retry_quarantine(int64_t* released);
  // Takes the zeros out of the holes, which fault from now on, and gives back their memory.
  // Nothing may read there any more.
  Status uncover(int64_t* released);

  Status is_mapped(int64_t page, bool* mapped) const;
  std::vector<int64_t> mapped_pages() const;
  // Bytes that occupy the device for this arena: mapped, pooled, quarantined and zeros.
  size_t created_bytes() const;
  size_t mapped_bytes() const;
  size_t pooled_bytes() const;
  size_t quarantined_bytes() const;
  size_t zero_bytes() const;
  // Places without a page that are without zeros too, since the driver refused to map them there.
  int64_t bare_places() const;
  Counters counters() const;
  // The driver's last refusal; empty if there was none.
  std::string last_failure() const;
  // Adds everything up.
  Status check() const;
  // That [offset, offset+size) lies inside the reservation.
  Status check_range(size_t offset, size_t size) const;
  // The point behind all work that is enqueued on the device's stream by now.
  Status record_fence(uintptr_t stream, Fence* fence) const;
  // That this is the process that opened the arena.
  Status check_process() const;

  uintptr_t address() const { return reservation_.address(); }
  size_t size() const { return reservation_.size(); }
  int64_t pages() const { return options_.pages; }
  size_t page_bytes() const { return page_bytes_; }
  DlpackDevice device() const { return backend_->device(); }

 private:
  using Page = std::vector<Mapping>;  // one mapping a region; empty where the page is a hole

  Arena(std::shared_ptr<Backend> backend, ArenaOptions options);
  Status check_pages(const std::vector<int64_t>& pages, bool mapped) const;
  Status map_page(int64_t page, Page* mappings);
  int64_t created() const {
    return static_cast<int64_t>(store_.created_bytes() + cover_.created_bytes());
  }

  const std::shared_ptr<Backend> backend_;
  const ArenaOptions options_;
  size_t page_bytes_ = 0;
  mutable std::mutex mutex_;  // guards what follows; taken with the GIL released
  // In this order: pages give their handles to the store, and the reservation goes last.
  Reservation reservation_;
  Cover cover_;
  HandleStore store_;
  std::vector<Page> pages_;
  int64_t mapped_pages_ = 0;
};

}  // namespace kvcached
