#include "watch.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

namespace kvcached {
namespace {

#ifndef SYS_pidfd_open
constexpr long SYS_pidfd_open = 434;  // the same on every architecture
#endif
constexpr int kOfThread = O_EXCL;          // PIDFD_THREAD, Linux 6.9
constexpr char kName[] = "kvcached-life";  // of the watching thread; 15 characters at most
constexpr int kFirstLookMs = 250;
constexpr int kLastLookMs = 64 * 1000;
constexpr int kFirst = -20;  // nice: ahead of every thread with an ordinary one

int pidfd_open(int pid, int flags) {
  return static_cast<int>(syscall(SYS_pidfd_open, pid, flags));
}

// A pidfd of the process's own watching thread; -1 if it has none (yet).
int open_life(int pid) {
  const std::string folder = "/proc/" + std::to_string(pid) + "/task/";
  DIR* tasks = opendir(folder.c_str());
  if (tasks == nullptr) return -1;
  int found = -1;
  while (const dirent* task = found < 0 ? readdir(tasks) : nullptr) {
    FILE* file = std::fopen((folder + task->d_name + "/comm").c_str(), "re");
    if (file == nullptr) continue;
    char name[sizeof kName + 1] = {};
    if (std::fgets(name, sizeof name, file) != nullptr &&
        std::strncmp(name, kName, sizeof kName - 1) == 0) {
      found = pidfd_open(std::atoi(task->d_name), kOfThread);
    }
    std::fclose(file);
  }
  closedir(tasks);
  return found;
}

// Puts all threads of this process ahead of others, where the system lets it (CAP_SYS_NICE): each
// of them still has to run once to end, the last one takes down the memory, and on busy cores they
// would wait their turns for that.
void go_first() {
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return;
  while (const dirent* task = readdir(tasks)) {
    const int thread = std::atoi(task->d_name);
    if (thread > 0) setpriority(PRIO_PROCESS, static_cast<id_t>(thread), kFirst);
  }
  closedir(tasks);
}

// The processes that one thread watches. Its descriptors stay open for the life of this process.
class Watch {
 public:
  // Returns false if the process has ended.
  bool add(int pid) {
    const int descriptor = pidfd_open(pid, 0);
    if (descriptor < 0) return errno != ESRCH;
    pids_.push_back(pid);
    watched_.push_back({descriptor, POLLIN, 0});
    return true;
  }

  bool empty() const { return watched_.empty(); }

  // Returns when one of the processes dies.
  void wait() {
    int look_ms = kFirstLookMs;
    while (true) {
      if (!pids_.empty()) find_lives();
      // A process that is no engine's never gets such a thread: look ever less often, then stop.
      if (pids_.empty() || look_ms > kLastLookMs) look_ms = -1;
      if (poll(watched_.data(), watched_.size(), look_ms) > 0) return;
      if (look_ms > 0) look_ms *= 2;
    }
  }

 private:
  // The kernel says that a process has ended when it has taken down its memory: 50 ms a gigabyte
  // where a core is free, a second where none is. A thread that sleeps is gone before that, and
  // every process that watches has one.
  void find_lives() {
    const auto found = [this](int pid) {
      const int life = open_life(pid);
      if (life >= 0) watched_.push_back({life, POLLIN, 0});
      return life >= 0;
    };
    pids_.erase(std::remove_if(pids_.begin(), pids_.end(), found), pids_.end());
  }

  std::vector<int> pids_;  // whose watching threads are not found yet
  std::vector<pollfd> watched_;
};

}  // namespace

void end_with(const std::vector<int>& pids, double grace_s) {
  Watch watch;
  bool ended = false;
  for (int pid : pids) ended |= !watch.add(pid);
  if (!ended && watch.empty()) return;
  std::thread([watch, ended, grace_s]() mutable {
    pthread_setname_np(pthread_self(), kName);
    setpriority(PRIO_PROCESS, 0, kFirst);  // of this thread, which sleeps until the end
    if (!ended) watch.wait();
    std::this_thread::sleep_for(std::chrono::duration<double>(grace_s));
    go_first();
    kill(getpid(), SIGKILL);
  }).detach();
}

}  // namespace kvcached
