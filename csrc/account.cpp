#include "account.hpp"

#include <chrono>

namespace kvcached {

using layout::member_byte;
using layout::owner_byte;

namespace {
void add(layout::I64& counter, int64_t amount) {
  counter.fetch_add(amount, std::memory_order_acq_rel);
}

void store_geometry(layout::Geometry& geometry, int64_t block_bytes, int64_t block_tokens,
                    int64_t page_bytes) {
  geometry.block_tokens.store(block_tokens);
  geometry.page_bytes.store(page_bytes);
  geometry.block_bytes.store(block_bytes);  // last: readers wait for it
}

int64_t now_us() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(now).count();
}
}  // namespace

Status AccountHandle::join(std::shared_ptr<Segment> segment, const std::string& instance,
                           const std::string& name, int64_t pinned_bytes,
                           std::unique_ptr<AccountHandle>* joined) {
  Segment& ledger = *segment;
  if (Status status = ledger.check_usable(true); !status) return status;
  SegmentGuard guard(ledger.lock_);
  if (!guard) return ledger.busy();
  ledger.reap_locked();
  uint32_t index = 0;
  Status status = ledger.find_or_create(instance, name, &index);
  if (!status) return status;
  if (status = ledger.raise_pinned(index, pinned_bytes); status) status = ledger.claim_owner(index);
  if (!status) {
    ledger.vacate_if_empty(index);
    return status;
  }
  ledger.changed();
  *joined = std::make_unique<AccountHandle>(std::move(segment), index);
  return Status::ok();
}

Grant AccountHandle::try_lease(int64_t size_bytes) {
  if (!usable()) return Grant::kContended;
  SegmentGuard guard(segment_->lock_, std::try_to_lock);
  if (!guard || !usable() || !segment_->reserve_locked(index_, size_bytes)) {
    return Grant::kContended;
  }
  add(row().scheduler.leased, size_bytes);
  note_granted(size_bytes);
  segment_->changed();
  return Grant::kGranted;
}

Grant AccountHandle::lease(int64_t size_bytes) {
  if (!usable()) return Grant::kUnusable;
  SegmentGuard guard(segment_->lock_);
  if (!usable()) return Grant::kUnusable;
  if (!guard) {
    add(row().counters.lock_timeouts, 1);
    return Grant::kBusy;
  }
  bool granted = segment_->reserve_locked(index_, size_bytes);
  if (!granted) {
    if (!segment_->check_usable(true)) return Grant::kUnusable;
    granted = segment_->reap_locked() != 0 && segment_->reserve_locked(index_, size_bytes);
  }
  if (!granted) {
    add(row().counters.refused, 1);
    if (charges::load(row().scheduler.demand) > 0) segment_->ring(Bell::kPressure);
    return Grant::kRefused;
  }
  add(row().scheduler.leased, size_bytes);
  note_granted(size_bytes);
  segment_->changed();
  return Grant::kGranted;
}

void AccountHandle::note_granted(int64_t size_bytes) {
  add(row().counters.granted, 1);
  if (waits_since_us_.load(std::memory_order_relaxed) == 0) return;
  if (size_bytes >= waits_for_.load(std::memory_order_relaxed)) {
    end_wait();
  } else {
    got_some_.store(true, std::memory_order_relaxed);
  }
}

void AccountHandle::end_wait() {
  int64_t since = waits_since_us_.exchange(0, std::memory_order_relaxed);
  if (since == 0) return;
  int64_t waited = std::max<int64_t>(0, now_us() - since);
  layout::Waits& waits = row().waits;
  size_t bucket = 0;
  while (bucket + 1 < layout::kWaitBuckets && waited >> (bucket + 8) != 0) ++bucket;
  add(waits.buckets[bucket], 1);
  add(waits.total_us, waited);
  if (waited > charges::load(waits.longest_us)) waits.longest_us.store(waited);
  add(waits.count, 1);
}

bool AccountHandle::give_back(int64_t size_bytes) {
  if (!usable()) return true;
  charges::Sums sums = charges::sums(row());
  if (size_bytes > sums.leased - sums.held) return false;
  add(row().scheduler.leased, -size_bytes);
  segment_->changed();
  segment_->ring(Bell::kFreed);
  return true;
}

