#include "cuda_backend.hpp"

namespace kvcached {
namespace {

constexpr size_t kSpareEvents = 16;

// The backend whose context this thread has made current for a run of calls.
thread_local const CudaBackend* current_backend = nullptr;

}  // namespace

Status CudaBackend::open(int ordinal, std::shared_ptr<Backend>* backend) {
  const cuda::Driver* driver = nullptr;
  Status status = cuda::open_driver(&driver);
  if (!status.is_ok()) return status;
  int count = 0;
  status = driver->status(driver->device_get_count(&count), "counting devices");
  if (!status.is_ok()) return {Code::kUnavailable, status.message()};
  if (ordinal < 0 || ordinal >= count) {
    return {Code::kUnavailable, "no CUDA device " + std::to_string(ordinal) +
                                    ": this process sees " + std::to_string(count)};
  }
  std::shared_ptr<CudaBackend> made(new CudaBackend(*driver, ordinal));
  status = made->open_device();
  if (status.is_ok()) *backend = std::move(made);
  return status;
}

Status CudaBackend::open_device() {
  Status status = driver_.status(driver_.device_get(&device_, ordinal_), on_device("opening"));
  if (!status.is_ok()) return status;
  int supported = 0;
  status = driver_.status(
      driver_.device_get_attribute(&supported, cuda::kAttributeVirtualMemory, device_),
      on_device("asking for virtual memory management"));
  if (!status.is_ok()) return status;
  if (supported == 0) {
    return {Code::kUnavailable, on_device("virtual memory management") +
                                    ": not supported by this GPU, driver or platform"};
  }
  const cuda::MemoryLocation location = {cuda::kLocationDevice, device_};
  properties_.type = cuda::kAllocationPinned;
  properties_.location = location;
  access_ = {location, cuda::kAccessReadWrite};
  status = driver_.status(driver_.primary_context_retain(&context_, device_),
                          on_device("retaining the primary context"));
  if (!status.is_ok()) return status;
  return call("asking for the granularity", [&] {
    return driver_.granularity(&granularity_, &properties_, cuda::kGranularityMinimum);
  });
}

CudaBackend::~CudaBackend() {
  // The driver cannot be used in a forked child.
  if (context_ == nullptr || inherited()) return;
  for (const cuda::Event event : spare_events_) {
    in_context([&] { return driver_.event_destroy(event); });
  }
  driver_.primary_context_release(device_);
}

std::string CudaBackend::on_device(const std::string& what) const {
  return what + " on CUDA device " + std::to_string(ordinal_);
}

bool CudaBackend::begin_calls() {
  if (current_backend != nullptr || driver_.context_push(context_) != cuda::kSuccess) return false;
  current_backend = this;
  return true;
}

void CudaBackend::end_calls() {
  current_backend = nullptr;
  cuda::Context popped = nullptr;
  driver_.context_pop(&popped);
}

template <typename Call>
cuda::Result CudaBackend::in_context(Call&& call) const {
  if (current_backend == this) return call();
  cuda::Result result = driver_.context_push(context_);
  if (result != cuda::kSuccess) return result;
  result = call();
  cuda::Context popped = nullptr;
  driver_.context_pop(&popped);
  return result;
}

template <typename Call>
Status CudaBackend::call(const char* what, Call&& call) const {
  const cuda::Result result = in_context(call);
  return result == cuda::kSuccess ? Status::ok() : driver_.status(result, on_device(what));
}

Status CudaBackend::reserve(size_t size, uintptr_t* address) {
  cuda::DevicePointer pointer = 0;
  Status status = call("reserving addresses",
                       [&] { return driver_.address_reserve(&pointer, size, granularity_, 0, 0); });
  *address = static_cast<uintptr_t>(pointer);
  return status;
}

Status CudaBackend::free_reservation(uintptr_t address, size_t size) {
  return call("freeing addresses", [&] { return driver_.address_free(address, size); });
}

Status CudaBackend::create(size_t size, Handle* handle) {
  cuda::MemoryHandle made = 0;
  Status status =
      call("creating a page", [&] { return driver_.create(&made, size, &properties_, 0); });
  if (status.is_ok()) *handle = Handle{made, size};
  return status;
}

Status CudaBackend::release(Handle handle) {
  return call("releasing a page", [&] { return driver_.release(handle.id); });
}

Status CudaBackend::map(uintptr_t address, Handle handle, bool* placed) {
  *placed = false;
  return call("mapping a page", [&] {
    const cuda::Result result = driver_.map(address, handle.size, 0, handle.id, 0);
    if (result != cuda::kSuccess) return result;
    *placed = true;
    return driver_.set_access(address, handle.size, &access_, 1);
  });
}

Status CudaBackend::unmap(uintptr_t address, size_t size) {
  return call("unmapping a page", [&] { return driver_.unmap(address, size); });
}

Status CudaBackend::record_fence(uintptr_t stream, FenceId* fence) {
  cuda::Event event = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!spare_events_.empty()) {
      event = spare_events_.back();
      spare_events_.pop_back();
    }
  }
  Status status = call("recording a fence", [&] {
    if (event == nullptr) {
      const cuda::Result made = driver_.event_create(&event, cuda::kEventDisableTiming);
      if (made != cuda::kSuccess) return made;
    }
    return driver_.event_record(event, reinterpret_cast<cuda::Stream>(stream));
  });
  *fence = reinterpret_cast<FenceId>(event);
  if (!status.is_ok() && event != nullptr) drop_fence(*fence);
  return status;
}

Status CudaBackend::fence_done(FenceId fence, bool* done) {
  cuda::Result answer = cuda::kSuccess;
  const auto event = reinterpret_cast<cuda::Event>(fence);
  Status status = call("asking for a fence", [&] {
    answer = driver_.event_query(event);
    return answer == cuda::kErrorNotReady ? cuda::kSuccess : answer;
  });
  *done = answer == cuda::kSuccess && status.is_ok();
  return status;
}

void CudaBackend::drop_fence(FenceId fence) {
  const auto event = reinterpret_cast<cuda::Event>(fence);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (spare_events_.size() < kSpareEvents) {
      spare_events_.push_back(event);
      return;
    }
  }
  in_context([&] { return driver_.event_destroy(event); });
}

Status CudaBackend::memory_info(size_t* free_bytes, size_t* total_bytes) {
  return call("asking for free memory",
              [&] { return driver_.memory_info(free_bytes, total_bytes); });
}

}  // namespace kvcached
