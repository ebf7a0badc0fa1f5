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
constexpr int kNone = -1;    // no descriptor: poll passes over it
constexpr int kFirst = -20;  // nice: ahead of every thread with an ordinary one

int pidfd_open(int pid, int flags) {
  return static_cast<int>(syscall(SYS_pidfd_open, pid, flags));
}

// A pidfd of the process's own watching thread; kNone if it has none (yet).
int open_life(int pid) {
  const std::string folder = "/proc/" + std::to_string(pid) + "/task/";
  DIR* tasks = opendir(folder.c_str());
  if (tasks == nullptr) return kNone;
  int found = kNone;
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

// Puts all threads of a dying process ahead of others, where the system lets it (CAP_SYS_NICE):
// each of them still has to run once to end, the last one takes down the memory, and on busy cores
// they would wait their turns for that.
void go_first(int pid) {
  DIR* tasks = opendir(("/proc/" + std::to_string(pid) + "/task").c_str());
  if (tasks == nullptr) return;
  while (const dirent* task = readdir(tasks)) {
    const int thread = std::atoi(task->d_name);
    if (thread > 0) setpriority(PRIO_PROCESS, static_cast<id_t>(thread), kFirst);
  }
  closedir(tasks);
}

// Where sessions share the cores first (sched_autogroup), nice counts within a session only. Puts
// this process's session ahead of others, where the system lets it.
void session_goes_first() {
  FILE* file = std::fopen("/proc/self/autogroup", "we");
  if (file == nullptr) return;
  std::fprintf(file, "%d\n", kFirst);
  std::fclose(file);
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
    watched_.push_back({kNone, POLLIN, 0});
    return true;
  }

  bool empty() const { return pids_.empty(); }

  // Returns when one of the processes dies.
  void wait() {
    int look_ms = kFirstLookMs;
    while (true) {
      // A process that is no engine's never gets such a thread: look ever less often, then stop.
      if (find_lives() || look_ms > kLastLookMs) look_ms = -1;
      if (poll(watched_.data(), watched_.size(), look_ms) > 0) return;
      if (look_ms > 0) look_ms *= 2;
    }
  }

  // Has those that are dying go down first: one that was killed could not do that for itself.
  void put_dying_first() {
    for (size_t i = 0; i < pids_.size(); ++i) {
      const bool dying = life(i).fd != kNone && life(i).revents != 0;
      const bool there = poll(&watched_[2 * i], 1, 0) == 0;  // so its number is nobody else's yet
      if (dying && there) go_first(pids_[i]);
    }
    // Never the session of somebody who started us by hand and lives on.
    const int leader = getsid(0);
    if (leader == getpid() || std::find(pids_.begin(), pids_.end(), leader) != pids_.end()) {
      session_goes_first();
    }
  }

 private:
  // The kernel says that a process has ended when it has taken down its memory: 50 ms a gigabyte
  // where a core is free, a second where none is. A thread that sleeps is gone before that, and
  // every process that watches has one. Returns whether all of them are known.
  bool find_lives() {
    bool all = true;
    for (size_t i = 0; i < pids_.size(); ++i) {
      if (life(i).fd == kNone) life(i).fd = open_life(pids_[i]);
      all = all && life(i).fd != kNone;
    }
    return all;
  }

  pollfd& life(size_t i) { return watched_[2 * i + 1]; }

  std::vector<int> pids_;
  std::vector<pollfd> watched_;  // of each its pidfd, and that of its watching thread
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
    watch.put_dying_first();
    std::this_thread::sleep_for(std::chrono::duration<double>(grace_s));
    go_first(getpid());
    kill(getpid(), SIGKILL);
  }).detach();
}

}  // namespace kvcached
