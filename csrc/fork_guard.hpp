// File descriptors that a forked child closes before anything else runs in it.
#pragma once

#include <sys/types.h>

namespace kvcached {

// Owns a descriptor. In a child made by fork() it is closed at once, so that the child cannot keep
// the open file (and with it a memfd's memory) alive; its copy of this object is then inert.
class ForkClosedFd {
 public:
  ForkClosedFd() = default;
  ~ForkClosedFd() { reset(); }
  ForkClosedFd(const ForkClosedFd&) = delete;
  ForkClosedFd& operator=(const ForkClosedFd&) = delete;

  void adopt(int fd);
  void reset();
  int get() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }

 private:
  friend struct ForkClosedFdList;

  int fd_ = -1;
  pid_t owner_ = 0;
  ForkClosedFd* previous_ = nullptr;
  ForkClosedFd* next_ = nullptr;
};

}  // namespace kvcached
