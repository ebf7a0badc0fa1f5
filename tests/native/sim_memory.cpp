#include "sim_memory.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>

#include "support.hpp"

namespace kvcached::test {
namespace {

class HostMemory : public Memory {
 public:
  void write(uintptr_t address, const uint64_t* words, size_t count) override {
    std::memcpy(reinterpret_cast<void*>(address), words, count * sizeof *words);
  }
  void read(uintptr_t address, uint64_t* words, size_t count) const override {
    std::memcpy(words, reinterpret_cast<const void*>(address), count * sizeof *words);
  }
  size_t words_at_an_end(size_t block_bytes) const override { return block_bytes / 16; }
};

class CudaMemory : public Memory {
 public:
  CudaMemory() {
    library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) fail("no CUDA driver: %s", dlerror());
    int device = 0;
    find<int (*)(unsigned)>("cuInit")(0);
    check(find<int (*)(int*, int)>("cuDeviceGet")(&device, 0), "cuDeviceGet");
    check(find<int (*)(void**, int)>("cuDevicePrimaryCtxRetain")(&context_, device), "context");
    push_ = find<int (*)(void*)>("cuCtxPushCurrent_v2");
    pop_ = find<int (*)(void**)>("cuCtxPopCurrent_v2");
    to_device_ = find<int (*)(uint64_t, const void*, size_t)>("cuMemcpyHtoD_v2");
    to_host_ = find<int (*)(void*, uint64_t, size_t)>("cuMemcpyDtoH_v2");
  }
  void write(uintptr_t address, const uint64_t* words, size_t count) override {
    check(push_(context_), "push");
    check(to_device_(address, words, count * sizeof *words), "writing");
    void* popped = nullptr;
    check(pop_(&popped), "pop");
  }
  void read(uintptr_t address, uint64_t* words, size_t count) const override {
    check(push_(context_), "push");
    check(to_host_(words, address, count * sizeof *words), "reading");
    void* popped = nullptr;
    check(pop_(&popped), "pop");
  }
  size_t words_at_an_end(size_t block_bytes) const override {
    return std::min<size_t>(16, block_bytes / 16);
  }

 private:
  template <typename Function>
  Function find(const char* name) const {
    void* found = dlsym(library_, name);
    if (found == nullptr) fail("the CUDA driver lacks %s", name);
    return reinterpret_cast<Function>(found);
  }
  static void check(int result, const char* what) {
    if (result != 0) fail("%s: the CUDA driver answers %d", what, result);
  }

  void* library_ = nullptr;
  void* context_ = nullptr;
  int (*push_)(void*) = nullptr;
  int (*pop_)(void**) = nullptr;
  int (*to_device_)(uint64_t, const void*, size_t) = nullptr;
  int (*to_host_)(void*, uint64_t, size_t) = nullptr;
};

}  // namespace

std::unique_ptr<Memory> host_memory() {
  return std::make_unique<HostMemory>();
}

std::unique_ptr<Memory> cuda_memory() {
  return std::make_unique<CudaMemory>();
}

}  // namespace kvcached::test
