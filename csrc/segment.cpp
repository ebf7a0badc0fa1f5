#include "segment.hpp"

#include <unistd.h>

#include <cstring>
#include <thread>

#include "futex.hpp"

namespace kvcached {

using layout::Account;
using layout::Member;
using layout::member_byte;
using layout::owner_byte;

Status Segment::open(const OpenRequest& request, std::shared_ptr<Segment>* opened) {
  std::shared_ptr<Segment> segment(new Segment);
  segment->device_ = request.device;
  segment->read_only_ = request.read_only;
  segment->path_ = request.directory + "/" + ledger_file_name(request.device);
  Status status = open_ledger_file(request, segment->liveness_, segment->mapping_);
  if (!status) return status;
  int64_t capacity = segment->capacity();
  if (request.capacity_bytes >= 0 && request.capacity_bytes != capacity) {
    return {Code::kLedger, segment->path_ + ": this ledger's capacity is " +
                               std::to_string(capacity) + " bytes, and " +
                               std::to_string(request.capacity_bytes) + " bytes were asked for"};
  }
  if (!request.read_only) {
    if (status = segment->claim_slot(); !status) return status;
  }
  *opened = std::move(segment);
  return Status::ok();
}

Segment::~Segment() {
  close();
  if (liveness_.inherited()) mapping_.abandon();
}

Status Segment::claim_slot() {
  uint32_t start = static_cast<uint32_t>(getpid()) % layout::kMaxSlots;
  for (uint32_t i = 0; i < layout::kMaxSlots; ++i) {
    uint32_t slot = (start + i) % layout::kMaxSlots;
    if (!liveness_.take(layout::slot_byte(slot))) continue;
    lock_.attach(&header().lock, &liveness_, slot);
    return Status::ok();
  }
  return {Code::kLedger, path_ + ": " + std::to_string(layout::kMaxSlots) +
                             " handles have this ledger open, and no more can"};
}

void Segment::close() {
  if (liveness_.inherited() || mapping_.shared() == nullptr || closed_.exchange(true)) return;
  if (!read_only_) {
    {
      SegmentGuard guard(lock_);
      // Without the lock the rows stay; their bytes fall free below, so a reaper clears them.
      for (uint32_t i = 0; guard && i < charges::account_rows(header()); ++i) {
        for (uint32_t j = 0; j < charges::member_rows(account(i)); ++j) {
          if (liveness_.holds(member_byte(i, j))) vacate_member(i, j);
        }
        if (liveness_.holds(owner_byte(i))) vacate_owner(i);
        if (charges::used(account(i).name.state)) vacate_if_empty(i);
      }
    }
    lock_.retire();
    changed();
    ring(Bell::kFreed);
    ring(Bell::kPressure);
  }
  liveness_.close();
}

int64_t Segment::capacity() const {
  return liveness_.inherited() ? 0 : charges::load(header().settings.capacity);
}

int64_t Segment::headroom() const {
  return liveness_.inherited() ? 0 : charges::load(header().settings.headroom);
}

Status Segment::check_usable(bool writing) const {
  if (liveness_.inherited()) {
    return {Code::kLedger, path_ + ": this handle was inherited through a fork; open its own"};
  }
  if (closed_.load()) return {Code::kLedger, path_ + ": this handle is closed"};
  if (writing && read_only_) {
    return {Code::kLedger, path_ + ": this handle was opened for reading only"};
  }
  return check_not_cut(liveness_.fd(), path_);
}

Status Segment::busy() const {
  return {Code::kBusy, path_ + ": a live process holds the ledger's lock and does not let go"};
}

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
  row.scheduler.claimed = 0;
  row.scheduler.leased = 0;
  for (layout::I64* counter : {&row.counters.granted, &row.counters.refused,
                               &row.counters.reclaimed, &row.counters.lock_timeouts}) {
    *counter = 0;
  }
  for (Member& member : row.members) {
    member.state = 0;
    member.created = 0;
    member.released = 0;
    member.demand = 0;
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
  int64_t sum = charges::others(shared(), index).floor + floor;
  if (floor >= 0 && sum <= lendable) return Status::ok();
  return {code, path_ + ": guarantees and pinned pages would add up to " + std::to_string(sum) +
                    " bytes, and " + std::to_string(lendable) + " bytes can be lent"};
}

Status Segment::raise_pinned(uint32_t index, int64_t pinned_bytes) {
  Account& row = account(index);
  if (pinned_bytes <= charges::load(row.name.pinned)) return Status::ok();
  int64_t floor = std::max(charges::load(row.settings.guarantee), pinned_bytes);
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
  row.ready = 0;
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
  liveness_.drop(owner_byte(index));
}

void Segment::vacate_member(uint32_t index, uint32_t member) {
  Member& row = account(index).members[member];
  row.released.store(charges::load(row.created));  // one store books all that it held
  row.demand = 0;
  row.state = 0;
  liveness_.drop(member_byte(index, member));
}

void Segment::vacate_if_empty(uint32_t index) {
  Account& row = account(index);
  if (charges::used(row.scheduler.claimed)) return;
  for (uint32_t i = 0; i < charges::member_rows(row); ++i) {
    if (charges::used(row.members[i].state)) return;
  }
  row.name.state = 0;
}

uint32_t Segment::reap_locked() {
  uint32_t reaped = 0;
  for (uint32_t i = 0; i < charges::account_rows(header()); ++i) {
    if (!charges::used(account(i).name.state)) continue;
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
    vacate_if_empty(i);
  }
  if (reaped != 0) {
    header().statistics.reaps.fetch_add(reaped);
    changed();
    ring(Bell::kFreed);
  }
  return reaped;
}

Status Segment::reap(uint32_t* reaped) {
  if (Status status = check_usable(true); !status) return status;
  SegmentGuard guard(lock_);
  if (!guard) return busy();
  *reaped = reap_locked();
  return Status::ok();
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

Status Segment::configure(const std::string& key, Setting setting, int64_t size_bytes) {
  if (Status status = check_usable(true); !status) return status;
  SegmentGuard guard(lock_);
  if (!guard) return busy();
  uint32_t index = 0;
  if (Status status = find(key, &index); !status) return status;
  layout::AccountSettings& row = account(index).settings;
  bool limits = setting == Setting::kLimit;
  int64_t guarantee = limits ? charges::load(row.guarantee) : size_bytes;
  int64_t limit = limits ? size_bytes : charges::load(row.limit);
  if (size_bytes < 0 || guarantee > limit) {
    return {Code::kInvalidArgument, key + ": guarantee " + std::to_string(guarantee) +
                                        " bytes and limit " + std::to_string(limit) +
                                        " bytes: expected 0 <= guarantee <= limit"};
  }
  if (limits) {
    row.limit.store(limit);
  } else {
    int64_t floor = std::max(guarantee, charges::load(account(index).name.pinned));
    Status status = check_floors(Code::kInvalidArgument, index, floor, charges::lendable(header()));
    if (!status) return status;
    row.guarantee.store(guarantee);
  }
  changed();
  ring(Bell::kFreed);
  ring(Bell::kPressure);
  return Status::ok();
}

Status Segment::set_weight(const std::string& key, double weight) {
  if (Status status = check_usable(true); !status) return status;
  SegmentGuard guard(lock_);
  if (!guard) return busy();
  uint32_t index = 0;
  if (Status status = find(key, &index); !status) return status;
  if (!(weight > 0 && weight <= 1e6)) {
    return {Code::kInvalidArgument,
            key + ": weight " + std::to_string(weight) + ": expected more than 0, at most 1e6"};
  }
  account(index).settings.weight.store(weight);
  ring(Bell::kPressure);
  return Status::ok();
}

Status Segment::set_capacity(int64_t capacity_bytes, int64_t headroom_bytes) {
  if (Status status = check_usable(true); !status) return status;
  SegmentGuard guard(lock_);
  if (!guard) return busy();
  if (capacity_bytes < 0) capacity_bytes = capacity();
  if (headroom_bytes < 0) headroom_bytes = headroom();
  if (headroom_bytes >= capacity_bytes) {
    return {Code::kInvalidArgument, path_ + ": capacity " + std::to_string(capacity_bytes) +
                                        " bytes with headroom " + std::to_string(headroom_bytes) +
                                        " bytes leaves nothing to lease"};
  }
  Status status = check_floors(Code::kInvalidArgument, layout::kMaxAccounts, 0,
                               capacity_bytes - headroom_bytes);
  if (!status) return status;
  header().settings.capacity.store(capacity_bytes);
  header().settings.headroom.store(headroom_bytes);
  changed();
  ring(Bell::kFreed);
  ring(Bell::kPressure);
  return Status::ok();
}

void Segment::changed() {
  header().version.version.fetch_add(1);
}

layout::Bell& Segment::bell(Bell which) const {
  return which == Bell::kFreed ? header().freed : header().pressure;
}

void Segment::ring(Bell which) {
  layout::Bell& rung = bell(which);
  rung.sequence.fetch_add(1);
  if (rung.sleepers.load() != 0 && rung.sleepers.exchange(0) != 0) futex_wake(rung.sequence);
}

uint32_t Segment::sequence(Bell which) const {
  return usable() ? bell(which).sequence.load() : 0;
}

uint32_t Segment::wait(Bell which, uint32_t seen, double seconds) {
  if (!usable()) return seen;
  layout::Bell& heard = bell(which);
  auto deadline =
      SteadyClock::now() +
      std::chrono::nanoseconds(static_cast<int64_t>(std::min(std::max(seconds, 0.0), 1e8) * 1e9));
  while (true) {
    if (!read_only_) heard.sleepers.store(1);
    uint32_t sequence = heard.sequence.load();
    auto left = std::chrono::nanoseconds(deadline - SteadyClock::now());
    if (sequence != seen || left.count() <= 0 || !usable()) return sequence;
    // A reader cannot say that it sleeps, so nobody wakes it: it looks now and then.
    if (read_only_) left = std::min<std::chrono::nanoseconds>(left, std::chrono::milliseconds(50));
    if (futex_wait(heard.sequence, seen, left) == EINTR) return heard.sequence.load();
  }
}

bool Segment::hold_lock(double seconds) {
  if (!check_usable(true)) return false;
  SegmentGuard guard(lock_);
  if (!guard) return false;
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  return true;
}

}  // namespace kvcached
