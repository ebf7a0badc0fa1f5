// DLPack's C structures (the interface's version 0.8, which every framework reads), declared here
// so that the build needs no framework's headers.
#pragma once

#include <cstdint>

namespace kvcached::dlpack {

struct Device {
  int32_t type;
  int32_t ordinal;
};

struct DataType {
  uint8_t code;  // 0: signed integer
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: dense, row-major
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* owner;
  void (*deleter)(ManagedTensor*);
};

}  // namespace kvcached::dlpack
