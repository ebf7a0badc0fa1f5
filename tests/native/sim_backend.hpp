// A backend as the simulation sees it: it knows where every page is, refuses calls and ends the
// process when told to, and plays a device whose work takes a while.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backend.hpp"

namespace kvcached::test {

// What happens to the calls of one step, counted from 1. 0: nothing does.
struct Plan {
  int64_t die_at = 0;  // SIGKILL at this call,
  bool after = false;  // before or after it is carried out
  int64_t fail_at = 0;
  int64_t fail_times = 1;
  Code fail_code = Code::kDriver;
};

// A range of addresses that work on the device reads or writes.
struct Span {
  uintptr_t address;
  size_t size;
};

class SimBackend : public Backend {
 public:
  explicit SimBackend(std::shared_ptr<Backend> inner) : inner_(std::move(inner)) {}

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
  Status memory_info(size_t* free_bytes, size_t* total_bytes) override {
    return inner_->memory_info(free_bytes, total_bytes);
  }

  void set_plan(Plan plan);
  // Work is enqueued on the device, and the oldest is finished.
  void begin_work(std::vector<Span> touched);
  void finish_work(size_t count);
  size_t work() const;

  // Waits until the mapping thread has done all that it can before the device gets on: it only asks
  // for fences any more. False where no fence is open: then it can be waited for as usual.
  bool fence_is_open() const;
  bool fence_was_refused() const;  // the last time that one was recorded
  void count_polls_anew();
  int64_t quiet_polls() const;
  void wait_for_poll(int64_t seen) const;

  size_t created_bytes() const;
  size_t placed_bytes() const;
  int64_t calls() const;
  int64_t refusals() const;
  // Where each handle lies, for the comparison with the kernel's books: address -> handle.
  std::map<uintptr_t, Handle> places() const;

 private:
  Status before(const char* name);
  void after();
  bool work_before_is_done(int64_t upto) const { return finished_ >= upto; }

  const std::shared_ptr<Backend> inner_;
  mutable std::mutex mutex_;
  mutable std::condition_variable polled_;
  Plan plan_;
  int64_t calls_ = 0;  // since set_plan
  int64_t all_calls_ = 0;
  int64_t refusals_ = 0;
  bool fence_refused_ = false;
  int64_t quiet_polls_ = 0;             // questions for fences since the last call of another kind
  std::map<uint64_t, size_t> handles_;  // that exist, by id
  std::map<uint64_t, uintptr_t> placed_at_;  // handle -> address
  std::map<uintptr_t, Handle> places_;       // address -> handle
  std::map<FenceId, int64_t> fences_;        // -> the work that stands before it
  std::deque<std::vector<Span>> work_;       // under way, oldest first
  int64_t begun_ = 0, finished_ = 0;         // work items ever
};

}  // namespace kvcached::test
