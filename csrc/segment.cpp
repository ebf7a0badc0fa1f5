#include "segment.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "futex.hpp"

namespace kvcached {

using layout::member_byte;
using layout::owner_byte;

namespace {
constexpr int kOpenAttempts = 64;
constexpr auto kOpenPause = std::chrono::milliseconds(1);

int64_t now_ms() {
  auto since = SteadyClock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::milliseconds>(since).count();
}
}  // namespace

Status Segment::open(const OpenRequest& request, std::shared_ptr<Segment>* opened) {
  // Who removes a ledger that nobody uses (remove_ledger_file) holds all of its locks for a moment,
  // and takes its name away: then there is another file to open, or none.
  Status status;
  for (int attempt = 0; attempt < kOpenAttempts; ++attempt) {
    bool removed = false;
    status = open_once(request, opened, &removed);
    if (!removed) return status;
    std::this_thread::sleep_for(kOpenPause);
  }
  return status;
}

Status Segment::open_once(const OpenRequest& request, std::shared_ptr<Segment>* opened,
                          bool* removed) {
  std::shared_ptr<Segment> segment(new Segment);
  segment->device_ = request.device;
  segment->read_only_ = request.read_only;
  segment->path_ = request.directory + "/" + ledger_file_name(request.device);
  Status status = open_ledger_file(request, segment->liveness_, segment->mapping_);
  if (!status) return status;
  segment->liveness_.renumber();  // the folder and the mapped file are closed again
  int64_t capacity = segment->capacity();
  if (request.capacity_bytes >= 0 && request.capacity_bytes != capacity) {
    return {Code::kLedger, segment->path_ + ": this ledger's capacity is " +
                               std::to_string(capacity) + " bytes, and " +
                               std::to_string(request.capacity_bytes) + " bytes were asked for"};
  }
  if (!request.read_only) {
    status = segment->claim_slot();
    if (status && segment->liveness_.unlinked()) {
      status = {Code::kLedger, segment->path_ + ": this file is being replaced again and again"};
    }
    *removed = !status;
    if (!status) return status;
  }
  segment->closed_ = false;
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
  if (liveness_.inherited() || closed_.exchange(true)) return;
  // The rows of a file that was cut cannot be touched; its bytes fall free all the same.
  if (!read_only_ && check_not_cut(liveness_.fd(), path_)) {
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
  return liveness_.inherited() ? 0 : charges::bytes(header().settings.capacity);
}

int64_t Segment::headroom() const {
  return liveness_.inherited() ? 0 : charges::bytes(header().settings.headroom);
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

Status Segment::reap(uint32_t* reaped) {
  if (Status status = check_usable(true); !status) return status;
  SegmentGuard guard(lock_);
  if (!guard) return busy();
  *reaped = reap_locked();
  return Status::ok();
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
    int64_t floor = std::max(guarantee, charges::bytes(account(index).name.pinned));
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
  if (!(weight > 0 && weight <= charges::kMostWeight)) {
    return {Code::kInvalidArgument,
            key + ": weight " + std::to_string(weight) + ": expected more than 0, at most 1e6"};
  }
  account(index).settings.weight.store(weight);
  changed();
  ring(Bell::kPressure);
  return Status::ok();
}

Status Segment::ask_back(const std::string& key, int64_t size_bytes) {
  if (Status status = check_usable(true); !status) return status;
  SegmentGuard guard(lock_);
  if (!guard) return busy();
  uint32_t index = 0;
  if (Status status = find(key, &index); !status) return status;
  if (!charges::used(account(index).scheduler.claimed)) {
    return {Code::kInvalidArgument, key + ": no scheduler that could give memory back"};
  }
  account(index).settings.asked.fetch_add(size_bytes);
  changed();
  ring(Bell::kPressure);
  return Status::ok();
}

Status Segment::set_capacity(int64_t capacity_bytes, int64_t headroom_bytes) {
  if (Status status = check_usable(true); !status) return status;
  SegmentGuard guard(lock_);
  if (!guard) return busy();
  if (capacity_bytes < 0) capacity_bytes = capacity();
  if (headroom_bytes < 0) headroom_bytes = headroom();
  if (headroom_bytes >= capacity_bytes || capacity_bytes > charges::kMostBytes) {
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

Status Segment::set_foreign(int64_t size_bytes) {
  if (Status status = check_usable(true); !status) return status;
  int64_t before = header().outside.foreign.exchange(size_bytes);
  header().outside.measured_ms.store(now_ms());
  if (size_bytes != before) changed();
  if (size_bytes < before) ring(Bell::kFreed);
  return Status::ok();
}

int64_t Segment::foreign_age_ms() const {
  int64_t measured = usable() ? charges::load(header().outside.measured_ms) : 0;
  // A clock that is behind the measurer's (another time namespace) says nothing.
  return measured <= 0 || measured > now_ms() ? -1 : now_ms() - measured;
}

int64_t Segment::created() const {
  int64_t total = 0;
  for (uint32_t i = 0, n = usable() ? charges::account_rows(header()) : 0; i < n; ++i) {
    if (charges::used(account(i).name.state)) total += charges::sums(account(i)).held;
  }
  return total;
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
  const double bounded = seconds > 0 ? std::min(seconds, 1e8) : 0;  // also not a number
  auto deadline =
      SteadyClock::now() + std::chrono::nanoseconds(static_cast<int64_t>(bounded * 1e9));
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
