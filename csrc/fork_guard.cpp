#include "fork_guard.hpp"

#include <pthread.h>
#include <unistd.h>

#include <mutex>

namespace kvcached {

// The process-wide list of open descriptors: fork handlers take no argument, so it must be global.
// It is intrusive because a forked child may not allocate.
struct ForkClosedFdList {
  std::mutex mutex;
  ForkClosedFd* head = nullptr;

  ForkClosedFdList() { ::pthread_atfork(&before_fork, &in_parent, &in_child); }

  static ForkClosedFdList& instance() {
    // Never destroyed: objects of other translation units may outlive any order of destruction.
    static ForkClosedFdList* list = new ForkClosedFdList();
    return *list;
  }

  void add(ForkClosedFd* entry) {
    std::lock_guard<std::mutex> lock(mutex);
    entry->next_ = head;
    entry->previous_ = nullptr;
    if (head != nullptr) head->previous_ = entry;
    head = entry;
  }

  void remove(ForkClosedFd* entry) {
    std::lock_guard<std::mutex> lock(mutex);
    if (entry->previous_ != nullptr) entry->previous_->next_ = entry->next_;
    if (entry->next_ != nullptr) entry->next_->previous_ = entry->previous_;
    if (head == entry) head = entry->next_;
  }

  static void before_fork() { instance().mutex.lock(); }
  static void in_parent() { instance().mutex.unlock(); }

  static void in_child() {
    ForkClosedFdList& list = instance();
    for (ForkClosedFd* entry = list.head; entry != nullptr; entry = entry->next_) {
      ::close(entry->fd_);
      entry->fd_ = -1;
    }
    list.head = nullptr;
    list.mutex.unlock();
  }
};

void ForkClosedFd::adopt(int fd) {
  reset();
  fd_ = fd;
  owner_ = ::getpid();
  ForkClosedFdList::instance().add(this);
}

void ForkClosedFd::reset() {
  if (fd_ < 0 || owner_ != ::getpid()) return;
  ForkClosedFdList::instance().remove(this);
  ::close(fd_);
  fd_ = -1;
}

}  // namespace kvcached
