// Reading the whole ledger without its lock.
#include <cstring>

#include "segment.hpp"

namespace kvcached {

namespace {
constexpr int kReadAttempts = 32;

template <size_t kSize>
std::string text(const char (&bytes)[kSize]) {
  return std::string(bytes, strnlen(bytes, kSize));
}
}  // namespace

AccountView Segment::view_account(uint32_t index) const {
  const layout::Account& row = account(index);
  charges::Sums sums = charges::sums(row);
  AccountView view{};
  view.instance = text(row.name.instance);
  view.name = text(row.name.name);
  view.owner_pid = charges::used(row.scheduler.claimed) ? row.scheduler.pid.load() : 0;
  view.ready = charges::used(row.scheduler.state);
  view.asleep = row.scheduler.state.load(std::memory_order_acquire) == layout::kAsleep;
  view.guarantee = charges::load(row.settings.guarantee);
  view.limit = charges::load(row.settings.limit);
  view.pinned = charges::load(row.name.pinned);
  view.weight = charges::weight(row);
  view.leased = sums.leased;
  view.created = sums.held;
  view.charge = sums.charge;
  view.in_use = charges::load(row.scheduler.in_use);
  view.cached = charges::load(row.scheduler.cached);
  view.warm = charges::load(row.scheduler.warm);
  view.demand = charges::bytes(row.scheduler.demand);
  view.granted = charges::load(row.counters.granted);
  view.refused = charges::load(row.counters.refused);
  view.reclaims = charges::load(row.geometry.reclaims);
  view.reclaimed = charges::load(row.counters.reclaimed);
  view.lock_timeouts = charges::load(row.counters.lock_timeouts);
  view.asked = charges::used(row.scheduler.claimed) ? charges::asked(row) : 0;
  view.hits = charges::load(row.counters.hits);
  view.misses = charges::load(row.counters.misses);
  view.evictions = charges::load(row.counters.evictions);
  view.evictions_by_pressure = charges::load(row.counters.evictions_by_pressure);
  view.waits = charges::load(row.waits.count);
  view.waited_us = charges::load(row.waits.total_us);
  view.longest_wait_us = charges::load(row.waits.longest_us);
  for (const layout::I64& bucket : row.waits.buckets) {
    view.wait_buckets.push_back(charges::load(bucket));
  }
  view.block_bytes = charges::load(row.geometry.block_bytes);
  view.block_tokens = charges::load(row.geometry.block_tokens);
  view.page_bytes = charges::load(row.geometry.page_bytes);
  view.ceiling = charges::ceiling(shared(), index);
  for (uint32_t i = 0, n = charges::member_rows(row); i < n; ++i) {
    const layout::Member& member = row.members[i];
    if (!charges::used(member.state)) continue;
    int64_t demand = charges::bytes(member.demand);
    view.demand += demand;
    view.members.push_back({i, member.pid.load(), false, charges::held(member), demand,
                            charges::load(member.set_aside), charges::to_come(header(), member),
                            charges::load(member.created), charges::load(member.released)});
  }
  return view;
}

void Segment::view_rows(SegmentView* view) const {
  view->capacity = capacity();
  view->headroom = headroom();
  view->foreign = charges::load(header().outside.foreign);
  view->set_aside = charges::set_aside(shared());
  view->high_water = charges::load(header().statistics.high_water);
  view->reaps = charges::load(header().statistics.reaps);
  view->lock_timeouts = charges::load(header().lock.timeouts);
  view->locks_stolen = charges::load(header().lock.stolen);
  view->accounts.clear();
  for (uint32_t i = 0, n = charges::account_rows(header()); i < n; ++i) {
    if (!charges::used(account(i).name.state)) continue;
    view->accounts.push_back(view_account(i));
    view->accounts.back().row = i;
  }
}

Status Segment::snapshot(SegmentView* view) const {
  if (Status status = check_usable(false); !status) return status;
  view->device = device_;
  view->consistent = false;
  // A charge grows only under the lock, and who grew one bumps the version before letting go: with
  // the lock free at both ends and the version the same, nothing grew in between.
  for (int attempt = 0; attempt < kReadAttempts && !view->consistent; ++attempt) {
    int64_t version = charges::load(header().version.version);
    bool free_before = header().lock.word.load() == 0;
    view_rows(view);
    view->consistent = free_before && header().lock.word.load() == 0 &&
                       charges::load(header().version.version) == version;
  }
  for (AccountView& account : view->accounts) {
    account.owner_alive =
        account.owner_pid != 0 && liveness_.alive(layout::owner_byte(account.row));
    for (MemberView& member : account.members) {
      member.alive = liveness_.alive(layout::member_byte(account.row, member.row));
    }
  }
  return Status::ok();
}

}  // namespace kvcached
