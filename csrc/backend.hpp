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

}  // namespace kvcached
