#include "cuda_backend.hpp"

namespace kvcached {

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
  if (context_ != nullptr && !inherited()) driver_.primary_context_release(device_);
}

std::string CudaBackend::on_device(const std::string& what) const {
  return what + " on CUDA device " + std::to_string(ordinal_);
}

template <typename Call>
Status CudaBackend::call(const char* what, Call&& call) const {
  cuda::Result result = driver_.context_push(context_);
  if (result == cuda::kSuccess) {
    result = call();
    cuda::Context popped = nullptr;
    driver_.context_pop(&popped);
  }
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

Status CudaBackend::memory_info(size_t* free_bytes, size_t* total_bytes) {
  return call("asking for free memory",
              [&] { return driver_.memory_info(free_bytes, total_bytes); });
}

}  // namespace kvcached
