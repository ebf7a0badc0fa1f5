#include "cover.hpp"

#include <algorithm>

namespace kvcached {

Status Cover::open(uintptr_t base, std::vector<Region> regions, int64_t pages) {
  base_ = base;
  regions_ = std::move(regions);
  std::sort(regions_.begin(), regions_.end(),
            [](const Region& a, const Region& b) { return a.offset < b.offset; });
  pages_ = pages;
  refused_ = static_cast<int64_t>(regions_.size()) * pages;
  states_.assign(static_cast<size_t>(refused_), State::kBare);
  Status status;
  for (const Region& region : regions_) {
    if (handles_.count(region.chunk) != 0) continue;
    Handle handle;
    status = backend_->create(region.chunk, &handle);
    if (!status.is_ok()) break;
    handles_[region.chunk] = handle;
    created_bytes_ += region.chunk;
  }
  if (status.is_ok()) status = retry();
  if (!status.is_ok()) close();
  return status;
}

size_t Cover::index_of(uintptr_t address) const {
  const auto after =
      std::upper_bound(regions_.begin(), regions_.end(), address - base_,
                       [](size_t offset, const Region& region) { return offset < region.offset; });
  const size_t region = static_cast<size_t>(after - regions_.begin()) - 1;
  const size_t page = (address - base_ - regions_[region].offset) / regions_[region].chunk;
  return region * static_cast<size_t>(pages_) + page;
}

Status Cover::cover(uintptr_t address, size_t chunk, State* state) {
  if (*state == State::kBlind) {
    Status status = backend_->unmap(address, chunk);
    if (!status.is_ok()) return status;
    *state = State::kBare;
  }
  bool placed = false;
  Status status = backend_->map(address, handles_.at(chunk), &placed);
  *state = !placed ? State::kBare : status.is_ok() ? State::kCovered : State::kBlind;
  if (status.is_ok()) --refused_;
  return status;
}

Status Cover::lift(uintptr_t address) {
  const size_t index = index_of(address);
  State& state = states_[index];
  if (state != State::kBare) {
    const size_t chunk = regions_[index / static_cast<size_t>(pages_)].chunk;
    Status status = backend_->unmap(address, chunk);
    if (!status.is_ok()) return status;
  }
  if (state != State::kCovered) --refused_;
  state = State::kPage;
  return Status::ok();
}

Status Cover::lay(uintptr_t address) noexcept {
  const size_t index = index_of(address);
  ++refused_;
  states_[index] = State::kBare;
  return cover(address, regions_[index / static_cast<size_t>(pages_)].chunk, &states_[index]);
}

Status Cover::retry() {
  for (size_t region = 0; region < regions_.size() && refused_ > 0; ++region) {
    for (int64_t page = 0; page < pages_; ++page) {
      State& place = state(region, page);
      if (place == State::kCovered || place == State::kPage) continue;
      Status status = cover(address_of(region, page), regions_[region].chunk, &place);
      if (!status.is_ok()) return status;
    }
  }
  return Status::ok();
}

bool Cover::close() {
  if (backend_->inherited()) return true;
  bool gone = true;
  for (size_t region = 0; region < regions_.size() && is_open(); ++region) {
    const size_t chunk = regions_[region].chunk;
    for (int64_t page = 0; page < pages_; ++page) {
      State& place = state(region, page);
      if (place == State::kBare || place == State::kPage) continue;
      const uintptr_t address = address_of(region, page);
      // Once more, for a passing refusal.
      if (backend_->unmap(address, chunk).is_ok() || backend_->unmap(address, chunk).is_ok()) {
        place = State::kBare;
      } else {
        gone = false;
      }
    }
  }
  if (!gone) return false;
  for (auto handle = handles_.begin(); handle != handles_.end();) {
    const bool released =
        backend_->release(handle->second).is_ok() || backend_->release(handle->second).is_ok();
    if (released) created_bytes_ -= handle->second.size;
    handle = released ? handles_.erase(handle) : std::next(handle);
  }
  return true;
}

int64_t Cover::bare_places() const {
  return is_open() ? refused_ : 0;
}

}  // namespace kvcached
