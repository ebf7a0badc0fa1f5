// What a backend is: the few operations on virtual memory that an arena is built from.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#include "status.hpp"

namespace kvcached {

// Physical memory that exists: what create() made and release() takes back.
struct Handle {
  uint64_t id = 0;
  size_t size = 0;
};

// A point in a stream's work, recorded by record_fence() until drop_fence(). 0 is none.
using FenceId = uint64_t;

// Where tensors over a backend's memory live, in DLPack's numbers.
struct DlpackDevice {
  int32_t type = 0;
  int32_t ordinal = 0;
};

// All operations are synchronous and may be called from any thread at any time. None aborts,
// throws on a driver's answer, or leaves work half done without saying so. Sizes and addresses
// are multiples of granularity().
class Backend {
 public:
  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  virtual const char* kind() const = 0;
  virtual DlpackDevice device() const = 0;
  virtual size_t granularity() const = 0;

  // A range of addresses with no memory behind it. Touching it faults.
  virtual Status reserve(size_t size, uintptr_t* address) = 0;
  virtual Status free_reservation(uintptr_t address, size_t size) = 0;

  // New memory reads as zeros. A shortage is kOutOfMemory and changes nothing.
  virtual Status create(size_t size, Handle* handle) = 0;
  virtual Status release(Handle handle) = 0;

  // Places the whole handle at an address of a reservation, readable and writable. `placed` says
  // whether a mapping exists afterwards: a failure may leave one behind, for the caller to unmap.
  virtual Status map(uintptr_t address, Handle handle, bool* placed) = 0;
  // Makes the range fault again. May be repeated after a failure.
  virtual Status unmap(uintptr_t address, size_t size) = 0;

  // A run of calls from one thread: what each of them would set up and take down is done once.
  // True where it was set up, for end_calls(); see CallScope.
  virtual bool begin_calls() { return false; }
  virtual void end_calls() {}

  // Marks the point behind all work that is enqueued on a stream (the device's own handle of it)
  // by now. Does not wait for that work.
  virtual Status record_fence(uintptr_t stream, FenceId* fence) = 0;
  // Whether all work before the fence has finished. Never waits.
  virtual Status fence_done(FenceId fence, bool* done) = 0;
  // A driver that will not take a fence back keeps it: a fence is not memory.
  virtual void drop_fence(FenceId fence) = 0;

  // What the device has, as far as this process may see and use it.
  virtual Status memory_info(size_t* free_bytes, size_t* total_bytes) = 0;

  // True in a child forked after this backend was made. There nothing may be undone: the memory
  // is the parent's, so owners of handles and mappings must let go of them without a word.
  bool inherited() const { return owner_ != ::getpid(); }

 protected:
  Backend() : owner_(::getpid()) {}

 private:
  const pid_t owner_;
};

// Makes the calls of one scope a run.
class CallScope {
 public:
  explicit CallScope(Backend& backend) : backend_(backend), begun_(backend.begin_calls()) {}
  ~CallScope() {
    if (begun_) backend_.end_calls();
  }
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;

 private:
  Backend& backend_;
  const bool begun_;
};

}  // namespace kvcached
