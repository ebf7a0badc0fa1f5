#include "driver.hpp"

#include <dlfcn.h>

namespace kvcached::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

// The table, or why there is none. Made once; the library stays open for the process's life.
class LazyDriver {
 public:
  LazyDriver() : status_(load()) {}
  const Status& status() const { return status_; }
  const Driver& driver() const { return driver_; }

 private:
  template <typename Function>
  void find(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(::dlsym(library_, name));
    if (*function == nullptr) missing_ += (missing_.empty() ? "" : ", ") + std::string(name);
  }

  void find_all() {
    find("cuInit", &driver_.init);
    find("cuGetErrorName", &driver_.get_error_name);
    find("cuGetErrorString", &driver_.get_error_string);
    find("cuDeviceGetCount", &driver_.device_get_count);
    find("cuDeviceGet", &driver_.device_get);
    find("cuDeviceGetAttribute", &driver_.device_get_attribute);
    find("cuDevicePrimaryCtxRetain", &driver_.primary_context_retain);
    find("cuDevicePrimaryCtxRelease_v2", &driver_.primary_context_release);
    find("cuCtxPushCurrent_v2", &driver_.context_push);
    find("cuCtxPopCurrent_v2", &driver_.context_pop);
    find("cuMemGetInfo_v2", &driver_.memory_info);
    find("cuMemGetAllocationGranularity", &driver_.granularity);
    find("cuMemAddressReserve", &driver_.address_reserve);
    find("cuMemAddressFree", &driver_.address_free);
    find("cuMemCreate", &driver_.create);
    find("cuMemRelease", &driver_.release);
    find("cuMemMap", &driver_.map);
    find("cuMemSetAccess", &driver_.set_access);
    find("cuMemUnmap", &driver_.unmap);
    find("cuEventCreate", &driver_.event_create);
    find("cuEventRecord", &driver_.event_record);
    find("cuEventQuery", &driver_.event_query);
    find("cuEventDestroy_v2", &driver_.event_destroy);
  }

  Status load() {
    library_ = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) {
      const char* reason = ::dlerror();
      return {Code::kUnavailable, std::string("no CUDA driver on this machine: ") +
                                      (reason != nullptr ? reason : kLibrary)};
    }
    find_all();
    if (!missing_.empty()) {
      return {Code::kUnavailable, std::string("the CUDA driver is too old, ") + kLibrary +
                                      " lacks " + missing_ + ": CUDA 11 or newer is needed"};
    }
    Status status = driver_.status(driver_.init(0), "cuInit");
    if (status.is_ok()) return status;
    return {Code::kUnavailable, "the CUDA driver does not start: " + status.message()};
  }

  void* library_ = nullptr;
  std::string missing_;
  Driver driver_{};
  Status status_;  // last: load() fills the others
};

}  // namespace

Status Driver::status(Result result, const std::string& what) const {
  if (result == kSuccess) return Status::ok();
  const char* name = nullptr;
  const char* text = nullptr;
  get_error_name(result, &name);
  get_error_string(result, &text);
  const Code code = result == kErrorOutOfMemory ? Code::kOutOfMemory : Code::kDriver;
  return {code, what + ": " + (name != nullptr ? name : "CUDA error") + " (" +
                    std::to_string(result) + ")" + (text != nullptr ? ", " : "") +
                    (text != nullptr ? text : "")};
}

Status open_driver(const Driver** driver) {
  // Never destroyed: owners of device memory may die later than any static of ours.
  static const LazyDriver* lazy = new LazyDriver();
  *driver = &lazy->driver();
  return lazy->status();
}

}  // namespace kvcached::cuda
