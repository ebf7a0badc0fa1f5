#include "sim_world.hpp"

#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "charges.hpp"

namespace kvcached::test {
namespace {

constexpr size_t kProcesses = 8;
constexpr int64_t kInstances = 6;
constexpr int kAnswerMs = 120 * 1000;

void may_be_refused(const Status& status, const char* what) {
  if (status.code() != Code::kInvalidArgument) must(status, what);
}

}  // namespace

// The dice of two seeds must not be one sequence at two places: so they start at a mixed one.
World::World(uint64_t seed, Options options)
    : seed_(seed), options_(std::move(options)), dice_(Dice(seed).next()) {
  folder_ = make_folder("sim");
  if (options_.backend == "cuda") unit_ = 2 << 20;
  const int64_t capacity = dice_.between(40, 160) * unit_;
  const int64_t headroom = dice_.below(8) * unit_;
  must(Segment::open({folder_, device_, capacity, headroom, true, false}, &segment_), "open");
  settle_capacity();
}

void World::settle_capacity() {
  most_lendable_ = std::max(most_lendable_, segment_->capacity() - segment_->headroom());
}

void World::run(Totals& totals) {
  while (totals_.steps < options_.steps) {
    act();
    check();
  }
  end();
  totals.steps += totals_.steps;
  totals.turns += totals_.turns;
  totals.started += totals_.started;
  totals.left += totals_.left;
  totals.turned_away += totals_.turned_away;
  totals.failed_steps += totals_.failed_steps;
  totals.killed_between += totals_.killed_between;
  totals.killed_within += totals_.killed_within;
  totals.killed_with_lock += totals_.killed_with_lock;
  totals.calls += totals_.calls;
  totals.refusals += totals_.refusals;
  totals.granted += totals_.granted;
  totals.refused += totals_.refused;
  totals.forks += totals_.forks;
  totals.settings += totals_.settings;
  totals.storms += totals_.storms;
  totals.reaps += totals_.reaps;
  totals.steals += totals_.steals;
  totals.timeouts += totals_.timeouts;
  totals.digest = totals.digest * 31 + digest_;
}

void World::act() {
  const int64_t what = dice_.below(1000);
  const auto any = [&] {
    return static_cast<size_t>(dice_.below(static_cast<int64_t>(living_.size())));
  };
  if (living_.size() < 2 || (what < 40 && living_.size() < kProcesses)) return start_one();
  if (what < 50) return kill_one(any());
  if (what < 58) return turn(any(), {Order::kClose, 0, 0, 0, 0, 0, 0});
  if (what < 61) return turn(any(), {Order::kDieWithLock, 0, 0, 0, 0, 0, 0});
  if (what < 120) return operate();
  if (what < 130) return storm();
  if (what < 140) {
    living_[any()].frozen_until = totals_.turns + dice_.between(5, 100);
    return;
  }
  turn_at_random();
}

void World::start_one() {
  Living born;
  born.spec.folder = folder_;
  born.spec.device = device_;
  born.spec.backend = options_.backend;
  born.spec.instance = "instance-" + std::to_string(dice_.below(kInstances));
  born.spec.owner = dice_.chance(0.75);
  born.spec.pages = dice_.between(4, 24);
  born.spec.blocks_per_page = static_cast<int32_t>(dice_.between(1, 6));
  born.spec.regions = dice_.chance(0.6) ? 1 : 3;
  born.spec.chunk = static_cast<size_t>(unit_);
  born.spec.tag = next_tag_++;
  int orders[2], reports[2];
  if (pipe(orders) != 0 || pipe(reports) != 0) fail("no pipe");
  born.pid = fork();
  if (born.pid < 0) fail("no process");
  if (born.pid == 0) {
    for (const Living& other : living_) {
      close(other.orders);
      close(other.reports);
    }
    close(orders[1]);
    close(reports[0]);
    Process(born.spec).serve(orders[0], reports[1]);
  }
  close(orders[0]);
  close(reports[1]);
  born.orders = orders[1];
  born.reports = reports[0];
  ++totals_.started;
  living_.push_back(born);
  receive(living_.back(), false);
  if (living_.back().last.closed) {
    ++totals_.turned_away;
    kill(born.pid, SIGKILL);
    bury(living_.size() - 1);
  }
}

void World::turn_at_random() {
  const auto which = static_cast<size_t>(dice_.below(static_cast<int64_t>(living_.size())));
  Living& living = living_[which];
  if (living.frozen_until > totals_.turns) return;
  if (dice_.chance(0.1)) {
    const int64_t second = 1000000000;
    living.clock_ns = (dice_.chance(0.5) ? 1 : -1) * dice_.below(100000) * second;
  }
  Turn order;
  order.steps = static_cast<uint32_t>(dice_.between(1, 24));
  order.seed = dice_.next();
  order.clock_ns = living.clock_ns;
  if (dice_.chance(0.04)) {
    order.die_step = static_cast<uint32_t>(dice_.between(1, order.steps));
    order.die_call = dice_.between(1, 8);
    order.die_after = dice_.chance(0.5);
  }
  turn(which, order);
}

void World::turn(size_t which, Turn order) {
  Living& living = living_[which];
  ++totals_.turns;
  const bool dies = order.die_step != 0 || order.order == Order::kDieWithLock;
  if (::write(living.orders, &order, sizeof order) != sizeof order) fail("a process is gone");
  const Report before = living.last;
  if (!receive(living, dies)) {
    // A killed process cannot say how far it got: to the step that it was to die in.
    totals_.steps += order.die_step;
    ++(order.order == Order::kDieWithLock ? totals_.killed_with_lock : totals_.killed_within);
    return bury(which);
  }
  count(before, living.last);
  if (living.last.broken) ++totals_.failed_steps;
  if (!living.last.closed) return;
  ++totals_.left;
  kill(living.pid, SIGKILL);
  bury(which);
}

void World::count(const Report& before, const Report& after) {
  totals_.steps += after.steps;
  totals_.granted += after.granted - before.granted;
  totals_.refused += after.refused - before.refused;
  totals_.forks += after.forks - before.forks;
  if (after.calls > before.calls) totals_.calls += after.calls - before.calls;
  if (after.refusals > before.refusals) totals_.refusals += after.refusals - before.refusals;
  mix(after.digest);
  mix(static_cast<uint64_t>(after.created));
  mix(static_cast<uint64_t>(after.held));
  mix(static_cast<uint64_t>(after.steps));
}

// Everybody wants everything; then everybody gives what it does not use.
void World::storm() {
  ++totals_.storms;
  for (const Order order : {Order::kStorm, Order::kRelieve}) {
    for (size_t i = living_.size(); i > 0; --i) {
      turn(i - 1, {order, 4, dice_.next(), 0, 0, 0, living_[i - 1].clock_ns});
      check();
    }
  }
}

void World::operate() {
  ++totals_.settings;
  const std::string key = "instance-" + std::to_string(dice_.below(kInstances));
  const int64_t size = dice_.below(60) * unit_;
  switch (dice_.below(9)) {
    case 0:
      return may_be_refused(segment_->configure(key, Setting::kLimit, size), "limit");
    case 1:
      return may_be_refused(segment_->configure(key, Setting::kGuarantee, size), "guarantee");
    case 2: {
      Status status = segment_->configure(key, Setting::kLimit, layout::kNoLimit);
      return may_be_refused(status, "no limit");
    }
    case 3:
      return may_be_refused(segment_->set_weight(key, 0.5 * dice_.below(6)), "weight");
    case 4:
      return may_be_refused(segment_->ask_back(key, size), "ask back");
    case 5:
    case 6:
      may_be_refused(segment_->set_capacity(dice_.between(30, 160) * unit_, -1), "capacity");
      return settle_capacity();
    case 7:
      return must(segment_->set_foreign(size / 4), "foreign");
    default: {
      uint32_t reaped = 0;
      return must(segment_->reap(&reaped), "reap");
    }
  }
}

void World::kill_one(size_t which) {
  ++totals_.killed_between;
  kill(living_[which].pid, SIGKILL);
  bury(which);
}

// False where the process has died instead of answering.
bool World::receive(Living& living, bool may_die) {
  pollfd waiting{living.reports, POLLIN, 0};
  if (poll(&waiting, 1, kAnswerMs) == 0) fail("seed %lu: a process hangs", seed_);
  const ssize_t got = ::read(living.reports, &living.last, sizeof living.last);
  if (got == static_cast<ssize_t>(sizeof living.last)) return true;
  int status = 0;
  waitpid(living.pid, &status, 0);
  const int pid = living.pid;
  living.pid = 0;
  if (may_die && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return false;
  fail("seed %lu, after %ld steps: process %d of %s ended by itself, status %x", seed_,
       (long)totals_.steps, pid, living.spec.instance.c_str(), static_cast<unsigned>(status));
}

// Waits for the end of a process: its memory and its locks are gone then.
void World::bury(size_t which) {
  Living& dead = living_[which];
  if (dead.pid != 0) waitpid(dead.pid, nullptr, 0);
  close(dead.orders);
  close(dead.reports);
  living_.erase(living_.begin() + static_cast<long>(which));
}

void World::check() {
  SegmentView view;
  must(segment_->snapshot(&view), "snapshot");
  // A lock that a dead process held stands in the way of a sure answer until someone takes it.
  int64_t total = 0, created = 0;
  for (const AccountView& account : view.accounts) {
    check_account(account);
    total += account.charge;
    created += account.created;
  }
  if (total > view.high_water || view.high_water > most_lendable_) {
    fail("seed %lu: %ld bytes are charged, the mark is %ld, at most %ld could be lent", seed_,
         (long)total, (long)view.high_water, (long)most_lendable_);
  }
  if (created > total) fail("seed %lu: %ld bytes exist, %ld charged", seed_, created, total);
  check_kernel();
  mix(static_cast<uint64_t>(total));
}

void World::check_account(const AccountView& account) {
  int64_t held = 0, leased_only = 0, exists = 0;
  size_t known = 0;
  bool quarantine = false;
  for (const Living& living : living_) {
    if (living.spec.instance != account.instance) continue;
    held += living.last.held;
    leased_only += living.last.owner ? living.last.leased_only : 0;
    exists += living.last.created;
    ++known;
    quarantine = quarantine || living.last.quarantined > 0;
  }
  // Those that have died are still charged until they are reaped.
  bool reaped = account.members.size() == known;
  for (const MemberView& member : account.members) reaped = reaped && member.alive;
  reaped = reaped && (account.owner_pid == 0 || account.owner_alive);
  const int64_t expected = held + leased_only;
  const bool exact = reaped && !quarantine;
  if (account.charge < expected || account.charge < exists ||
      (exact && (account.charge != expected || account.created != held))) {
    tell(account);
    fail(
        "seed %lu, after %ld steps: %s is charged %ld bytes; %ld exist, %ld are booked, %ld leased",
        seed_, (long)totals_.steps, account.instance.c_str(), (long)account.charge, (long)exists,
        (long)held, (long)leased_only);
  }
}

// What is needed to understand a violation.
void World::tell(const AccountView& account) const {
  std::fprintf(stderr, "row %u, owner %u (alive %d), leased %ld, created %ld\n", account.row,
               account.owner_pid, account.owner_alive, (long)account.leased, (long)account.created);
  for (const MemberView& member : account.members) {
    std::fprintf(stderr, "  member %u of process %u (alive %d): created %ld, demand %ld\n",
                 member.row, member.pid, member.alive, (long)member.created, (long)member.demand);
  }
  for (const Living& living : living_) {
    if (living.spec.instance != account.instance) continue;
    std::fprintf(stderr, "  process %d, owner %u: exists %ld, held %ld, leased %ld, stuck %ld\n",
                 living.pid, living.last.owner, (long)living.last.created, (long)living.last.held,
                 (long)living.last.leased_only, (long)living.last.quarantined);
  }
}

void World::check_kernel() {
  for (const Living& living : living_) {
    if (living.last.memory_fd < 0) continue;
    const std::string path =
        "/proc/" + std::to_string(living.pid) + "/fd/" + std::to_string(living.last.memory_fd);
    struct stat info{};
    if (stat(path.c_str(), &info) != 0) fail("seed %lu: cannot look at %s", seed_, path.c_str());
    if (info.st_blocks * 512 != living.last.created) {
      fail("seed %lu: the kernel counts %ld bytes of a process that says %ld", seed_,
           (long)info.st_blocks * 512, (long)living.last.created);
    }
  }
}

// All leave or die; then nothing is charged, and everything can be leased.
void World::end() {
  while (!living_.empty()) {
    if (dice_.chance(0.5)) {
      turn(living_.size() - 1, {Order::kClose, 0, 0, 0, 0, 0, 0});
    } else {
      kill_one(living_.size() - 1);
    }
    check();
  }
  uint32_t reaped = 0;
  must(segment_->reap(&reaped), "reap");
  must(segment_->set_foreign(0), "foreign");
  SegmentView view;
  must(segment_->snapshot(&view), "snapshot");
  if (!view.accounts.empty()) fail("seed %lu: accounts of the dead are left", seed_);
  totals_.reaps = view.reaps;
  totals_.steals = view.locks_stolen;
  totals_.timeouts = view.lock_timeouts;
  std::unique_ptr<AccountHandle> last;
  must(AccountHandle::join(segment_, "last", "last", 0, &last), "join");
  const int64_t all = segment_->capacity() - segment_->headroom();
  if (last->leasable() != all || last->lease(all) != Grant::kGranted) {
    fail("seed %lu: %ld of %ld bytes can be leased at the end", seed_, (long)last->leasable(),
         (long)all);
  }
  last->close();
  segment_->close();
  must(remove_ledger_file(folder_, device_), "remove");
  if (rmdir(folder_.c_str()) != 0)
    fail("seed %lu: something is left in %s", seed_, folder_.c_str());
}

}  // namespace kvcached::test
