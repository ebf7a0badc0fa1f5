// The CUDA driver's functions that we call, found when first needed. The types follow the driver's
// ABI (documented in the CUDA Driver API reference); no CUDA header is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "status.hpp"

namespace kvcached::cuda {

using Result = int;  // CUresult
constexpr Result kSuccess = 0;
constexpr Result kErrorOutOfMemory = 2;
constexpr Result kErrorNotInitialized = 3;
constexpr Result kErrorDeinitialized = 4;
constexpr Result kErrorNoDevice = 100;
constexpr Result kErrorNotReady = 600;

using Device = int;                  // CUdevice
using Context = struct ContextTag*;  // CUcontext
using Stream = struct StreamTag*;    // CUstream
using Event = struct EventTag*;      // CUevent
using DevicePointer = uint64_t;      // CUdeviceptr
using MemoryHandle = uint64_t;       // CUmemGenericAllocationHandle

constexpr int kAttributeVirtualMemory = 102;  // ..._VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
constexpr int kAllocationPinned = 1;          // CU_MEM_ALLOCATION_TYPE_PINNED
constexpr int kLocationDevice = 1;            // CU_MEM_LOCATION_TYPE_DEVICE
constexpr int kAccessReadWrite = 3;           // CU_MEM_ACCESS_FLAGS_PROT_READWRITE
constexpr int kGranularityMinimum = 0;        // CU_MEM_ALLOC_GRANULARITY_MINIMUM
constexpr unsigned kEventDisableTiming = 2;   // CU_EVENT_DISABLE_TIMING

struct MemoryLocation {  // CUmemLocation
  int type;
  int id;
};

struct AllocationFlags {  // CUmemAllocationProp.allocFlags
  unsigned char compression_type;
  unsigned char gpu_direct_rdma_capable;
  unsigned short usage;
  unsigned char reserved[4];
};

struct AllocationProperties {  // CUmemAllocationProp
  int type;
  int requested_handle_types;
  MemoryLocation location;
  void* win32_handle_meta_data;
  AllocationFlags flags;
};
static_assert(sizeof(AllocationProperties) == 32, "the driver expects 32 bytes");
static_assert(offsetof(AllocationProperties, flags) == 24, "allocFlags lies at byte 24");

struct AccessDescription {  // CUmemAccessDesc
  MemoryLocation location;
  int flags;
};
static_assert(sizeof(AccessDescription) == 12, "the driver expects 12 bytes");

struct Driver {
  Result (*init)(unsigned int flags);
  Result (*get_error_name)(Result, const char** name);
  Result (*get_error_string)(Result, const char** text);
  Result (*device_get_count)(int* count);
  Result (*device_get)(Device*, int ordinal);
  Result (*device_get_attribute)(int* value, int attribute, Device);
  Result (*primary_context_retain)(Context*, Device);
  Result (*primary_context_release)(Device);
  Result (*context_push)(Context);
  Result (*context_pop)(Context*);
  Result (*memory_info)(size_t* free, size_t* total);
  Result (*granularity)(size_t*, const AllocationProperties*, int option);
  Result (*address_reserve)(DevicePointer*, size_t size, size_t alignment, DevicePointer hint,
                            unsigned long long flags);
  Result (*address_free)(DevicePointer, size_t size);
  Result (*create)(MemoryHandle*, size_t size, const AllocationProperties*,
                   unsigned long long flags);
  Result (*release)(MemoryHandle);
  Result (*map)(DevicePointer, size_t size, size_t offset, MemoryHandle, unsigned long long flags);
  Result (*set_access)(DevicePointer, size_t size, const AccessDescription*, size_t count);
  Result (*unmap)(DevicePointer, size_t size);
  Result (*event_create)(Event*, unsigned int flags);
  Result (*event_record)(Event, Stream);
  Result (*event_query)(Event);
  Result (*event_destroy)(Event);

  // kOk, or what the driver answered to `what` in its own words.
  Status status(Result result, const std::string& what) const;
};

// Opens libcuda.so.1 and initialises it at the first call, from any thread; later calls give the
// same answer. kUnavailable, with the reason, where there is no driver or it is too old.
Status open_driver(const Driver** driver);

}  // namespace kvcached::cuda
