// Rows of the ledger: finding, claiming, vacating and reaping them. All of it under the lock.
#include <unistd.h>

#include <cstring>

#include "segment.hpp"

namespace kvcached {

using layout::Account;
using layout::Member;
using layout::member_byte;
using layout::owner_byte;

Status Segment::find_or_create(const std::string& instance, const std::string& name,
                               uint32_t* index) {
  if (instance.empty() || instance.size() >= layout::kInstanceSize ||
      instance.find('\0') != std::string::npos) {
    return {Code::kInvalidArgument, "instance '" + instance + "': expected 1 to " +
                                        std::to_string(layout::kInstanceSize - 1) + " bytes"};
  }
  uint32_t rows = charges::account_rows(header());
  uint32_t free = layout::kMaxAccounts;
  for (uint32_t i = 0; i < layout::kMaxAccounts; ++i) {
    bool used = i < rows && charges::used(account(i).name.state);
    if (!used && free == layout::kMaxAccounts) free = i;
    if (used && instance == account(i).name.instance) {
      *index = i;
      return Status::ok();
    }
  }
  if (free == layout::kMaxAccounts) {
    return {Code::kLedger, path_ + ": all " + std::to_string(layout::kMaxAccounts) +
                               " accounts belong to living instances"};
  }
  // Nobody reads a row whose state is free, so all but the state may be written in any order.
  Account& row = account(free);
  row.name.member_rows = 0;
  row.name.pinned = 0;
  std::memset(row.name.instance, 0, sizeof row.name.instance);
  std::memset(row.name.name, 0, sizeof row.name.name);
  std::memcpy(row.name.instance, instance.data(), instance.size());
  std::memcpy(row.name.name, name.data(), std::min(name.size(), layout::kNameSize - 1));
  row.settings.guarantee = 0;
  row.settings.limit = layout::kNoLimit;
  row.settings.weight = 1.0;
  row.settings.asked = row.scheduler.answered = 0;
  row.scheduler.claimed = 0;
  row.scheduler.leased = 0;
  layout::Counters& counters = row.counters;
  for (layout::I64* counter :
       {&counters.granted, &counters.refused, &counters.reclaimed, &counters.lock_timeouts,
        &counters.hits, &counters.misses, &counters.evictions, &counters.evictions_by_pressure,
        &row.waits.count, &row.waits.total_us, &row.waits.longest_us, &row.geometry.reclaims}) {
    *counter = 0;
  }
  for (layout::I64& bucket : row.waits.buckets) bucket = 0;
  row.geometry.block_bytes = row.geometry.block_tokens = row.geometry.page_bytes = 0;
  for (Member& member : row.members) {
    member.state = 0;
    member.created = 0;
    member.released = 0;
    member.demand = 0;
    member.set_aside = member.beside = 0;
  }
  if (free >= rows) header().statistics.account_rows = free + 1;
  row.name.state = 1;
  *index = free;
  return Status::ok();
}

Status Segment::find(const std::string& key, uint32_t* index) const {
  uint32_t found = 0;
  for (uint32_t i = 0; i < charges::account_rows(header()); ++i) {
    const layout::AccountName& row = account(i).name;
    if (!charges::used(row.state)) continue;
    if (key == row.instance) {
      *index = i;
      return Status::ok();
    }
    if (key == row.name) {
      *index = i;
      ++found;
    }
  }
  if (found == 1) return Status::ok();
  return {Code::kInvalidArgument,
          path_ + ": " + (found == 0 ? "no account" : std::to_string(found) + " accounts") +
              " with the name '" + key + "'" + (found == 0 ? "" : "; name the instance")};
}

Status Segment::check_floors(Code code, uint32_t index, int64_t floor, int64_t lendable) const {
  int64_t rest = charges::others(shared(), index).floor;
  if (floor >= 0 && floor <= lendable - rest) return Status::ok();
  int64_t sum = rest + std::min(floor, charges::kMostBytes);
  return {code, path_ + ": guarantees and pinned pages would add up to " + std::to_string(sum) +
                    " bytes, and " + std::to_string(lendable) + " bytes can be lent"};
}

Status Segment::raise_pinned(uint32_t index, int64_t pinned_bytes) {
  Account& row = account(index);
  if (pinned_bytes <= charges::bytes(row.name.pinned)) return Status::ok();
  int64_t floor = std::max(charges::bytes(row.settings.guarantee), pinned_bytes);
  Status status = check_floors(Code::kLedger, index, floor, charges::lendable(header()));
  if (status) row.name.pinned.store(pinned_bytes);
  return status;
}

Status Segment::claim_owner(uint32_t index) {
  layout::Scheduler& row = account(index).scheduler;
  if (!liveness_.take(owner_byte(index))) {
    return {Code::kLedger, path_ + ": the account of instance " + account(index).name.instance +
                               " has an owner, process " + std::to_string(row.pid.load())};
  }
  row.in_use = row.cached = row.warm = row.demand = 0;
  row.state = row.working = 0;
  row.answered = charges::load(account(index).settings.asked);
  row.pid = static_cast<uint32_t>(getpid());
  // What members created before there was an owner is leased from now on, so the charge stays.
  row.leased = charges::sums(account(index)).created;
  row.claimed = 1;
  return Status::ok();
}

Status Segment::claim_member(uint32_t index, uint32_t* member) {
  Account& row = account(index);
  for (uint32_t i = 0; i < layout::kMaxMembers; ++i) {
    if (charges::used(row.members[i].state) || !liveness_.take(member_byte(index, i))) continue;
    // `created` and `released` go on counting where the row's last holder stopped.
    row.members[i].pid = static_cast<uint32_t>(getpid());
    row.members[i].demand = 0;
    row.members[i].set_aside = 0;
    if (i >= charges::member_rows(row)) row.name.member_rows = i + 1;
    row.members[i].state = 1;
    *member = i;
    return Status::ok();
  }
  return {Code::kLedger, path_ + ": instance " + row.name.instance + " has " +
                             std::to_string(layout::kMaxMembers) + " living members already"};
}

void Segment::vacate_owner(uint32_t index) {
  layout::Scheduler& row = account(index).scheduler;
  row.claimed = 0;  // from here on only what members hold is charged
  row.demand = 0;
  row.in_use = row.cached = row.warm = 0;
  row.working = 0;
  liveness_.drop(owner_byte(index));
}

void Segment::vacate_member(uint32_t index, uint32_t member) {
  Member& row = account(index).members[member];
  row.released.store(charges::load(row.created));  // one store books all that it held
  row.demand = 0;
  row.set_aside = 0;
  row.state = 0;
  liveness_.drop(member_byte(index, member));
}

bool Segment::vacate_if_empty(uint32_t index) {
  Account& row = account(index);
  if (charges::used(row.scheduler.claimed)) return false;
  for (uint32_t i = 0; i < charges::member_rows(row); ++i) {
    if (charges::used(row.members[i].state)) return false;
  }
  row.name.state = 0;
  return true;
}

uint32_t Segment::reap_locked() {
  uint32_t reaped = 0;
  for (uint32_t i = 0; i < charges::account_rows(header()); ++i) {
    if (!charges::used(account(i).name.state)) continue;
    const uint32_t before = reaped;
    for (uint32_t j = 0; j < charges::member_rows(account(i)); ++j) {
      if (!charges::used(account(i).members[j].state)) continue;
      if (!liveness_.take(member_byte(i, j))) continue;
      vacate_member(i, j);
      ++reaped;
    }
    if (charges::used(account(i).scheduler.claimed) && liveness_.take(owner_byte(i))) {
      vacate_owner(i);
      ++reaped;
    }
    // Someone may have died between creating the account and becoming part of it.
    if (vacate_if_empty(i) && reaped == before) ++reaped;
  }
  if (reaped != 0) {
    header().statistics.reaps.fetch_add(reaped);
    changed();
    ring(Bell::kFreed);
  }
  return reaped;
}

bool Segment::reserve_locked(uint32_t index, int64_t size_bytes) {
  charges::Room room = charges::room(shared(), index);
  if (size_bytes > room.leasable) return false;
  // Before the charge, so that the mark is never below what was once charged.
  int64_t charged = room.charged + size_bytes;
  layout::I64& mark = header().statistics.high_water;
  if (charged > charges::load(mark)) mark.store(charged);
  return true;
}

}  // namespace kvcached
