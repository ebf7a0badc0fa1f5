#include "sim_backend.hpp"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <string>

#include "support.hpp"

namespace kvcached::test {
namespace {

using Lock = std::unique_lock<std::mutex>;

bool overlap(uintptr_t a, size_t a_size, uintptr_t b, size_t b_size) {
  return a < b + b_size && b < a + a_size;
}

}  // namespace

Status SimBackend::before(const char* name) {
  ++calls_;
  ++all_calls_;
  quiet_polls_ = 0;
  if (plan_.die_at == calls_ && !plan_.after) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  if (plan_.fail_at == 0 || calls_ < plan_.fail_at || calls_ >= plan_.fail_at + plan_.fail_times) {
    return Status::ok();
  }
  ++refusals_;
  return {plan_.fail_code, std::string("simulated refusal of ") + name};
}

void SimBackend::after() {
  if (plan_.die_at != calls_ || !plan_.after) return;
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

void SimBackend::set_plan(Plan plan) {
  Lock lock(mutex_);
  plan_ = plan;
  calls_ = 0;
}

Status SimBackend::reserve(size_t size, uintptr_t* address) {
  Lock lock(mutex_);
  Status status = before("reserve");
  if (status) status = inner_->reserve(size, address);
  after();
  return status;
}

Status SimBackend::free_reservation(uintptr_t address, size_t size) {
  Lock lock(mutex_);
  Status status = before("free_reservation");
  if (!places_.empty()) fail("addresses are freed with %zu mappings in them", places_.size());
  if (status) status = inner_->free_reservation(address, size);
  after();
  return status;
}

Status SimBackend::create(size_t size, Handle* handle) {
  Lock lock(mutex_);
  Status status = before("create");
  if (status) status = inner_->create(size, handle);
  if (status) {
    const auto [place, fresh] = handles_.emplace(handle->id, handle->size);
    const auto next = std::next(place);
    const bool extents = std::strcmp(inner_->kind(), "host") == 0;  // there an id is an offset
    const bool overlaps =
        extents && ((next != handles_.end() && place->first + place->second > next->first) ||
                    (place != handles_.begin() &&
                     std::prev(place)->first + std::prev(place)->second > place->first));
    if (!fresh || overlaps || handle->size != size) {
      fail("handle %lu of %zu bytes exists already, in part or whole", handle->id, size);
    }
  }
  after();
  return status;
}

Status SimBackend::release(Handle handle) {
  Lock lock(mutex_);
  Status status = before("release");
  const auto found = handles_.find(handle.id);
  if (found == handles_.end()) fail("handle %lu is released and does not exist", handle.id);
  if (placed_at_.count(handle.id) != 0) fail("handle %lu is released where it lies", handle.id);
  if (status) status = inner_->release(handle);
  if (status) handles_.erase(found);
  after();
  return status;
}

Status SimBackend::map(uintptr_t address, Handle handle, bool* placed) {
  Lock lock(mutex_);
  *placed = false;
  Status status = before("map");
  if (handles_.count(handle.id) == 0) fail("handle %lu is mapped and does not exist", handle.id);
  if (placed_at_.count(handle.id) != 0) fail("handle %lu is mapped in two places", handle.id);
  for (const auto& [place, what] : places_) {
    if (overlap(address, handle.size, place, what.size)) fail("two pages lie in one place");
  }
  if (status) status = inner_->map(address, handle, placed);
  if (*placed) {
    placed_at_[handle.id] = address;
    places_[address] = handle;
  }
  after();
  if (status) status = before("access");  // the memory is placed and cannot be used
  return status;
}

Status SimBackend::unmap(uintptr_t address, size_t size) {
  Lock lock(mutex_);
  Status status = before("unmap");
  const auto found = places_.find(address);
  if (found == places_.end() || found->second.size != size) fail("unmaps what is not mapped");
  for (const std::vector<Span>& item : work_) {
    for (const Span& span : item) {
      if (overlap(address, size, span.address, span.size)) {
        fail("a page is unmapped under work that the device has not done");
      }
    }
  }
  if (status) status = inner_->unmap(address, size);
  if (status) {
    placed_at_.erase(found->second.id);
    places_.erase(found);
  }
  after();
  return status;
}

Status SimBackend::record_fence(uintptr_t stream, FenceId* fence) {
  Lock lock(mutex_);
  Status status = before("record_fence");
  if (status) status = inner_->record_fence(stream, fence);
  fence_refused_ = !status;
  if (status) fences_[*fence] = begun_;
  after();
  return status;
}

Status SimBackend::fence_done(FenceId fence, bool* done) {
  Lock lock(mutex_);
  *done = false;
  const auto found = fences_.find(fence);
  if (found == fences_.end()) fail("a fence is asked that does not exist");
  ++quiet_polls_;
  polled_.notify_all();
  if (!work_before_is_done(found->second)) return Status::ok();
  Status status = inner_->fence_done(fence, done);
  while (status && !*done) status = inner_->fence_done(fence, done);  // an empty stream's
  return status;
}

void SimBackend::drop_fence(FenceId fence) {
  Lock lock(mutex_);
  fences_.erase(fence);
  inner_->drop_fence(fence);
}

void SimBackend::begin_work(std::vector<Span> touched) {
  Lock lock(mutex_);
  ++begun_;
  work_.push_back(std::move(touched));
}

void SimBackend::finish_work(size_t count) {
  Lock lock(mutex_);
  for (; count > 0 && !work_.empty(); --count) {
    ++finished_;
    work_.pop_front();
  }
}

size_t SimBackend::work() const {
  Lock lock(mutex_);
  return work_.size();
}

bool SimBackend::fence_is_open() const {
  Lock lock(mutex_);
  for (const auto& [fence, upto] : fences_) {
    if (!work_before_is_done(upto)) return true;
  }
  return false;
}

bool SimBackend::fence_was_refused() const {
  Lock lock(mutex_);
  return fence_refused_;
}

void SimBackend::count_polls_anew() {
  Lock lock(mutex_);
  quiet_polls_ = 0;
}

int64_t SimBackend::quiet_polls() const {
  Lock lock(mutex_);
  return quiet_polls_;
}

void SimBackend::wait_for_poll(int64_t seen) const {
  Lock lock(mutex_);
  polled_.wait_for(lock, std::chrono::milliseconds(1), [&] { return quiet_polls_ != seen; });
}

size_t SimBackend::created_bytes() const {
  Lock lock(mutex_);
  size_t bytes = 0;
  for (const auto& [id, size] : handles_) bytes += size;
  return bytes;
}

size_t SimBackend::placed_bytes() const {
  Lock lock(mutex_);
  size_t bytes = 0;
  for (const auto& [address, handle] : places_) bytes += handle.size;
  return bytes;
}

int64_t SimBackend::calls() const {
  Lock lock(mutex_);
  return all_calls_;
}

int64_t SimBackend::refusals() const {
  Lock lock(mutex_);
  return refusals_;
}

std::map<uintptr_t, Handle> SimBackend::places() const {
  Lock lock(mutex_);
  return places_;
}

}  // namespace kvcached::test
