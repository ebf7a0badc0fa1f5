// Everything that may run side by side in a process does, for sanitizers to watch: two instances
// with their schedulers, mapping threads, readers and waiters, an operator, refusals of the
// backend, and a neighbour process that is killed again and again.
//
//   stress SECONDS [SEED]
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "account.hpp"
#include "arena.hpp"
#include "host_backend.hpp"
#include "mapper.hpp"
#include "probe.hpp"
#include "segment.hpp"
#include "support.hpp"

#if defined(__SANITIZE_THREAD__)
// GCC's runtime before 13 does not see this function take the mutex (std::timed_mutex with a steady
// clock), and takes every unlock for a mistake: here it is made of what it does see.
extern "C" int pthread_mutex_clocklock(pthread_mutex_t* mutex, clockid_t clock,
                                       const timespec* until) noexcept {
  for (;;) {
    if (pthread_mutex_trylock(mutex) == 0) return 0;
    timespec now{};
    clock_gettime(clock, &now);
    if (now.tv_sec > until->tv_sec ||
        (now.tv_sec == until->tv_sec && now.tv_nsec >= until->tv_nsec)) {
      return ETIMEDOUT;
    }
    usleep(50);
  }
}
#endif

namespace kvcached::test {
namespace {

constexpr int64_t kPages = 24;
constexpr size_t kChunk = 4096;
constexpr size_t kRegions = 2;
constexpr int64_t kPageBytes = kChunk * kRegions;
constexpr int64_t kCapacity = 60 * kPageBytes;
const char kDevice[] = "host:stress";

std::atomic<bool> stop{false};

std::shared_ptr<Segment> open_ledger(const std::string& folder, int64_t capacity = -1) {
  std::shared_ptr<Segment> segment;
  must(Segment::open({folder, kDevice, capacity, kPageBytes, true, false}, &segment), "open");
  return segment;
}

// A sanitizer slows all down: that a live process has the lock for long is an ordinary answer here.
template <typename Call>
void until_not_busy(const char* what, Call&& call) {
  Status status;
  do {
    status = call();
  } while (status.code() == Code::kBusy);
  must(status, what);
}

struct Instance {
  std::string name;
  std::shared_ptr<Segment> segment;
  std::shared_ptr<MemberHandle> member;
  std::unique_ptr<AccountHandle> account;
  std::shared_ptr<Probe> probe;
  std::shared_ptr<Arena> arena;
  std::shared_ptr<Mapper> mapper;

