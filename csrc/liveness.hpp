// Who lives: open-file-description locks on single bytes of the ledger file.
//
// The kernel drops such a lock when the last reference to the open file goes: when the process
// dies, however it dies, across PID namespaces. So the file is opened a second time for this
// purpose alone: a mapping would keep the description, and with it the locks, alive.
#pragma once

#include <atomic>
#include <bitset>
#include <cstdint>
#include <mutex>

#include "segment_layout.hpp"
#include "status.hpp"

namespace kvcached {

class Liveness {
 public:
  Liveness() = default;
  ~Liveness() { close(); }
  Liveness(const Liveness&) = delete;
  Liveness& operator=(const Liveness&) = delete;

  // Opens `name` in the folder `dir_fd`. Returns 0 or the errno.
  int open(int dir_fd, const char* name, bool writable);
  // Gives the descriptor the lowest free number. A dying process closes the highest first.
  void renumber();
  // Drops every lock with the descriptor. Does nothing in a forked child.
  void close();

  int fd() const { return fd_; }
  // Whether the file has lost its name since it was opened.
  bool unlinked() const;
  // True in a child of the process that opened this: a fork handler has closed the child's copy of
  // the descriptor (closing drops nothing while the parent holds its own; unlocking would).
  bool inherited() const { return inherited_.load(std::memory_order_relaxed); }

  // Takes the lock of a byte: true proves that whoever held it is dead or has let go, and keeps
  // anyone else from becoming its holder. False for a byte that is held, also by this object.
  bool take(uint64_t byte);
  void drop(uint64_t byte);
  // True while this object holds the byte.
  bool holds(uint64_t byte) const;
  // True while anyone holds the byte. Needs no write permission.
  bool alive(uint64_t byte) const;

 private:
  friend struct LivenessRegistry;

  int fd_ = -1;
  std::atomic<bool> inherited_{false};
  mutable std::mutex mutex_;
  std::bitset<layout::kBytes> held_;
};

}  // namespace kvcached
