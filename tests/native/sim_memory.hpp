// The bytes of a device as a program sees them: patterns are written into blocks and looked at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace kvcached::test {

class Memory {
 public:
  virtual ~Memory() = default;
  virtual void write(uintptr_t address, const uint64_t* words, size_t count) = 0;
  virtual void read(uintptr_t address, uint64_t* words, size_t count) const = 0;
  // How many words of a block carry its pattern at each end; a GPU's are far away.
  virtual size_t words_at_an_end(size_t block_bytes) const = 0;
};

std::unique_ptr<Memory> host_memory();
// Through the driver, in this thread's device context. Ends the process where there is none.
std::unique_ptr<Memory> cuda_memory();

}  // namespace kvcached::test