  Instance(const std::string& folder, const std::string& instance)
      : name(instance), segment(open_ledger(folder)) {
    std::unique_ptr<MemberHandle> attached;
    until_not_busy(
        "attach", [&] { return MemberHandle::attach(segment, name, name, kPageBytes, &attached); });
    member = std::move(attached);
    until_not_busy("join",
                   [&] { return AccountHandle::join(segment, name, name, kPageBytes, &account); });
    std::shared_ptr<Backend> backend;
    must(HostBackend::open("stress-" + name, segment->lock_fd(), &backend), "backend");
    probe = std::make_shared<Probe>(backend);
    ArenaOptions options;
    for (size_t i = 0; i < kRegions; ++i) options.regions.push_back({i * kPages * kChunk, kChunk});
    options.pages = kPages;
    options.size = options.pool_bytes = kRegions * kPages * kChunk;
    std::unique_ptr<Arena> opened;
    must(Arena::open(probe, options, &opened), "arena");
    arena = std::move(opened);
    must(Mapper::open(arena, member, &mapper), "mapper");
  }
};

void touch(const Instance& instance, int64_t page) {
  for (size_t i = 0; i < kRegions; ++i) {
    const size_t offset = i * kPages * kChunk + static_cast<size_t>(page) * kChunk;
    std::memset(reinterpret_cast<void*>(instance.arena->address() + offset), 7, kChunk);
  }
}

// One step of a scheduler: pages that it wants come, others go; refusals are tried again.
void step(Instance& instance, std::vector<bool>& wanted, Dice& dice) {
  Mapper::Pages needed, ahead, unmap;
  for (int64_t page = 0; page < kPages; ++page) {
    if (wanted[page]) {
      if (dice.chance(0.15)) unmap.push_back(page);
    } else if (dice.chance(0.15)) {
      (dice.chance(0.5) ? needed : ahead).push_back(page);
    }
  }
  const int64_t size = static_cast<int64_t>(needed.size() + ahead.size()) * kPageBytes;
  if (size > 0 && instance.account->lease(size) != Grant::kGranted) {
    instance.account->set_demand(size);
    needed.clear();
    ahead.clear();
  } else {
    instance.account->set_demand(0);
  }
  must(instance.mapper->submit(unmap, needed, ahead, 0), "submit");
  for (const int64_t page : unmap) wanted[page] = false;
  for (const int64_t page : needed) wanted[page] = true;
  for (const int64_t page : ahead) wanted[page] = true;
  bool mapped = false;
  for (int tries = 0; !needed.empty() && !mapped && tries < 50; ++tries) {
    Status status = instance.mapper->wait(needed, 5.0, &mapped);
    if (!status) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  if (mapped) {
    for (const int64_t page : needed) touch(instance, page);
  } else if (!needed.empty()) {
    must(instance.mapper->give_up(needed), "give up");
    must(instance.mapper->submit(needed, {}, {}, 0), "drop");
    for (const int64_t page : needed) wanted[page] = false;
  }
  instance.account->publish(size, dice.below(5) * kPageBytes, 0, dice.chance(0.5));
  instance.account->publish_cache(1, 2, 3, 4);
}

void schedule(Instance& instance, uint64_t seed) {
  Dice dice(seed);
  std::vector<bool> wanted(kPages, false);
  while (!stop) {
    step(instance, wanted, dice);
    if (instance.account->lease(kPageBytes) == Grant::kGranted) {
      if (!instance.account->give_back(kPageBytes)) fail("a lease was lost");
    }
    if (int64_t asked = instance.account->asked(); asked > 0) instance.account->answer(asked);
    for (int64_t page = 0; page < kPages; ++page) {
      int64_t missing = 0;
      if (wanted[page] && instance.mapper->missing({page}, &missing).is_ok() && missing > 0) {
        bool mapped = false;  // refused ahead: asked for again
        (void)instance.mapper->wait({page}, 0.0, &mapped);
      }
    }
    if (dice.chance(0.05)) {
      must(instance.mapper->clear(0), "clear");
      wanted.assign(kPages, false);
    }
  }
}

void read(Instance& instance, uint64_t seed) {
  Dice dice(seed);
  while (!stop) {
    AccountHandle& account = *instance.account;
    if (account.leasable() > account.ceiling() + kCapacity) fail("leasable");
    if (account.charge() < 0 || account.others_demand() < 0) fail("negative numbers");
    (void)account.pressed();
    (void)account.version();
    if (account.standings().accounts.empty()) fail("no standings");
    account.describe(1024, 16, kPageBytes);
    account.set_state(dice.chance(0.5));
    account.count_reclaimed(1);
    MapperCounters counters;
    must(instance.mapper->counters(&counters), "counters");
    int64_t bytes = 0;
    must(instance.mapper->quarantined_bytes(&bytes), "quarantined");
    if (dice.chance(0.1)) must(instance.mapper->check(), "mapper");
    must(instance.arena->check(), "arena");
    (void)instance.arena->mapped_pages();
    (void)instance.arena->last_failure();
    (void)instance.member->held();
    if (instance.probe->live_handles() < 0) fail("handles");
  }
}

void wait(Instance& instance, Bell bell) {
  uint32_t seen = instance.segment->sequence(bell);
  while (!stop) seen = instance.segment->wait(bell, seen, 0.005);
}

void refuse(Instance& instance, uint64_t seed) {
  Dice dice(seed);
  while (!stop) {
    std::this_thread::sleep_for(std::chrono::microseconds(dice.between(100, 3000)));
    const auto operation = static_cast<Operation>(dice.below(10));
    const Code code = dice.chance(0.5) ? Code::kOutOfMemory : Code::kDriver;
    instance.probe->inject({dice.between(1, 8), dice.between(1, 3), code, operation});
    instance.probe->hold_fences(dice.chance(0.3));
    instance.probe->pass_fences(static_cast<size_t>(dice.between(0, 20)));
  }
  instance.probe->inject_off();
  instance.probe->hold_fences(false);
  instance.probe->pass_fences(SIZE_MAX >> 1);
}

void operate(const std::string& folder, uint64_t seed) {
  Dice dice(seed);
  while (!stop) {
    std::shared_ptr<Segment> segment = open_ledger(folder);
    for (int i = 0; i < 20 && !stop; ++i) {
      SegmentView view;
      must(segment->snapshot(&view), "snapshot");
      if (view.high_water > 2 * kCapacity) fail("the mark stands at %ld", (long)view.high_water);
      uint32_t reaped = 0;
      (void)segment->reap(&reaped);  // busy is an answer
      const std::string key = dice.chance(0.5) ? "one" : "two";
      (void)segment->configure(key, Setting::kLimit, dice.between(10, 60) * kPageBytes);
      (void)segment->configure(key, Setting::kGuarantee, dice.below(8) * kPageBytes);
      (void)segment->set_weight(key, 1.0 + static_cast<double>(dice.below(4)));
      (void)segment->ask_back(key, dice.below(4) * kPageBytes);
      (void)segment->set_capacity(kCapacity - dice.below(8) * kPageBytes, -1);
      (void)segment->set_foreign(dice.below(4) * kPageBytes);
      (void)segment->foreign_age_ms();
      (void)segment->created();
    }
    if (dice.chance(0.5)) segment->close();
  }
}

// In the other process: leases and pins until it is killed, whatever it is doing then.
[[noreturn]] void neighbour(const std::string& folder, uint64_t seed) {
  Dice dice(seed);
  std::shared_ptr<Segment> segment = open_ledger(folder);
  std::unique_ptr<MemberHandle> member;
  std::unique_ptr<AccountHandle> account;
  const std::string name = "neighbour";
  until_not_busy("attach",
                 [&] { return MemberHandle::attach(segment, name, name, kPageBytes, &member); });
  until_not_busy("join",
                 [&] { return AccountHandle::join(segment, name, name, kPageBytes, &account); });
  for (;;) {
    const int64_t size = dice.between(1, 10) * kPageBytes;
    if (member->pin(size) == Grant::kGranted && dice.chance(0.7)) member->released(size);
    if (account->lease(size) == Grant::kGranted && !account->give_back(size)) fail("lost a lease");
    (void)member->set_aside(dice.below(3) * kPageBytes);
  }
}

void kill_neighbours(const char* self, const std::string& folder, uint64_t seed) {
  Dice dice(seed);
  while (!stop) {
    const std::string number = std::to_string(dice.next() >> 1);
    const pid_t child = fork();
    if (child == 0) {
      execl(self, self, "neighbour", folder.c_str(), number.c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(dice.between(50, 400)));
    int status = 0;
    if (waitpid(child, &status, WNOHANG) != 0) fail("the neighbour ended: %d", status);
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
  }
}

int stress(const char* self, double seconds, uint64_t seed) {
  const std::string folder = make_folder("stress");
  std::shared_ptr<Segment> segment = open_ledger(folder, kCapacity);
  {
    Instance one(folder, "one"), two(folder, "two");
    std::vector<std::thread> threads;
    for (Instance* each : {&one, &two}) {
      threads.emplace_back(schedule, std::ref(*each), ++seed);
      threads.emplace_back(read, std::ref(*each), ++seed);
      threads.emplace_back(read, std::ref(*each), ++seed);
      threads.emplace_back(wait, std::ref(*each), Bell::kFreed);
      threads.emplace_back(wait, std::ref(*each), Bell::kPressure);
      threads.emplace_back(refuse, std::ref(*each), ++seed);
    }
    threads.emplace_back(operate, folder, ++seed);
    threads.emplace_back(kill_neighbours, self, folder, ++seed);
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    stop = true;
    for (std::thread& each : threads) each.join();
    for (Instance* each : {&one, &two}) {
      must(each->mapper->clear(0), "clear");
      bool done = false;
      must(each->mapper->drain(10.0, &done), "drain");
      must(each->mapper->clear(0), "clear");  // with a fence for those that could have none
      must(each->mapper->drain(10.0, &done), "drain");
      must(each->mapper->check(), "the mapper at the end");
      each->mapper->close();  // tries once more to give back what was refused
      if (!done || each->member->held() != 0 || each->probe->created_bytes() != 0) {
        fail("%ld bytes are left of %s, of which %ld exist and %ld are in quarantine (%s); %s",
             (long)each->member->held(), each->name.c_str(), (long)each->probe->created_bytes(),
             (long)each->arena->quarantined_bytes(), each->arena->last_failure().c_str(),
             done ? "idle" : "not idle");
      }
      // Closing races with those that still ask.
      std::thread reader([each] {
        for (int i = 0; i < 1000; ++i) {
          (void)each->account->leasable();
          (void)each->member->held();
        }
      });
      each->account->close();
      each->segment->close();
      reader.join();
    }
  }
  uint32_t reaped = 0;
  must(segment->reap(&reaped), "reap");
  SegmentView view;
  must(segment->snapshot(&view), "snapshot");
  if (!view.accounts.empty()) fail("accounts of the dead are left");
  std::printf("stress: %ld reaps, %ld locks stolen, %ld timeouts, mark %ld of %ld bytes\n",
              (long)view.reaps, (long)view.locks_stolen, (long)view.lock_timeouts,
              (long)view.high_water, (long)kCapacity);
  segment->close();
  must(remove_ledger_file(folder, kDevice), "remove");
  rmdir(folder.c_str());
  return 0;
}

}  // namespace
}  // namespace kvcached::test

int main(int count, char** arguments) {
  using namespace kvcached::test;
  if (count == 4 && std::strcmp(arguments[1], "neighbour") == 0) {
    neighbour(arguments[2], std::strtoull(arguments[3], nullptr, 10));
  }
  const double seconds = count > 1 ? std::atof(arguments[1]) : 5.0;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  return stress("/proc/self/exe", seconds, seed);
}
