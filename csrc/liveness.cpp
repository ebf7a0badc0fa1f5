#include "liveness.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

namespace kvcached {

// All open objects of this process, for the fork handlers. Its mutex is held across a fork, so no
// descriptor can be opened or closed between the child's birth and its handler.
struct LivenessRegistry {
  std::mutex mutex;
  std::vector<Liveness*> open;

  static LivenessRegistry& get() {
    // Never destroyed: handles may die after the static objects of this library.
    static LivenessRegistry* registry = [] {
      auto* made = new LivenessRegistry;
      pthread_atfork(before_fork, after_fork_parent, after_fork_child);
      return made;
    }();
    return *registry;
  }

  static void before_fork() { get().mutex.lock(); }
  static void after_fork_parent() { get().mutex.unlock(); }
  static void after_fork_child() {
    LivenessRegistry& registry = get();
    for (Liveness* each : registry.open) {
      each->inherited_.store(true, std::memory_order_relaxed);
      ::close(each->fd_);
      each->fd_ = -1;
    }
    registry.open.clear();
    registry.mutex.unlock();
  }
};

namespace {

int lock_byte(int fd, int command, short type, uint64_t byte, short* found = nullptr) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(layout::kFirstByte + byte);
  lock.l_len = 1;
  int result = fcntl(fd, command, &lock);
  if (found != nullptr) *found = lock.l_type;
  return result;
}

}  // namespace

int Liveness::open(int dir_fd, const char* name, bool writable) {
  LivenessRegistry& registry = LivenessRegistry::get();
  std::lock_guard<std::mutex> guard(registry.mutex);
  int flags = (writable ? O_RDWR : O_RDONLY) | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  int fd = openat(dir_fd, name, flags);
  if (fd < 0) return errno;
  fd_ = fd;
  registry.open.push_back(this);
  return 0;
}

void Liveness::renumber() {
  std::lock_guard<std::mutex> guard(LivenessRegistry::get().mutex);
  int copy = fcntl(fd_, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return;
  // Both numbers stand for one description, which keeps its locks.
  ::close(std::max(copy, fd_));
  fd_ = std::min(copy, fd_);
}

void Liveness::close() {
  if (inherited()) return;
  LivenessRegistry& registry = LivenessRegistry::get();
  std::lock_guard<std::mutex> guard(registry.mutex);
  if (fd_ < 0) return;
  registry.open.erase(std::remove(registry.open.begin(), registry.open.end(), this),
                      registry.open.end());
  ::close(fd_);
  fd_ = -1;
  std::lock_guard<std::mutex> held(mutex_);
  held_.reset();
}

bool Liveness::unlinked() const {
  struct stat info{};
  return fstat(fd_, &info) == 0 && info.st_nlink == 0;
}

bool Liveness::take(uint64_t byte) {
  if (inherited()) return false;
  std::lock_guard<std::mutex> guard(mutex_);
  // The kernel would grant a second lock to the same description, and the drop would lose both.
  if (held_.test(byte)) return false;
  if (lock_byte(fd_, F_OFD_SETLK, F_WRLCK, byte) != 0) return false;
  held_.set(byte);
  return true;
}

void Liveness::drop(uint64_t byte) {
  if (inherited()) return;
  std::lock_guard<std::mutex> guard(mutex_);
  if (!held_.test(byte)) return;
  held_.reset(byte);
  lock_byte(fd_, F_OFD_SETLK, F_UNLCK, byte);
}

bool Liveness::holds(uint64_t byte) const {
  if (inherited()) return false;
  std::lock_guard<std::mutex> guard(mutex_);
  return held_.test(byte);
}

bool Liveness::alive(uint64_t byte) const {
  if (inherited()) return false;
  std::lock_guard<std::mutex> guard(mutex_);
  if (held_.test(byte)) return true;
  short found = F_UNLCK;
  if (lock_byte(fd_, F_OFD_GETLK, F_WRLCK, byte, &found) != 0) return true;  // unknown: not dead
  return found != F_UNLCK;
}

}  // namespace kvcached
