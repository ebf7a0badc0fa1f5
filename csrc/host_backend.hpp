// Host memory as a device: pages of a memfd mapped into PROT_NONE reservations.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "backend.hpp"
#include "fork_guard.hpp"

namespace kvcached {

// Places in a file of unlimited length: first fit, neighbours merged. Not thread-safe.
class ExtentSpace {
 public:
  explicit ExtentSpace(size_t begin) : end_(begin) {}
  size_t take(size_t size);
  void give_back(size_t offset, size_t size);

 private:
  std::map<size_t, size_t> free_;  // offset -> size; no two touch
  size_t end_;                     // everything from here on was never used
};

// A handle is an extent of one memfd, named kvcached:<name>. Its memory is allocated when it is
// created, so a shortage is an error of create() and not a SIGBUS later, and is returned to the
// kernel when it is released. Mappings and reservations are not inherited by a forked child.
class HostBackend : public Backend {
 public:
  // The memfd is opened by the first create(), with a descriptor above `min_fd`: a process that
  // holds a lock whose fall means "its memory is free" must have opened and numbered it before.
  static Status open(const std::string& name, int min_fd, std::shared_ptr<Backend>* backend);

  const char* kind() const override { return "host"; }
  DlpackDevice device() const override { return {1, 0}; }  // kDLCPU
  size_t granularity() const override { return granularity_; }
  Status reserve(size_t size, uintptr_t* address) override;
  Status free_reservation(uintptr_t address, size_t size) override;
  Status create(size_t size, Handle* handle) override;
  Status release(Handle handle) override;
  Status map(uintptr_t address, Handle handle, bool* placed) override;
  Status unmap(uintptr_t address, size_t size) override;
  // Work on host memory is done when the call that does it returns: nothing is ever outstanding.
  Status record_fence(uintptr_t stream, FenceId* fence) override;
  Status fence_done(FenceId fence, bool* done) override;
  void drop_fence(FenceId) override {}
  Status memory_info(size_t* free_bytes, size_t* total_bytes) override;

 private:
  HostBackend(std::string name, int min_fd, size_t granularity);
  Status open_memfd();  // needs mutex_

  const std::string name_;
  const int min_fd_;
  const size_t granularity_;
  std::atomic<FenceId> fences_{0};
  std::mutex mutex_;  // guards what follows; mmap and munmap need no lock of ours
  ForkClosedFd memfd_;
  ExtentSpace extents_;
};

}  // namespace kvcached
