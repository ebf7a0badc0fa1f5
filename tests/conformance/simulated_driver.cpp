// A libcuda.so.1 for machines without a GPU: "device memory" is memfds. It is stricter than the
// real driver where we rely on rules: a context must be current, mappings are placed and removed
// whole, and memory is inaccessible until cuMemSetAccess.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kInvalidContext = 201, kNotReady = 600;
constexpr size_t kGranularity = 64 << 10, kCapacity = 64 << 20;

struct Memory {
  int fd;
  size_t size;
  int owners;  // the handle itself and every mapping
};
struct Event {
  bool recorded, asked;
};
struct Properties {
  int type, handle_types, location_type, location_id;
  void* win32;
  unsigned char flags[8];
};
struct Access {
  int location_type, location_id, flags;
};

std::mutex mutex;
std::map<uint64_t, Memory> memories;
std::map<uint64_t, std::pair<size_t, uint64_t>> mappings;  // address -> size, handle
std::map<uint64_t, size_t> reservations;
uint64_t next_handle = 1;
size_t used = 0;
int retained = 0;
thread_local std::vector<void*> contexts;

bool has_context() {
  return retained > 0 && !contexts.empty() && contexts.back() == &retained;
}

void drop(uint64_t handle) {
  Memory& memory = memories.at(handle);
  if (--memory.owners > 0) return;
  close(memory.fd);
  used -= memory.size;
  memories.erase(handle);
}

void* hole(uint64_t address, size_t size, int fixed) {
  return mmap(reinterpret_cast<void*>(address), size, PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  return getenv("SIMULATED_NO_DEVICE") ? 100 : 0;
}
int cuGetErrorName(int result, const char** name) {
  *name = result == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_SIMULATED";
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "simulated";
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? 0 : kInvalidDevice;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 102 && getenv("SIMULATED_NO_VMM") == nullptr;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  std::lock_guard<std::mutex> lock(mutex);
  ++retained;
  *context = &retained;
  return 0;
}
#ifndef SIMULATED_OLD
int cuDevicePrimaryCtxRelease_v2(int) {
  std::lock_guard<std::mutex> lock(mutex);
  return --retained < 0;
}
#endif
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return 0;
}
int cuCtxSynchronize() {
  return has_context() ? 0 : kInvalidContext;
}

int cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  *free_bytes = kCapacity - used;
  *total_bytes = kCapacity;
  return has_context() ? 0 : kInvalidContext;
}

int cuMemGetAllocationGranularity(size_t* granularity, const Properties* wanted, int option) {
  if (wanted->type != 1 || wanted->location_type != 1 || option != 0) return kInvalidValue;
  *granularity = kGranularity;
  return 0;
}

int cuMemAddressReserve(uint64_t* address, size_t size, size_t alignment, uint64_t hint,
                        unsigned long long flags) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!has_context()) return kInvalidContext;
  if (size % kGranularity || alignment % kGranularity || hint || flags) return kInvalidValue;
  void* range = hole(0, size + kGranularity, 0);
  if (range == MAP_FAILED) return kOutOfMemory;
  const uint64_t begin = reinterpret_cast<uint64_t>(range);
  *address = (begin + kGranularity - 1) / kGranularity * kGranularity;
  reservations[*address] = size;
  return 0;
}

int cuMemAddressFree(uint64_t address, size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = reservations.find(address);
  if (found == reservations.end() || found->second != size) return kInvalidValue;
  auto mapping = mappings.lower_bound(address);
  if (mapping != mappings.end() && mapping->first < address + size) return kInvalidValue;
  munmap(reinterpret_cast<void*>(address), size);
  reservations.erase(found);
  return 0;
}

int cuMemCreate(uint64_t* handle, size_t size, const Properties* wanted, unsigned long long flags) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!has_context()) return kInvalidContext;
  if (wanted->type != 1 || wanted->handle_types != 0 || wanted->location_type != 1 ||
      wanted->location_id != 0 || wanted->win32 != nullptr || flags || size % kGranularity) {
    return kInvalidValue;
  }
  if (size > kCapacity - used) return kOutOfMemory;
  const int fd = memfd_create("simulated", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(size)) != 0) return kOutOfMemory;
  used += size;
  *handle = next_handle++;
  memories[*handle] = {fd, size, 1};
  return 0;
}

int cuMemRelease(uint64_t handle) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!has_context()) return kInvalidContext;
  if (memories.count(handle) == 0) return kInvalidValue;
  drop(handle);
  return 0;
}

int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle,
             unsigned long long flags) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!has_context()) return kInvalidContext;
  auto memory = memories.find(handle);
  if (memory == memories.end() || memory->second.size != size || offset || flags) {
    return kInvalidValue;
  }
  for (const auto& [place, what] : mappings) {
    if (place < address + size && address < place + what.first) return kInvalidValue;
  }
  auto reservation = reservations.upper_bound(address);
  if (reservation == reservations.begin()) return kInvalidValue;
  --reservation;
  if (address + size > reservation->first + reservation->second) return kInvalidValue;
  mmap(reinterpret_cast<void*>(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->second.fd,
       0);
  ++memory->second.owners;
  mappings[address] = {size, handle};
  return 0;
}

int cuMemSetAccess(uint64_t address, size_t size, const Access* access, size_t count) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!has_context()) return kInvalidContext;
  if (count != 1 || access->location_type != 1 || access->location_id != 0 || access->flags != 3) {
    return kInvalidValue;
  }
  if (mappings.count(address) == 0 || mappings[address].first != size) return kInvalidValue;
  return mprotect(reinterpret_cast<void*>(address), size, PROT_READ | PROT_WRITE);
}

int cuMemUnmap(uint64_t address, size_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!has_context()) return kInvalidContext;
  auto found = mappings.find(address);
  if (found == mappings.end() || found->second.first != size) return kInvalidValue;
  hole(address, size, MAP_FIXED);
  drop(found->second.second);
  mappings.erase(found);
  return 0;
}

int cuEventCreate(Event** event, unsigned flags) {
  if (!has_context()) return kInvalidContext;
  if (flags != 2) return kInvalidValue;
  *event = new Event{};
  return 0;
}
int cuEventRecord(Event* event, void* stream) {
  if (!has_context()) return kInvalidContext;
  if (stream != nullptr) return kInvalidValue;
  *event = {true, false};
  return 0;
}
// Work is done when the call that does it returns; the first question is answered as on a GPU that
// is still busy.
int cuEventQuery(Event* event) {
  if (!has_context()) return kInvalidContext;
  if (!event->recorded) return kInvalidValue;
  if (event->asked) return 0;
  event->asked = true;
  return kNotReady;
}
int cuEventDestroy_v2(Event* event) {
  if (!has_context()) return kInvalidContext;
  delete event;
  return 0;
}

int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t size) {
  memset(reinterpret_cast<void*>(address), value, size);
  return has_context() ? 0 : kInvalidContext;
}

int cuMemcpyHtoD_v2(uint64_t address, const void* from, size_t size) {
  memcpy(reinterpret_cast<void*>(address), from, size);
  return has_context() ? 0 : kInvalidContext;
}

int cuMemcpyDtoH_v2(void* to, uint64_t address, size_t size) {
  memcpy(to, reinterpret_cast<void*>(address), size);
  return has_context() ? 0 : kInvalidContext;
}

}  // extern "C"
