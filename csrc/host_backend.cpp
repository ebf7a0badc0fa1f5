#include "host_backend.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "host_memory.hpp"

namespace kvcached {
namespace {

constexpr size_t kMaxNameLength = 200;  // the kernel allows 249 bytes for a memfd's whole name

Status failed(const std::string& what, int error) {
  // EFBIG is RLIMIT_FSIZE: this process may not own a larger file, so the device ends there.
  const bool shortage = error == ENOMEM || error == ENOSPC || error == EFBIG || error == EDQUOT;
  return {shortage ? Code::kOutOfMemory : Code::kDriver, what + ": " + std::strerror(error)};
}

void* as_pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

int punch(int fd, size_t offset, size_t size) {
  return ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                     static_cast<off_t>(size));
}

}  // namespace

size_t ExtentSpace::take(size_t size) {
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < size) continue;
    const size_t offset = it->first;
    const size_t rest = it->second - size;
    if (rest > 0) free_.emplace_hint(it, offset + size, rest);
    free_.erase(offset);
    return offset;
  }
  const size_t offset = end_;
  end_ += size;
  return offset;
}

void ExtentSpace::give_back(size_t offset, size_t size) {
  auto it = free_.emplace(offset, size).first;
  if (it != free_.begin()) {
    auto before = std::prev(it);
    if (before->first + before->second == offset) {
      before->second += size;
      free_.erase(it);
      it = before;
    }
  }
  auto after = std::next(it);
  if (after != free_.end() && it->first + it->second == after->first) {
    it->second += after->second;
    free_.erase(after);
  }
  if (it->first + it->second == end_) {
    end_ = it->first;
    free_.erase(it);
  }
}

Status HostBackend::open(const std::string& name, int min_fd, std::shared_ptr<Backend>* backend) {
  if (name.empty() || name.size() > kMaxNameLength || name.find('\0') != std::string::npos) {
    return {Code::kInvalidArgument, "host backend: a name of 1 to " +
                                        std::to_string(kMaxNameLength) + " bytes is needed, got '" +
                                        name + "'"};
  }
  const long page = ::sysconf(_SC_PAGESIZE);
  if (page <= 0) return failed("host backend: page size", errno);
  backend->reset(new HostBackend(name, min_fd, static_cast<size_t>(page)));
  return Status::ok();
}

HostBackend::HostBackend(std::string name, int min_fd, size_t granularity)
    : name_(std::move(name)),
      min_fd_(std::max(min_fd, 2)),
      granularity_(granularity),
      extents_(granularity) {}  // offset 0 stays unused: no handle has the id 0

Status HostBackend::open_memfd() {
  if (memfd_.is_open()) return Status::ok();
  const int low = ::memfd_create(("kvcached:" + name_).c_str(), MFD_CLOEXEC);
  if (low < 0) return failed("host backend '" + name_ + "': memfd_create", errno);
  const int fd = ::fcntl(low, F_DUPFD_CLOEXEC, min_fd_ + 1);
  const int error = errno;
  ::close(low);
  if (fd < 0) {
    return failed("host backend '" + name_ + "': a descriptor above " + std::to_string(min_fd_),
                  error);
  }
  memfd_.adopt(fd);
  return Status::ok();
}

Status HostBackend::reserve(size_t size, uintptr_t* address) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* range = ::mmap(nullptr, size, PROT_NONE, flags, -1, 0);
  if (range == MAP_FAILED) {
    return failed("reserving " + std::to_string(size) + " bytes of addresses", errno);
  }
  if (::madvise(range, size, MADV_DONTFORK) != 0) {
    const int error = errno;
    ::munmap(range, size);
    return failed("keeping a reservation out of forked children", error);
  }
  *address = reinterpret_cast<uintptr_t>(range);
  return Status::ok();
}

Status HostBackend::free_reservation(uintptr_t address, size_t size) {
  if (::munmap(as_pointer(address), size) == 0) return Status::ok();
  return failed("freeing a reservation of " + std::to_string(size) + " bytes", errno);
}

Status HostBackend::create(size_t size, Handle* handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  Status status = open_memfd();
  if (!status.is_ok()) return status;
  const size_t offset = extents_.take(size);
  int error = 0;
  do {
    const int answer =
        ::fallocate(memfd_.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(size));
    error = answer == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error != 0) {
    extents_.give_back(offset, size);  // the kernel has undone what it had allocated of it
    return failed("creating " + std::to_string(size) + " bytes on host backend '" + name_ + "'",
                  error);
  }
  *handle = Handle{offset, size};
  return Status::ok();
}

Status HostBackend::release(Handle handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  int error = 0;
  do {
    error = punch(memfd_.get(), handle.id, handle.size) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error != 0) {
    Status status = failed("releasing " + std::to_string(handle.size) + " bytes", error);
    return {Code::kDriver, status.message()};
  }
  extents_.give_back(handle.id, handle.size);
  return Status::ok();
}

Status HostBackend::map(uintptr_t address, Handle handle, bool* placed) {
  *placed = false;
  int fd = -1;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    fd = memfd_.get();
  }
  // MAP_POPULATE fills the page tables here, on the mapping thread, and not fault by fault in the
  // engine's step.
  void* range = ::mmap(as_pointer(address), handle.size, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, static_cast<off_t>(handle.id));
  if (range == MAP_FAILED) {
    return failed("mapping " + std::to_string(handle.size) + " bytes", errno);
  }
  *placed = true;
  if (::madvise(range, handle.size, MADV_DONTFORK) != 0) {
    return failed("keeping a mapping out of forked children", errno);
  }
  return Status::ok();
}

Status HostBackend::unmap(uintptr_t address, size_t size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  void* range = ::mmap(as_pointer(address), size, PROT_NONE, flags, -1, 0);
  if (range == MAP_FAILED || ::madvise(range, size, MADV_DONTFORK) != 0) {
    return {Code::kDriver, "unmapping " + std::to_string(size) + " bytes: " + std::strerror(errno)};
  }
  return Status::ok();
}

Status HostBackend::record_fence(uintptr_t, FenceId* fence) {
  *fence = ++fences_;
  return Status::ok();
}

Status HostBackend::fence_done(FenceId, bool* done) {
  *done = true;
  return Status::ok();
}

Status HostBackend::memory_info(size_t* free_bytes, size_t* total_bytes) {
  return host_memory_info(free_bytes, total_bytes);
}

}  // namespace kvcached
