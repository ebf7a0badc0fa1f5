#include "sim_process.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstring>
#include <thread>

#include "charges.hpp"
#include "cuda_backend.hpp"
#include "host_backend.hpp"

namespace {
thread_local int64_t clock_offset_ns = 0;
}

// In the place of the C library's: std::chrono asks this one.
extern "C" int clock_gettime(clockid_t clock, timespec* time) noexcept {
  const long result = syscall(SYS_clock_gettime, clock, time);
  if (result != 0 || clock != CLOCK_MONOTONIC || clock_offset_ns == 0) {
    return static_cast<int>(result);
  }
  constexpr int64_t kSecond = 1000000000;
  const int64_t now = time->tv_sec * kSecond + time->tv_nsec + clock_offset_ns;
  time->tv_sec = now / kSecond;
  time->tv_nsec = now % kSecond;
  return 0;
}

namespace kvcached::test {
namespace {

void read_all(int fd, void* bytes, size_t size) {
  for (size_t got = 0; got < size;) {
    const ssize_t more = ::read(fd, static_cast<char*>(bytes) + got, size - got);
    if (more < 0 && errno == EINTR) continue;
    if (more <= 0) _exit(0);  // the world has ended
    got += static_cast<size_t>(more);
  }
}

const layout::Shared* map_to_look(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  void* mapped = mmap(nullptr, sizeof(layout::Shared), PROT_READ, MAP_SHARED, fd, 0);
  ::close(fd);
  if (mapped == MAP_FAILED) fail("cannot map %s", path.c_str());
  return static_cast<const layout::Shared*>(mapped);
}

// The descriptor of this process's host memory; -1 before there is any.
int find_memory_fd() {
  int found = -1;
  DIR* folder = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(folder)) {
    char target[PATH_MAX];
    const std::string link = std::string("/proc/self/fd/") + entry->d_name;
    const ssize_t size = readlink(link.c_str(), target, sizeof target);
    if (size > 0 && std::strncmp(target, "/memfd:kvcached:", 16) == 0) found = atoi(entry->d_name);
  }
  closedir(folder);
  return found;
}

}  // namespace

void set_clock(int64_t offset_ns) {
  clock_offset_ns = offset_ns;
}

void Process::serve(int orders, int reports) {
  if (!join_ledger()) closed_ = true;
  Report report;
  report_on(report);
  if (::write(reports, &report, sizeof report) != sizeof report) _exit(0);
  for (;;) {
    Turn turn;
    read_all(orders, &turn, sizeof turn);
    report = Report();
    carry_out(turn, report);
    report_on(report);
    if (::write(reports, &report, sizeof report) != sizeof report) _exit(0);
  }
}

void Process::report_on(Report& report) {
  report.closed = closed_;
  report.started = started_;
  report.owner = account_ != nullptr;
  report.memory_fd = memory_fd_;
  report.granted = granted_;
  report.refused = refused_;
  report.forks = forks_;
  report.broken = broken_;
  if (closed_) return;
  report.held = member_->held();
  report.leased_only = static_cast<int64_t>(to_map_.size()) * spec_.page_bytes();
  if (backend_ == nullptr) return;
  report.created = static_cast<int64_t>(backend_->created_bytes());
  report.calls = backend_->calls();
  report.refusals = backend_->refusals();
  if (arena_ == nullptr) return;
  report.quarantined = static_cast<int64_t>(arena_->quarantined_bytes());
  for (const int64_t page : arena_->mapped_pages()) {
    report.digest = report.digest * 31 + static_cast<uint64_t>(page) + 1;
  }
  report.digest = report.digest * 31 + static_cast<uint64_t>(blocks_->used_blocks());
  report.digest = report.digest * 31 + static_cast<uint64_t>(blocks_->cached_blocks());
}

// False where the ledger has no place for it.
bool Process::join_ledger() {
  must(Segment::open({spec_.folder, spec_.device, -1, 0, false, false}, &segment_), "open");
  file_ = map_to_look(segment_->path());
  std::unique_ptr<MemberHandle> attached;
  const std::string& name = spec_.instance;
  Status status = MemberHandle::attach(segment_, name, name, spec_.page_bytes(), &attached);
  if (!status && status.code() != Code::kLedger) must(status, "attach");
  if (!status) {
    segment_->close();
    return false;
  }
  member_ = std::move(attached);
  return true;
}

