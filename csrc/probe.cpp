#include "probe.hpp"

#include <algorithm>
#include <string>

namespace kvcached {

Status Probe::count(Operation operation, const char* name) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++calls_;
  if (fault_.nth == 0) return Status::ok();
  if (fault_.operation != Operation::kAny && fault_.operation != operation) return Status::ok();
  ++seen_;
  if (seen_ < fault_.nth || seen_ >= fault_.nth + fault_.times) return Status::ok();
  return {fault_.code, std::string("injected failure of ") + name + " (call " +
                           std::to_string(seen_) + " since inject)"};
}

Status Probe::reserve(size_t size, uintptr_t* address) {
  Status status = count(Operation::kReserve, "reserve");
  if (status.is_ok()) status = inner_->reserve(size, address);
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  ++reservations_;
  return status;
}

Status Probe::free_reservation(uintptr_t address, size_t size) {
  Status status = count(Operation::kFreeReservation, "free_reservation");
  if (status.is_ok()) status = inner_->free_reservation(address, size);
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  --reservations_;
  return status;
}

Status Probe::create(size_t size, Handle* handle) {
  Status status = count(Operation::kCreate, "create");
  if (status.is_ok()) status = inner_->create(size, handle);
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  ++handles_;
  created_bytes_ += size;
  return status;
}

Status Probe::release(Handle handle) {
  Status status = count(Operation::kRelease, "release");
  if (status.is_ok()) status = inner_->release(handle);
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  --handles_;
  created_bytes_ -= handle.size;
  return status;
}

Status Probe::map(uintptr_t address, Handle handle, bool* placed) {
  *placed = false;
  Status status = count(Operation::kMap, "map");
  if (status.is_ok()) status = inner_->map(address, handle, placed);
  if (!status.is_ok()) return status;
  return count(Operation::kAccess, "access");
}

Status Probe::unmap(uintptr_t address, size_t size) {
  Status status = count(Operation::kUnmap, "unmap");
  return status.is_ok() ? inner_->unmap(address, size) : status;
}

Status Probe::record_fence(uintptr_t stream, FenceId* fence) {
  Status status = count(Operation::kRecordFence, "record_fence");
  if (status.is_ok()) status = inner_->record_fence(stream, fence);
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  ++fences_;
  if (hold_) held_.push_back(*fence);
  return status;
}

Status Probe::fence_done(FenceId fence, bool* done) {
  *done = false;
  Status status = count(Operation::kFenceDone, "fence_done");
  if (!status.is_ok()) return status;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::find(held_.begin(), held_.end(), fence) != held_.end()) return status;
  }
  return inner_->fence_done(fence, done);
}

void Probe::drop_fence(FenceId fence) {
  {
    // Before the backend may hand the same fence out again.
    std::lock_guard<std::mutex> lock(mutex_);
    --fences_;
    held_.erase(std::remove(held_.begin(), held_.end(), fence), held_.end());
  }
  inner_->drop_fence(fence);
}

void Probe::hold_fences(bool hold) {
  std::lock_guard<std::mutex> lock(mutex_);
  hold_ = hold;
}

void Probe::pass_fences(size_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  held_.erase(held_.begin(), held_.begin() + static_cast<long>(std::min(count, held_.size())));
}

Status Probe::memory_info(size_t* free_bytes, size_t* total_bytes) {
  return inner_->memory_info(free_bytes, total_bytes);
}

int64_t Probe::live_handles() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return handles_;
}

size_t Probe::created_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return created_bytes_;
}

int64_t Probe::live_reservations() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return reservations_;
}

int64_t Probe::live_fences() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return fences_;
}

int64_t Probe::calls() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return calls_;
}

void Probe::inject(Fault fault) {
  std::lock_guard<std::mutex> lock(mutex_);
  fault_ = fault;
  seen_ = 0;
}

void Probe::inject_off() {
  inject(Fault{});
}

}  // namespace kvcached
