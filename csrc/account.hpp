// What a process holds in a ledger: an account, as its owner, or a place among an account's
// members. Both hold the ledger open. Any thread, without the GIL. Sizes are bytes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "segment.hpp"

namespace kvcached {

enum class Grant {
  kGranted,
  kRefused,    // there is not enough now
  kBusy,       // a live process holds the lock and does not let go: a shortage too
  kContended,  // only from the attempts that do not wait: try again, waiting
  kUnusable,   // closed, or inherited through a fork
};

// One account's numbers as the policy needs them. Read without the lock: they fit together when
// the version did not change meanwhile, and the next version corrects them otherwise.
struct StandingView {
  int64_t guarantee, limit;  // the pinned page is within both
  double weight;
  int64_t charge, in_use, cached, warm, demand, page_bytes;
  bool working;
};

struct StandingsView {
  int64_t lendable;  // less what the device refuses although it is leased
  size_t own;        // the asking account's place in `accounts`
  std::vector<StandingView> accounts;
};

// The owner: the process that schedules for the instance and leases for all its members.
class AccountHandle {
 public:
  // Finds or creates the instance's account and becomes its owner; takes over what its members
  // have created already. kLedger if it has a living owner.
  static Status join(std::shared_ptr<Segment> segment, const std::string& instance,
                     const std::string& name, int64_t pinned_bytes,
                     std::unique_ptr<AccountHandle>* joined);
  AccountHandle(std::shared_ptr<Segment> segment, uint32_t index)
      : segment_(std::move(segment)), index_(index) {}
  ~AccountHandle() { close(); }
  AccountHandle(const AccountHandle&) = delete;
  AccountHandle& operator=(const AccountHandle&) = delete;

  Grant lease(int64_t size_bytes);      // waits for the lock; reaps once before it refuses
  Grant try_lease(int64_t size_bytes);  // never waits: kGranted or kContended
  bool give_back(int64_t size_bytes);   // leased, but never created. False if never leased
  int64_t leasable() const;
  int64_t ceiling() const;
  int64_t charge() const;
  int64_t others_demand() const;
  bool pressed() const;  // whether it may have to give something back; see charges::pressed
  int64_t version() const;
  StandingsView standings() const;
  void set_demand(int64_t size_bytes);
  void press();  // wakes those who may have to give something back
  void publish(int64_t in_use, int64_t cached, int64_t warm, bool working);
  void set_state(uint32_t state);  // see layout::Scheduler
  void describe(int64_t block_bytes, int64_t block_tokens, int64_t page_bytes);
  void count_reclaimed(int64_t size_bytes);
  // Blocks since the account was joined; see layout::Counters.
  void publish_cache(int64_t hits, int64_t misses, int64_t evictions, int64_t by_pressure);
  int64_t asked() const;            // bytes that operators asked it to give back
  void answer(int64_t size_bytes);  // so many of them are dealt with
  void close();
  bool usable() const { return !closed_.load(std::memory_order_relaxed) && segment_->usable(); }
  Segment& segment() const { return *segment_; }

 private:
  layout::Account& row() const { return segment_->account(index_); }
  void note_granted(int64_t size_bytes);
  void end_wait();

  std::shared_ptr<Segment> segment_;
  uint32_t index_;
  std::atomic<bool> closed_{false};
  // The wait for memory that is under way: since when (0: none), for a lease of how many bytes, and
  // whether a smaller one was granted meanwhile.
  std::atomic<int64_t> waits_since_us_{0};
  std::atomic<int64_t> waits_for_{0};
  std::atomic<bool> got_some_{false};
  // leasable() of the last asked version. Version 0 never exists: it marks a copy being changed.
  mutable std::atomic<int64_t> cached_version_{0};
  mutable std::atomic<int64_t> cached_leasable_{0};
  mutable std::atomic_flag caching_ = ATOMIC_FLAG_INIT;
};

// A process that maps memory for the account.
class MemberHandle {
 public:
  // Finds or creates the instance's account and takes a member row of it.
  static Status attach(std::shared_ptr<Segment> segment, const std::string& instance,
                       const std::string& name, int64_t pinned_bytes,
                       std::unique_ptr<MemberHandle>* attached);
  MemberHandle(std::shared_ptr<Segment> segment, uint32_t index, uint32_t member)
      : segment_(std::move(segment)), index_(index), member_(member) {}
  ~MemberHandle() { close(); }
  MemberHandle(const MemberHandle&) = delete;
  MemberHandle& operator=(const MemberHandle&) = delete;

  // Charges and books bytes that this process is about to create without a lease of the owner.
  Grant pin(int64_t size_bytes);
  // As the owner's: a worker knows the pages before there is an owner.
  void describe(int64_t block_bytes, int64_t block_tokens, int64_t page_bytes);
  void set_demand(int64_t size_bytes);  // leased bytes that the device refuses; 0 when it gave them
  // Keeps leases off so many bytes, which this process will allocate beside its pages; 0 when it
  // has. Kept at once in any case; kRefused: others hold them still, and are asked to give back.
  // What was granted once stays granted.
  Grant set_aside(int64_t size_bytes);
  bool created(int64_t size_bytes);   // bytes under a lease exist now; false: not usable
  bool released(int64_t size_bytes);  // bytes are gone; false: more than this member holds
  int64_t held() const;
  // Release the memory first: what is still booked counts as gone from here on.
  void close();
  bool usable() const { return !closed_.load(std::memory_order_relaxed) && segment_->usable(); }
  Segment& segment() const { return *segment_; }

 private:
  layout::Account& row() const { return segment_->account(index_); }
  layout::Member& member() const { return row().members[member_]; }

  std::shared_ptr<Segment> segment_;
  uint32_t index_;
  uint32_t member_;
  std::atomic<bool> closed_{false};
};

}  // namespace kvcached