int64_t AccountHandle::leasable() const {
  if (!usable()) return 0;
  // The version is read first: a change during the reading makes the stored answer an old one.
  int64_t version = charges::load(segment_->header().version.version);
  if (cached_version_.load(std::memory_order_acquire) == version) {
    int64_t value = cached_leasable_.load(std::memory_order_acquire);
    if (cached_version_.load(std::memory_order_relaxed) == version) return value;
  }
  int64_t value = charges::room(segment_->shared(), index_).leasable;
  if (!caching_.test_and_set(std::memory_order_acquire)) {
    cached_version_.store(0, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    cached_leasable_.store(value, std::memory_order_release);
    cached_version_.store(version, std::memory_order_release);
    caching_.clear(std::memory_order_release);
  }
  return value;
}

int64_t AccountHandle::ceiling() const {
  return usable() ? charges::ceiling(segment_->shared(), index_) : 0;
}

int64_t AccountHandle::charge() const {
  return usable() ? charges::charge(row()) : 0;
}

int64_t AccountHandle::others_demand() const {
  return usable() ? charges::others(segment_->shared(), index_).demand : 0;
}

bool AccountHandle::pressed() const {
  return usable() && charges::pressed(segment_->shared(), index_);
}

int64_t AccountHandle::version() const {
  return usable() ? charges::load(segment_->header().version.version) : 0;
}

StandingsView AccountHandle::standings() const {
  StandingsView view{0, 0, {}};
  if (!usable()) return view;
  view.lendable = charges::lent(segment_->shared());
  for (uint32_t i = 0, n = charges::account_rows(segment_->header()); i < n; ++i) {
    const layout::Account& account = segment_->account(i);
    if (i == index_) view.own = view.accounts.size();
    if (i != index_ && !charges::used(account.name.state)) continue;
    const layout::Scheduler& numbers = account.scheduler;
    charges::Sums sums = charges::sums(account);
    StandingView each{charges::floor(account),
                      charges::limit(account),
                      charges::weight(account),
                      sums.charge,
                      charges::bytes(numbers.in_use),
                      charges::bytes(numbers.cached),
                      charges::bytes(numbers.warm),
                      charges::bytes(numbers.demand),
                      charges::bytes(account.geometry.page_bytes),
                      charges::used(numbers.working)};
    if (charges::used(numbers.claimed)) {
      // What members wait for is leased already: the device has so much less than it should.
      view.lendable -= sums.demand;
    } else {
      // Nobody says what it is used for, and members wait for what is not leased yet. What they
      // set aside is no longer lendable, whether it is there or not: it is not wanted once more.
      each.in_use = sums.charge;
      each.demand = sums.demand - charges::set_aside_demand(account);
    }
    view.accounts.push_back(each);
  }
  return view;
}

void AccountHandle::set_demand(int64_t size_bytes) {
  if (!usable()) return;
  if (size_bytes > 0 && waits_since_us_.load(std::memory_order_relaxed) == 0) {
    waits_for_.store(size_bytes, std::memory_order_relaxed);
    got_some_.store(false, std::memory_order_relaxed);
    waits_since_us_.store(now_us(), std::memory_order_relaxed);
  } else if (size_bytes == 0) {
    // Smaller leases served it, or nothing did: it was given up, or blocks came free at home.
    if (got_some_.exchange(false, std::memory_order_relaxed)) end_wait();
    waits_since_us_.store(0, std::memory_order_relaxed);
  }
  int64_t before = row().scheduler.demand.exchange(size_bytes);
  if (size_bytes == before) return;
  segment_->changed();
  if (size_bytes > before) segment_->ring(Bell::kPressure);
  // What was kept for this account may be leased by others now.
  if (size_bytes == 0) segment_->ring(Bell::kFreed);
}

void AccountHandle::press() {
  if (usable()) segment_->ring(Bell::kPressure);
}

void AccountHandle::publish(int64_t in_use, int64_t cached, int64_t warm, bool working) {
  if (!usable()) return;
  layout::Scheduler& numbers = row().scheduler;
  bool same = charges::load(numbers.in_use) == in_use && charges::load(numbers.cached) == cached &&
              charges::load(numbers.warm) == warm && charges::used(numbers.working) == working;
  if (same) return;
  numbers.in_use.store(in_use, std::memory_order_release);
  numbers.cached.store(cached, std::memory_order_release);
  numbers.warm.store(warm, std::memory_order_release);
  numbers.working.store(working ? 1 : 0, std::memory_order_release);
  segment_->changed();
}

void AccountHandle::set_state(uint32_t state) {
  if (usable()) row().scheduler.state.store(state);
}

void AccountHandle::describe(int64_t block_bytes, int64_t block_tokens, int64_t page_bytes) {
  if (usable()) store_geometry(row().geometry, block_bytes, block_tokens, page_bytes);
}

void MemberHandle::describe(int64_t block_bytes, int64_t block_tokens, int64_t page_bytes) {
  if (usable()) store_geometry(row().geometry, block_bytes, block_tokens, page_bytes);
}

void AccountHandle::count_reclaimed(int64_t size_bytes) {
  if (!usable()) return;
  add(row().counters.reclaimed, size_bytes);
  add(row().geometry.reclaims, 1);
}

void AccountHandle::publish_cache(int64_t hits, int64_t misses, int64_t evictions,
                                  int64_t by_pressure) {
  if (!usable()) return;
  layout::Counters& counters = row().counters;
  counters.hits.store(hits, std::memory_order_relaxed);
  counters.misses.store(misses, std::memory_order_relaxed);
  counters.evictions.store(evictions, std::memory_order_relaxed);
  counters.evictions_by_pressure.store(by_pressure, std::memory_order_relaxed);
}

int64_t AccountHandle::asked() const {
  return usable() ? charges::asked(row()) : 0;
}

void AccountHandle::answer(int64_t size_bytes) {
  if (!usable() || size_bytes == 0) return;
  add(row().scheduler.answered, size_bytes);
  segment_->changed();
  segment_->ring(Bell::kFreed);  // who asked looks again
}

void AccountHandle::close() {
  if (!segment_->check_usable(true) || closed_.exchange(true)) return;
  {
    SegmentGuard guard(segment_->lock_);
    if (guard) {
      segment_->vacate_owner(index_);
      segment_->vacate_if_empty(index_);
    } else {
      segment_->liveness_.drop(owner_byte(index_));  // a reaper clears the row
    }
  }
  segment_->changed();
  segment_->ring(Bell::kFreed);
}

Status MemberHandle::attach(std::shared_ptr<Segment> segment, const std::string& instance,
                            const std::string& name, int64_t pinned_bytes,
                            std::unique_ptr<MemberHandle>* attached) {
  Segment& ledger = *segment;
  if (Status status = ledger.check_usable(true); !status) return status;
  SegmentGuard guard(ledger.lock_);
  if (!guard) return ledger.busy();
  ledger.reap_locked();
  uint32_t index = 0;
  uint32_t member = 0;
  Status status = ledger.find_or_create(instance, name, &index);
  if (!status) return status;
  if (status = ledger.raise_pinned(index, pinned_bytes); status) {
    status = ledger.claim_member(index, &member);
  }
  if (!status) {
    ledger.vacate_if_empty(index);
    return status;
  }
  ledger.changed();
  *attached = std::make_unique<MemberHandle>(std::move(segment), index, member);
  return Status::ok();
}

Grant MemberHandle::pin(int64_t size_bytes) {
  if (!usable()) return Grant::kUnusable;
  SegmentGuard guard(segment_->lock_);
  if (!usable()) return Grant::kUnusable;
  if (!guard) return Grant::kBusy;
  bool granted = segment_->reserve_locked(index_, size_bytes);
  if (!granted) {
    if (!segment_->check_usable(true)) return Grant::kUnusable;
    granted = segment_->reap_locked() != 0 && segment_->reserve_locked(index_, size_bytes);
  }
  if (!granted) {
    if (member().demand.exchange(size_bytes) != size_bytes) segment_->changed();
    segment_->ring(Bell::kPressure);
    return Grant::kRefused;
  }
  // With an owner the bytes are leased too, first: between the two stores too much is charged.
  if (charges::used(row().scheduler.claimed)) add(row().scheduler.leased, size_bytes);
  add(member().created, size_bytes);
  member().demand.store(0);
  segment_->changed();
  return Grant::kGranted;
}

void MemberHandle::set_demand(int64_t size_bytes) {
  if (!usable()) return;
  int64_t before = member().demand.exchange(size_bytes);
  if (size_bytes != before) segment_->changed();
  if (size_bytes > before) segment_->ring(Bell::kPressure);
}

Grant MemberHandle::set_aside(int64_t size_bytes) {
  if (!usable()) return Grant::kUnusable;
  SegmentGuard guard(segment_->lock_);
  if (!usable()) return Grant::kUnusable;
  if (!guard) return Grant::kBusy;
  if (!segment_->check_usable(true)) return Grant::kUnusable;
  size_bytes = std::min(size_bytes, charges::kMostBytes);
  int64_t before = charges::load(member().set_aside);
  bool had = size_bytes <= before && charges::load(member().demand) == 0;
  if (!had) {
    // On top of what is there and of what others, who have theirs, have not taken yet.
    int64_t theirs = charges::set_aside(segment_->shared(), &member(), true);
    member().beside.store(charges::bytes(segment_->header().outside.foreign) + theirs);
  }
  member().set_aside.store(size_bytes);
  int64_t room = charges::room_beside(segment_->shared(), index_, member_);
  if (!had && size_bytes > room && segment_->reap_locked() != 0) {
    room = charges::room_beside(segment_->shared(), index_, member_);
  }
  int64_t missing = had || size_bytes == 0 ? 0 : std::max<int64_t>(0, size_bytes - room);
  member().demand.store(missing);
  if (size_bytes != before) segment_->changed();
  if (size_bytes < before) segment_->ring(Bell::kFreed);
  if (missing == 0) return Grant::kGranted;
  segment_->ring(Bell::kPressure);
  return Grant::kRefused;
}

bool MemberHandle::created(int64_t size_bytes) {
  if (!usable()) return false;
  add(member().created, size_bytes);
  return true;
}

bool MemberHandle::released(int64_t size_bytes) {
  if (!usable()) return true;
  if (size_bytes > charges::held(member())) return false;
  add(member().released, size_bytes);
  segment_->changed();
  segment_->ring(Bell::kFreed);
  return true;
}

int64_t MemberHandle::held() const {
  return usable() ? charges::held(member()) : 0;
}

void MemberHandle::close() {
  if (!segment_->check_usable(true) || closed_.exchange(true)) return;
  {
    SegmentGuard guard(segment_->lock_);
    if (guard) {
      segment_->vacate_member(index_, member_);
      segment_->vacate_if_empty(index_);
    } else {
      segment_->liveness_.drop(member_byte(index_, member_));  // a reaper clears the row
    }
  }
  segment_->changed();
  segment_->ring(Bell::kFreed);
}

}  // namespace kvcached
