// What a simulated process does: blocks come and go, pages follow, the ledger is asked.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "charges.hpp"
#include "sim_process.hpp"

namespace kvcached::test {
namespace {

constexpr size_t kWorkUnderWay = 4;
constexpr int64_t kQuietPolls = 3;  // questions for fences with nothing in between

// Ledger calls see the process's own clock; sleeping with it would take as long as it is off.
class OwnClock {
 public:
  explicit OwnClock(int64_t offset_ns) { set_clock(offset_ns); }
  ~OwnClock() { set_clock(0); }
  OwnClock(const OwnClock&) = delete;
  OwnClock& operator=(const OwnClock&) = delete;
};

}  // namespace

void Process::step(Dice& dice) {
  if (plan_.die_at == 0 && dice.chance(0.08)) {
    plan_.fail_at = dice.between(1, 6);
    plan_.fail_times = dice.chance(0.2) ? dice.between(2, 12) : 1;
    plan_.fail_code = dice.chance(0.5) ? Code::kOutOfMemory : Code::kDriver;
  }
  backend_->set_plan(plan_);
  choose(dice);
  if (dice.chance(0.8)) flush();
  work(dice);
  settle();
}

void Process::choose(Dice& dice) {
  const int64_t what = dice.below(100);
  if (what < 30) return allocate(dice, dice.between(1, 2 * spec_.blocks_per_page));
  if (what < 55) return free_group(dice);
  if (what < 63) return touch_group(dice);
  if (what < 68) {
    std::vector<int32_t> lost;
    blocks_->uncache(dice.between(1, 6), lost);
    return lose(lost);
  }
  if (what < 76) return give_up(dice.between(1, 3));
  if (what < 81) return (void)grow(dice.between(1, 2));
  if (what < 88) return backend_->finish_work(static_cast<size_t>(dice.between(1, 3)));
  if (what == 99 && dice.chance(0.02)) return fork_a_child();
  ask_ledger(dice);
}

// --- blocks

void Process::allocate(Dice& dice, int64_t count) {
  const int64_t missing = count - blocks_->available();
  const int64_t pages = (missing + spec_.blocks_per_page - 1) / spec_.blocks_per_page;
  if (missing > 0 && !grow(pages)) {
    if (account_ != nullptr) account_->set_demand(pages * spec_.page_bytes());
    return;
  }
  if (account_ != nullptr && dice.chance(0.3)) account_->set_demand(0);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  must(blocks_->alloc(count, ids.data()), "alloc");
  for (auto& group : cached_) {  // their contents are overwritten
    group.erase(std::remove_if(
                    group.begin(), group.end(),
                    [&](int32_t id) { return std::find(ids.begin(), ids.end(), id) != ids.end(); }),
                group.end());
  }
  flush();
  if (broken_) return;
  for (const int32_t id : ids) {
    bool mapped = false;
    must(arena_->is_mapped(id / spec_.blocks_per_page, &mapped), "is_mapped");
    if (!mapped) fail("block %d is handed out on a page that is not mapped", id);
    check_fresh(id);
    write_block(id);
  }
  used_.push_back(std::move(ids));
}

bool Process::grow(int64_t pages) {
  if (pages > blocks_->num_pages() - blocks_->present_pages()) return false;
  const size_t kept = std::min(to_unmap_.size(), static_cast<size_t>(pages));
  const int64_t fresh = pages - static_cast<int64_t>(kept);
  const int64_t size = fresh * spec_.page_bytes();
  if (fresh > 0) {
    // A second rank of an instance has its bytes booked before it says which pages they are for.
    const bool had = account_ != nullptr ? account_->lease(size) == Grant::kGranted
                                         : member_->pin(size) == Grant::kGranted;
    ++(had ? granted_ : refused_);
    if (!had) return false;
  }
  for (size_t i = 0; i < kept; ++i) {
    must(blocks_->add_page(static_cast<int32_t>(to_unmap_.back())), "add_page");
    to_unmap_.pop_back();
  }
  std::vector<int32_t> grown;
  blocks_->grow(fresh, grown);
  if (account_ != nullptr) {
    to_map_.insert(grown.begin(), grown.end());
  } else if (fresh > 0) {
    // Pages that are on their way out are kept by naming them as needed.
    must(mapper_->need({grown.begin(), grown.end()}), "need");
    wanted_.insert(grown.begin(), grown.end());
  }
  return true;
}

namespace {

using Group = std::vector<int32_t>;

// Takes one of the groups out; there must be one.
Group take_any(std::vector<Group>& groups, Dice& dice) {
  const size_t which = static_cast<size_t>(dice.below(static_cast<int64_t>(groups.size())));
  std::swap(groups[which], groups.back());
  Group group = std::move(groups.back());
  groups.pop_back();
  return group;
}

}  // namespace

void Process::free_group(Dice& dice) {
  if (used_.empty()) return;
  Group group = take_any(used_, dice);
  for (const int32_t id : group) check_block(id, true);
  const bool cached = dice.chance(0.6);
  const std::vector<uint8_t> flags(group.size(), cached ? 1 : 0);
  must(blocks_->free(group.data(), flags.data(), static_cast<int64_t>(group.size())), "free");
  if (cached) {
    cached_.push_back(std::move(group));
  } else {
    for (const int32_t id : group) contents_[static_cast<size_t>(id)] = 0;
  }
}

void Process::touch_group(Dice& dice) {
  if (cached_.empty()) return;
  Group group = take_any(cached_, dice);
  if (group.empty()) return;
  for (const int32_t id : group) check_block(id, true);
  must(blocks_->touch(group.data(), static_cast<int64_t>(group.size())), "touch");
  used_.push_back(std::move(group));
}

// These blocks' contents are gone.
void Process::lose(const std::vector<int32_t>& blocks) {
  for (const int32_t id : blocks) {
    contents_[static_cast<size_t>(id)] = 0;
    for (auto& group : cached_) {
      group.erase(std::remove(group.begin(), group.end(), id), group.end());
    }
  }
}

void Process::give_up(int64_t pages) {
  std::vector<int32_t> dropped, lost;
  blocks_->shrink(pages, dropped);
  blocks_->reclaim(pages - static_cast<int64_t>(dropped.size()), dropped, lost);
  lose(lost);
  int64_t never_created = 0;
  for (const int32_t page : dropped) {
    if (to_map_.erase(page) != 0) {
      ++never_created;
    } else {
      to_unmap_.push_back(page);
    }
  }
  if (never_created > 0 && !account_->give_back(never_created * spec_.page_bytes())) {
    fail("a lease of %ld pages was lost", (long)never_created);
  }
}

// --- the ledger

void Process::ask_ledger(Dice& dice) {
  const OwnClock clock(clock_ns_);
  const int64_t page = spec_.page_bytes();
  switch (dice.below(9)) {
    case 0:
      return set_aside(dice);
    case 1: {
      uint32_t reaped = 0;
      return must(segment_->reap(&reaped), "reap");
    }
    case 2: {
      SegmentView view;
      must(segment_->snapshot(&view), "snapshot");
      // With the lock of a dead process in the way a reader cannot be sure.
      if (!view.consistent && file_->header.lock.word.load() == 0) fail("nothing changes");
      return;
    }
    case 3:
      return must(segment_->set_foreign(dice.below(3) * page), "set_foreign");
    default:
      break;
  }
  if (segment_->foreign_age_ms() < -1) fail("an age of %ld", (long)segment_->foreign_age_ms());
  if (account_ == nullptr) return member_->set_demand(dice.chance(0.3) ? page : 0);
  switch (dice.below(4)) {
    case 0:
      return lease_what_is_leasable();
    case 1:
      account_->answer(account_->asked());
      return account_->set_demand(dice.chance(0.5) ? 0 : dice.between(1, 8) * page);
    case 2:
      account_->publish(blocks_->used_blocks(), blocks_->cached_blocks(), 0, dice.chance(0.5));
      account_->describe(static_cast<int64_t>(block_bytes()), 16, page);
      return account_->press();
    default:
      if (account_->standings().accounts.empty()) fail("no standings");
  }
}

void Process::lease_what_is_leasable() {
  const int64_t leasable = account_->leasable();
  if (leasable < 0) fail("leasable is %ld", (long)leasable);
  if (account_->lease(leasable) != Grant::kGranted) fail("%ld was leasable", (long)leasable);
  if (!account_->give_back(leasable)) fail("a lease of %ld bytes was lost", (long)leasable);
  if (account_->give_back(int64_t{1} << 40)) fail("bytes were given back that nobody leased");
}

void Process::set_aside(Dice& dice) {
  const Grant grant = member_->set_aside(dice.chance(0.6) ? 0 : dice.below(4) * spec_.page_bytes());
  if (grant != Grant::kGranted && grant != Grant::kRefused) fail("setting memory aside");
  if (grant == Grant::kRefused) (void)member_->set_aside(0);
}

// A forked child has none of it, and takes nothing of it away.
void Process::fork_a_child() {
  ++forks_;
  const pid_t child = fork();
  if (child == 0) {
    int64_t released = 0;
    const bool inert = !segment_->usable() && !member_->usable() &&
                       !arena_->unmap({0}, &released).is_ok() && member_->held() == 0 &&
                       (account_ == nullptr || account_->lease(1) == Grant::kUnusable);
    _exit(inert ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (status != 0) fail("a forked child had something: %d", status);
}

void Process::storm() {
  backend_->set_plan(plan_);
  Dice dice(static_cast<uint64_t>(steps_));
  allocate(dice, 1 + dice.below(3 * spec_.blocks_per_page));
  flush();
  settle();
}

void Process::relieve() {
  backend_->set_plan(plan_);
  give_up(2);
  backend_->finish_work(1);
  flush();
  settle();
}

// --- mapping

void Process::flush() {
  Mapper::Pages needed, ahead;
  for (const int64_t page : to_map_) (is_needed(page) ? needed : ahead).push_back(page);
  if (!to_map_.empty() || !to_unmap_.empty()) {
    // The page pool names pages that leave before those that come; of one page, only one.
    must(mapper_->submit(to_unmap_, needed, ahead, 0), "submit");
    for (const int64_t page : to_unmap_) wanted_.erase(page);
    wanted_.insert(to_map_.begin(), to_map_.end());
    to_unmap_.clear();
    to_map_.clear();
  }
  needed.clear();
  for (const int64_t page : wanted_) {
    if (is_needed(page)) needed.push_back(page);
  }
  bool mapped = needed.empty();
  Status refusal;
  for (int tries = 0; tries < 40 && !mapped; ++tries) {
    refusal = mapper_->wait(needed, 30.0, &mapped);
    if (refusal && !mapped) fail("the mapping thread does not answer");
  }
  if (mapped) return;
  // The ledger has no lease for what is in quarantine beside the pages: the engine's step fails.
  if (arena_->quarantined_bytes() == 0 && backend_->kind()[0] == 'h') {
    fail("pages are refused without a cause: %s", refusal.message().c_str());
  }
  must(mapper_->give_up(needed), "give up");
  broken_ = true;
}

// Work on the device that touches all blocks in use; what is too much of it gets done.
void Process::work(Dice& dice) {
  if (broken_ || !dice.chance(0.4)) return;
  std::vector<Span> touched;
  for (const int64_t page : wanted_) {
    if (!is_needed(page)) continue;
    for (size_t region = 0; region < spec_.regions; ++region) {
      const auto first = static_cast<int32_t>(page) * spec_.blocks_per_page;
      touched.push_back({address_of(first, region), spec_.chunk});
    }
  }
  backend_->begin_work(std::move(touched));
  if (backend_->work() > kWorkUnderWay) backend_->finish_work(1);
}

void Process::settle() {
  backend_->count_polls_anew();
  while (backend_->fence_is_open()) {
    const int64_t seen = backend_->quiet_polls();
    if (seen >= kQuietPolls) return;
    // Wakes the thread; not while it has pages without a fence, which would be told one more.
    if (!backend_->fence_was_refused()) must(mapper_->submit({}, {}, {}, 0), "submit");
    backend_->wait_for_poll(seen);
  }
  bool done = false;
  must(mapper_->drain(30.0, &done), "drain");
}

}  // namespace kvcached::test
