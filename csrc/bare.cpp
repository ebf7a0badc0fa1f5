#include "bare.hpp"

#include <chrono>

namespace kvcached {
namespace {

using Clock = std::chrono::steady_clock;

double microseconds(Clock::duration taken) {
  return std::chrono::duration<double, std::micro>(taken).count();
}

// One round: `handle` is created here if it does not exist, and released unless it is kept. After a
// failure it says what is left to release.
Status round_trip(Backend& backend, uintptr_t address, size_t page_bytes, bool keep, Handle* handle,
                  BareTimes* times) {
  const auto start = Clock::now();
  Status status;
  if (handle->size == 0) status = backend.create(page_bytes, handle);
  bool placed = false;
  if (status.is_ok()) status = backend.map(address, *handle, &placed);
  const auto mapped = Clock::now();
  if (placed) {
    const Status unmapped = backend.unmap(address, page_bytes);
    if (status.is_ok()) status = unmapped;
  }
  if (status.is_ok() && !keep) {
    status = backend.release(*handle);
    *handle = Handle{};
  }
  times->in_us.push_back(microseconds(mapped - start));
  times->out_us.push_back(microseconds(Clock::now() - mapped));
  return status;
}

}  // namespace

Status time_bare_pages(Backend& backend, size_t page_bytes, int64_t rounds, bool keep,
                       BareTimes* times) {
  CallScope calls(backend);
  uintptr_t address = 0;
  Status status = backend.reserve(page_bytes, &address);
  if (!status.is_ok()) return status;
  Handle handle;
  if (keep) status = backend.create(page_bytes, &handle);
  for (int64_t i = 0; i < rounds && status.is_ok(); ++i) {
    status = round_trip(backend, address, page_bytes, keep, &handle, times);
  }
  if (handle.size != 0) {
    const Status released = backend.release(handle);
    if (status.is_ok()) status = released;
  }
  const Status freed = backend.free_reservation(address, page_bytes);
  return status.is_ok() ? freed : status;
}

}  // namespace kvcached
