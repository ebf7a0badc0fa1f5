#include "handles.hpp"

namespace kvcached {

Status Reservation::open(std::shared_ptr<Backend> backend, size_t size) {
  Status status = backend->reserve(size, &address_);
  if (!status.is_ok()) return status;
  backend_ = std::move(backend);
  size_ = size;
  return status;
}

Reservation::~Reservation() {
  if (backend_ == nullptr || backend_->inherited()) return;
  Status status = backend_->free_reservation(address_, size_);
  // Once more, for a passing refusal. Addresses alone are not memory: beyond that, let them be.
  if (!status.is_ok()) status = backend_->free_reservation(address_, size_);
}

Status Fence::record(std::shared_ptr<Backend> backend, uintptr_t stream, Fence* fence) {
  FenceId id = 0;
  Status status = backend->record_fence(stream, &id);
  if (!status.is_ok()) return status;
  fence->drop();
  fence->backend_ = std::move(backend);
  fence->id_ = id;
  return status;
}

Fence& Fence::operator=(Fence&& other) noexcept {
  if (this == &other) return *this;
  drop();
  backend_ = std::move(other.backend_);
  id_ = other.id_;
  return *this;
}

void Fence::drop() noexcept {
  if (backend_ != nullptr && !backend_->inherited()) backend_->drop_fence(id_);
  backend_.reset();
}

PageHandle& PageHandle::operator=(PageHandle&& other) noexcept {
  if (this == &other) return *this;
  if (store_ != nullptr) store_->give_back(handle_);
  store_ = std::exchange(other.store_, nullptr);
  handle_ = other.handle_;
  return *this;
}

PageHandle::~PageHandle() {
  if (store_ != nullptr) store_->give_back(handle_);
}

Handle PageHandle::let_go() noexcept {
  store_ = nullptr;
  return handle_;
}

Mapping::~Mapping() {
  if (store_ != nullptr) store_->displace(handle_, address_);
}

Status HandleStore::note(Status status) noexcept {
  if (status.is_ok()) return status;
  ++counters_.failures;
  last_failure_ = status.message();
  return status;
}

// Makes room for every live handle in the pool and in quarantine, so that giving one back, which
// happens in destructors, never has to allocate.
void HandleStore::grow_lists() {
  if (quarantine_.capacity() <= live_handles_) quarantine_.reserve(2 * live_handles_ + 16);
}

Status HandleStore::acquire(size_t size, PageHandle* handle) {
  std::vector<Handle>& kept = pool_[size];
  if (!kept.empty()) {
    *handle = PageHandle(this, kept.back());
    kept.pop_back();
    pooled_bytes_ -= size;
    return Status::ok();
  }
  grow_lists();
  if (kept.capacity() <= live_handles_) kept.reserve(2 * live_handles_ + 16);
  Handle created;
  Status status = note(backend_->create(size, &created));
  if (status.code() == Code::kOutOfMemory && pooled_bytes_ > 0) {
    trim(0);  // handles of other sizes, kept for reuse, hold memory that would do
    status = note(backend_->create(size, &created));
  }
  if (!status.is_ok()) return status;
  ++live_handles_;
  ++counters_.creates;
  created_bytes_ += size;
  *handle = PageHandle(this, created);
  return status;
}

Status HandleStore::place(PageHandle handle, uintptr_t address, std::vector<Mapping>* mappings) {
  mappings->reserve(mappings->size() + 1);
  if (cover_ != nullptr) {
    Status lifted = note(cover_->lift(address));
    if (!lifted.is_ok()) return lifted;
  }
  bool placed = false;
  Status status = note(backend_->map(address, handle.get(), &placed));
  if (placed) {
    ++counters_.maps;
    mappings->emplace_back(this, handle.let_go(), address);
  } else if (cover_ != nullptr) {
    (void)note(cover_->lay(address));
  }
  return status;
}

void HandleStore::give_back(Handle handle) noexcept {
  if (backend_->inherited()) return;
  if (pooled_bytes_ + handle.size > pool_limit_) {
    release(handle);
    return;
  }
  pool_[handle.size].push_back(handle);
  pooled_bytes_ += handle.size;
}

void HandleStore::displace(Handle handle, uintptr_t address) noexcept {
  if (backend_->inherited()) return;
  if (!note(backend_->unmap(address, handle.size)).is_ok()) {
    quarantine(handle, address);
    return;
  }
  ++counters_.unmaps;
  if (cover_ != nullptr) (void)note(cover_->lay(address));
  give_back(handle);
}

void HandleStore::release(Handle handle) noexcept {
  if (!note(backend_->release(handle)).is_ok()) {
    quarantine(handle, 0);
    return;
  }
  --live_handles_;
  ++counters_.releases;
  created_bytes_ -= handle.size;
}

void HandleStore::quarantine(Handle handle, uintptr_t address) noexcept {
  quarantine_.push_back({handle, address});
  quarantined_bytes_ += handle.size;
}

void HandleStore::trim(size_t keep) {
  for (auto& [size, kept] : pool_) {
    while (!kept.empty() && pooled_bytes_ > keep) {
      const Handle handle = kept.back();
      kept.pop_back();
      pooled_bytes_ -= size;
      release(handle);
    }
  }
}

void HandleStore::retry() {
  // From the back: what fails again is appended, and swapped to the front's side of `left`.
  for (size_t left = quarantine_.size(); left > 0; --left) {
    std::swap(quarantine_[left - 1], quarantine_.back());
    const Stuck stuck = quarantine_.back();
    quarantine_.pop_back();
    quarantined_bytes_ -= stuck.handle.size;
    if (stuck.address != 0) {
      displace(stuck.handle, stuck.address);
    } else {
      release(stuck.handle);
    }
  }
  if (cover_ != nullptr) (void)note(cover_->retry());
}

void HandleStore::close() {
  if (backend_->inherited()) return;
  pool_limit_ = 0;
  trim(0);
  retry();
}

bool HandleStore::is_stuck(uintptr_t address, size_t size) const {
  for (const Stuck& stuck : quarantine_) {
    if (stuck.address == 0) continue;
    if (stuck.address < address + size && address < stuck.address + stuck.handle.size) return true;
  }
  return false;
}

Status HandleStore::check(size_t mapped_bytes) const {
  size_t pooled = 0;
  for (const auto& [size, kept] : pool_) pooled += size * kept.size();
  size_t quarantined = 0;
  for (const Stuck& stuck : quarantine_) quarantined += stuck.handle.size;
  if (pooled == pooled_bytes_ && quarantined == quarantined_bytes_ && pooled <= pool_limit_ &&
      mapped_bytes + pooled + quarantined == created_bytes_) {
    return Status::ok();
  }
  return {Code::kDriver, "arena does not add up: mapped " + std::to_string(mapped_bytes) +
                             " + pooled " + std::to_string(pooled) + " (counted " +
                             std::to_string(pooled_bytes_) + ") + quarantined " +
                             std::to_string(quarantined) + " (counted " +
                             std::to_string(quarantined_bytes_) + ") bytes, created " +
                             std::to_string(created_bytes_)};
}

}  // namespace kvcached
