// One GPU's memory through the driver's virtual memory management.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.hpp"
#include "driver.hpp"

namespace kvcached {

// Uses the device's primary context, which it keeps alive, and leaves the calling thread's current
// context as it found it.
class CudaBackend : public Backend {
 public:
  // `ordinal` counts the devices that this process may see. kUnavailable, with the reason, where
  // there is no driver, no such device, or no virtual memory management.
  static Status open(int ordinal, std::shared_ptr<Backend>* backend);
  ~CudaBackend() override;

  const char* kind() const override { return "cuda"; }
  DlpackDevice device() const override { return {2, ordinal_}; }  // kDLCUDA
  size_t granularity() const override { return granularity_; }
  Status reserve(size_t size, uintptr_t* address) override;
  Status free_reservation(uintptr_t address, size_t size) override;
  Status create(size_t size, Handle* handle) override;
  Status release(Handle handle) override;
  Status map(uintptr_t address, Handle handle, bool* placed) override;
  Status unmap(uintptr_t address, size_t size) override;
  bool begin_calls() override;
  void end_calls() override;
  Status record_fence(uintptr_t stream, FenceId* fence) override;
  Status fence_done(FenceId fence, bool* done) override;
  void drop_fence(FenceId fence) override;
  Status memory_info(size_t* free_bytes, size_t* total_bytes) override;

 private:
  CudaBackend(const cuda::Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {}
  Status open_device();
  std::string on_device(const std::string& what) const;
  // Runs one driver call with the device's context current.
  template <typename Call>
  cuda::Result in_context(Call&& call) const;
  template <typename Call>
  Status call(const char* what, Call&& call) const;

  const cuda::Driver& driver_;
  const int ordinal_;
  cuda::Device device_ = 0;
  cuda::Context context_ = nullptr;
  cuda::AllocationProperties properties_{};
  cuda::AccessDescription access_{};
  size_t granularity_ = 0;
  std::mutex mutex_;                       // guards what follows
  std::vector<cuda::Event> spare_events_;  // dropped fences, for the next ones
};

}  // namespace kvcached
