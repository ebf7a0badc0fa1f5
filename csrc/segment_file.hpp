// Finding, creating and checking the ledger's file.
#pragma once

#include <cstdint>
#include <string>

#include "liveness.hpp"
#include "segment_layout.hpp"
#include "status.hpp"

namespace kvcached {

struct OpenRequest {
  std::string directory;
  std::string device;
  int64_t capacity_bytes = -1;  // -1: whatever the file says; then it must exist
  int64_t headroom_bytes = 0;   // used only to create the file
  bool create = true;
  bool read_only = false;
};

// The file's name for a device: `host:demo` gives `ledger-host-demo`. A device that does not
// survive the spelling gets a hash, so that two devices never share a name.
std::string ledger_file_name(const std::string& device);

// The mapped file. Forked children do not get it; it goes away with this object.
class FileMapping {
 public:
  FileMapping() = default;
  ~FileMapping();
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;

  int map(int fd, bool writable);  // 0 or the errno
  // In a forked child there is nothing behind the address: never touch it, and never unmap it.
  void abandon() { shared_ = nullptr; }
  layout::Shared* shared() const { return shared_; }

 private:
  layout::Shared* shared_ = nullptr;
};

// Opens the ledger of `request.device`, creating it if asked, checks all of it and maps it.
// `liveness` gets a descriptor of its own, opened first: memory that is charged here should come
// from descriptors that are numbered above it, so that at death its locks drop after that memory.
Status open_ledger_file(const OpenRequest& request, Liveness& liveness, FileMapping& mapping);

// Removes a device's ledger, of any version, that no process has open for writing; readers keep
// what they have mapped. kInvalidArgument where somebody lives, kLedger for a file that is no
// ledger.
Status remove_ledger_file(const std::string& folder, const std::string& device);

// Checks that the open file still has its full size: touching pages cut off would be a SIGBUS.
// Every operation but the hot ones (a granted lease, created, released, publish) asks first. What
// remains: the file's owner cuts it while another of his processes is in a hot operation, or right
// after the question. The file and its folder are closed to everybody else.
Status check_not_cut(int fd, const std::string& path);

}  // namespace kvcached
