// Wraps any backend: counts what is live, and refuses calls or holds fences open where a test asks
// for it.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

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
  kRecordFence,
  kFenceDone,
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
  bool begin_calls() override { return inner_->begin_calls(); }
  void end_calls() override { inner_->end_calls(); }
  Status record_fence(uintptr_t stream, FenceId* fence) override;
  Status fence_done(FenceId fence, bool* done) override;
  void drop_fence(FenceId fence) override;
  Status memory_info(size_t* free_bytes, size_t* total_bytes) override;

  // What exists now, over all arenas of this backend.
  int64_t live_handles() const;
  size_t created_bytes() const;
  int64_t live_reservations() const;
  int64_t live_fences() const;

  int64_t calls() const;
  void inject(Fault fault);
  void inject_off();

  // From now on fences are recorded as held: they are not done, whatever the device says, until
  // they are let pass, the oldest first. `hold` false lets later ones be recorded as usual.
  void hold_fences(bool hold);
  void pass_fences(size_t count);

  // The backend itself, without counting.
  Backend& inner() const { return *inner_; }

 private:
  Status count(Operation operation, const char* name);

  const std::shared_ptr<Backend> inner_;
  mutable std::mutex mutex_;
  int64_t handles_ = 0;
  int64_t reservations_ = 0;
  int64_t fences_ = 0;
  bool hold_ = false;
  std::vector<FenceId> held_;  // oldest first
  size_t created_bytes_ = 0;
  int64_t calls_ = 0;
  int64_t seen_ = 0;  // calls that the fault counts, since inject()
  Fault fault_;
};

}  // namespace kvcached
