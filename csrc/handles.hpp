// Owning types over a backend. What they own is given up when they die, so an operation of many
// steps that fails half-way unwinds by itself; what the driver will not take back is never lost.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "cover.hpp"

namespace kvcached {

// A range of addresses of a backend.
class Reservation {
 public:
  Reservation() = default;
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  Status open(std::shared_ptr<Backend> backend, size_t size);
  // Gives the addresses up without freeing them: something is still mapped there.
  void abandon() { backend_.reset(); }
  uintptr_t address() const { return address_; }
  size_t size() const { return size_; }

 private:
  std::shared_ptr<Backend> backend_;
  uintptr_t address_ = 0;
  size_t size_ = 0;
};

// A point in a stream's work before which a page may not be unmapped. Drops itself.
class Fence {
 public:
  Fence() = default;
  ~Fence() { drop(); }
  Fence(Fence&& other) noexcept { *this = std::move(other); }
  Fence& operator=(Fence&& other) noexcept;

  static Status record(std::shared_ptr<Backend> backend, uintptr_t stream, Fence* fence);
  Status done(bool* done) const { return backend_->fence_done(id_, done); }
  explicit operator bool() const { return backend_ != nullptr; }

 private:
  void drop() noexcept;

  std::shared_ptr<Backend> backend_;
  FenceId id_ = 0;
};

class HandleStore;

// One handle that is placed nowhere. Goes back to its store when it dies.
class PageHandle {
 public:
  PageHandle() = default;
  PageHandle(HandleStore* store, Handle handle) : store_(store), handle_(handle) {}
  ~PageHandle();
  PageHandle(PageHandle&& other) noexcept { *this = std::move(other); }
  PageHandle& operator=(PageHandle&& other) noexcept;

  Handle get() const { return handle_; }
  Handle let_go() noexcept;

 private:
  HandleStore* store_ = nullptr;
  Handle handle_;
};

// One handle and the place where it is mapped. Dying, it unmaps and gives the handle back.
class Mapping {
 public:
  Mapping(HandleStore* store, Handle handle, uintptr_t address)
      : store_(store), handle_(handle), address_(address) {}
  ~Mapping();
  Mapping(Mapping&& other) noexcept
      : store_(std::exchange(other.store_, nullptr)),
        handle_(other.handle_),
        address_(other.address_) {}
  Mapping& operator=(Mapping&&) = delete;

  size_t size() const { return handle_.size; }

 private:
  HandleStore* store_;
  Handle handle_;
  uintptr_t address_;
};

// What happened since the arena was opened, in handles.
struct Counters {
  int64_t maps = 0;
  int64_t unmaps = 0;
  int64_t creates = 0;
  int64_t releases = 0;
  int64_t failures = 0;  // answers of the driver other than success
};

// Makes handles and takes them back: keeps up to a limit for reuse, releases the rest, and puts
// in quarantine what the driver refused to unmap or release, to try again. With a cover, zeros give
// way to every mapping and come back after it. Not thread-safe.
class HandleStore {
 public:
  HandleStore(std::shared_ptr<Backend> backend, size_t pool_limit, Cover* cover)
      : backend_(std::move(backend)), cover_(cover), pool_limit_(pool_limit) {}
  ~HandleStore() { close(); }

  // A handle of `size` bytes, from the pool if it has one: then it holds its old contents.
  Status acquire(size_t size, PageHandle* handle);
  // Maps a handle and appends the mapping. Whatever fails, the handle is owned by someone.
  Status place(PageHandle handle, uintptr_t address, std::vector<Mapping>* mappings);

  // Releases pooled handles until no more than `keep` bytes of them are left.
  void trim(size_t keep);
  // Tries again to unmap and release what is in quarantine, and to cover what is bare.
  void retry();
  // Releases everything that can be; nothing is pooled from now on.
  void close();
  // From now on nothing is covered where a mapping goes.
  void leave_holes() { cover_ = nullptr; }
  // Whether a mapping that could not be undone lies in [address, address+size).
  bool is_stuck(uintptr_t address, size_t size) const;

  size_t created_bytes() const { return created_bytes_; }
  size_t pooled_bytes() const { return pooled_bytes_; }
  size_t quarantined_bytes() const { return quarantined_bytes_; }
  const Counters& counters() const { return counters_; }
  const std::string& last_failure() const { return last_failure_; }
  // Adds up pool and quarantine and compares them with the totals.
  Status check(size_t mapped_bytes) const;

 private:
  friend class PageHandle;
  friend class Mapping;

  // A handle in quarantine, and where it is still mapped (0: nowhere).
  struct Stuck {
    Handle handle;
    uintptr_t address;
  };

  void give_back(Handle handle) noexcept;
  void displace(Handle handle, uintptr_t address) noexcept;
  void release(Handle handle) noexcept;
  void quarantine(Handle handle, uintptr_t address) noexcept;
  void grow_lists();
  Status note(Status status) noexcept;

  const std::shared_ptr<Backend> backend_;
  Cover* cover_;  // null: holes stay holes
  size_t pool_limit_;
  std::map<size_t, std::vector<Handle>> pool_;  // by size
  std::vector<Stuck> quarantine_;
  size_t live_handles_ = 0;
  size_t created_bytes_ = 0;
  size_t pooled_bytes_ = 0;
  size_t quarantined_bytes_ = 0;
  Counters counters_;
  std::string last_failure_;
};

}  // namespace kvcached
