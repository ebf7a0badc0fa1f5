// What backs the holes of an arena that has none: one page of zeros, mapped wherever no page is.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "backend.hpp"

namespace kvcached {

// Where the pages of one contiguous run of tensors lie: page p covers the bytes
// [offset + p*chunk, offset + (p+1)*chunk) of the reservation.
struct Region {
  size_t offset = 0;
  size_t chunk = 0;
};

// A place is one page of one region. It carries the shared zeros, or a page, or, after a refusal
// of the driver, nothing. A mapping cannot be removed in part, so the shared memory is as large as
// a place: one handle for each size of chunk. Not thread-safe.
//
// What is written to a covered place lands in the shared memory and is read at all of them.
class Cover {
 public:
  explicit Cover(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}
  ~Cover() { close(); }
  Cover(const Cover&) = delete;
  Cover& operator=(const Cover&) = delete;

  // Creates the shared memory and maps it at every place. After a failure nothing is left.
  Status open(uintptr_t base, std::vector<Region> regions, int64_t pages);
  // Takes the zeros away from a place, for a page. After a failure they are still there.
  Status lift(uintptr_t address);
  // Puts them back where a page has been. A refusal leaves a hole, for retry().
  Status lay(uintptr_t address) noexcept;
  // Covers what was refused before.
  Status retry();
  // Takes all of them away, and releases the shared memory unless some could not be taken away:
  // false then. Places with a page are left alone.
  bool close();

  bool is_open() const { return !handles_.empty(); }
  size_t created_bytes() const { return created_bytes_; }
  // Places that are neither covered nor a page's, for tests and checks.
  int64_t bare_places() const;

 private:
  // Blind: the zeros are placed, and the driver would not make them accessible.
  enum class State : uint8_t { kBare, kBlind, kCovered, kPage };

  size_t index_of(uintptr_t address) const;
  uintptr_t address_of(size_t region, int64_t page) const {
    return base_ + regions_[region].offset + static_cast<size_t>(page) * regions_[region].chunk;
  }
  State& state(size_t region, int64_t page) {
    return states_[region * static_cast<size_t>(pages_) + static_cast<size_t>(page)];
  }
  Status cover(uintptr_t address, size_t chunk, State* state);

  const std::shared_ptr<Backend> backend_;
  uintptr_t base_ = 0;
  std::vector<Region> regions_;  // by offset
  int64_t pages_ = 0;
  std::map<size_t, Handle> handles_;  // by size
  std::vector<State> states_;         // region after region
  size_t created_bytes_ = 0;
  int64_t refused_ = 0;  // places that are bare or blind
};

}  // namespace kvcached