// The pinned page, as soon as the ledger has it; then all the rest. False: not yet.
bool Process::start() {
  if (member_->pin(spec_.page_bytes()) != Grant::kGranted) return false;
  std::shared_ptr<Backend> inner;
  const bool cuda = spec_.backend == "cuda";
  must(cuda ? CudaBackend::open(0, &inner)
            : HostBackend::open("sim-" + spec_.instance, segment_->lock_fd(), &inner),
       "backend");
  memory_ = cuda ? cuda_memory() : host_memory();
  backend_ = std::make_shared<SimBackend>(inner);
  backend_->set_plan(plan_);
  ArenaOptions options;
  const size_t region = spec_.chunk * static_cast<size_t>(spec_.pages);
  for (size_t i = 0; i < spec_.regions; ++i) options.regions.push_back({i * region, spec_.chunk});
  options.pages = spec_.pages;
  options.size = options.pool_bytes = region * spec_.regions;
  std::unique_ptr<Arena> arena;
  must(Arena::open(backend_, options, &arena), "arena");
  arena_ = std::move(arena);
  must(Mapper::open(arena_, member_, &mapper_), "mapper");
  blocks_ = std::make_unique<Blocks>(static_cast<int32_t>(spec_.pages) * spec_.blocks_per_page,
                                     spec_.blocks_per_page, true);
  contents_.assign(static_cast<size_t>(blocks_->num_blocks()), 0);
  must(mapper_->need({0}), "need");
  bool mapped = false;
  must(mapper_->wait({0}, 30.0, &mapped), "the pinned page");
  if (!mapped) fail("the pinned page is not mapped");
  wanted_.insert(0);
  settle();
  memory_fd_ = cuda ? -1 : find_memory_fd();
  if (memory_fd_ >= 0 && memory_fd_ < segment_->lock_fd()) fail("memory is numbered too low");
  write_block(0);
  started_ = true;
  if (!spec_.owner) return true;
  Status status =
      AccountHandle::join(segment_, spec_.instance, spec_.instance, spec_.page_bytes(), &account_);
  if (!status && status.code() != Code::kLedger) must(status, "join");
  return true;  // without the account, which has a living owner, it is one more member
}

void Process::close() {
  closed_ = true;
  if (started_) {
    backend_->set_plan({});
    backend_->finish_work(SIZE_MAX);
    settle();
    must(mapper_->clear(0), "clear");
    settle();
    must(mapper_->clear(0), "clear");  // with a fence for those that could have none
    settle();
    mapper_->close();
    if (member_->held() != 0 || backend_->created_bytes() != 0) {
      fail("%ld bytes are left, %ld booked", (long)backend_->created_bytes(),
           (long)member_->held());
    }
    if (memory_fd_ >= 0) check_kernel();
    mapper_.reset();
    arena_.reset();
  }
  if (account_ != nullptr) account_->close();
  account_.reset();
  member_->close();
  segment_->close();
}

void Process::carry_out(const Turn& turn, Report& report) {
  if (closed_) return;
  Dice dice(turn.seed);
  clock_ns_ = turn.clock_ns;
  if (turn.order == Order::kDieWithLock) die_with_lock();
  if (turn.order == Order::kClose) return close();
  for (; report.steps < turn.steps && !broken_;) {
    ++report.steps;
    ++steps_;
    const bool dies = report.steps == turn.die_step;
    plan_ = Plan();
    if (dies) plan_ = {turn.die_call, turn.die_after != 0, 0, 0, Code::kOk};
    const int64_t before = total_charge();
    const int64_t could = lent();
    if (!started_) {
      if (!start()) ++refused_;
    } else if (turn.order == Order::kStorm) {
      storm();
    } else if (turn.order == Order::kRelieve) {
      relieve();
    } else {
      step(dice);
    }
    if (dies) kill(getpid(), SIGKILL);
    check(before, could);
  }
  if (broken_) close();
}

void Process::die_with_lock() {
  std::thread holder([this] { segment_->hold_lock(3600); });
  while ((file_->header.lock.word.load() & 0x7fffffffu) == 0) usleep(10);
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

int64_t Process::total_charge() const {
  return charges::others(*file_, layout::kMaxAccounts).charge;
}

int64_t Process::lent() const {
  return charges::lent(*file_);
}

}  // namespace kvcached::test
