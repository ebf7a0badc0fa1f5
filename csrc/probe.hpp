// Wraps any backend: counts what is live, and refuses the n-th call where a test asks for it.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

#include "backend.hpp"

namespace kvcached {

// One operation as fault injection sees it. kAccess is the second half of map(): the memory is
// placed and then cannot be made accessible, as cuMemSetAccess may answer.
enum class Operation : int32_t {
  kAny = 0,
  kReserve,
  kFreeReservation,
  kCreate,
  kMap,
  kAccess,
  kUnmap,
  kRelease,
};

struct Fault {
  int64_t nth = 0;    // the first call that fails, counted from 1 at inject()
  int64_t times = 1;  // how many calls in a row fail
  Code code = Code::kDriver;
  Operation operation = Operation::kAny;
};

class Probe : public Backend {
 public:
  explicit Probe(std::shared_ptr<Backend> inner) : inner_(std::move(inner)) {}

  const char* kind() const override { return inner_->kind(); }
  DlpackDevice device() const override { return inner_->device(); }
  size_t granularity() const override { return inner_->granularity(); }
  Status reserve(size_t size, uintptr_t* address) override;
  Status free_reservation(uintptr_t address, size_t size) override;
  Status create(size_t size, Handle* handle) override;
  Status release(Handle handle) override;
  Status map(uintptr_t address, Handle handle, bool* placed) override;
  Status unmap(uintptr_t address, size_t size) override;
  Status memory_info(size_t* free_bytes, size_t* total_bytes) override;

  // What exists now, over all arenas of this backend.
  int64_t live_handles() const;
  size_t created_bytes() const;
  int64_t live_reservations() const;

  int64_t calls() const;
  void inject(Fault fault);
  void inject_off();

 private:
  Status count(Operation operation, const char* name);

  const std::shared_ptr<Backend> inner_;
  mutable std::mutex mutex_;
  int64_t handles_ = 0;
  int64_t reservations_ = 0;
  size_t created_bytes_ = 0;
  int64_t calls_ = 0;
  int64_t seen_ = 0;  // calls that the fault counts, since inject()
  Fault fault_;
};

}  // namespace kvcached
