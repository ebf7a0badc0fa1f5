// The ledger of one device: a shared file with an account for every instance. See
// segment_layout.hpp for what is stored, charges.hpp for the arithmetic, account.hpp for what an
// account can do.
//
// Everything here may be called from any thread, without the GIL. After close(), and in a forked
// child, calls do nothing and say so (kLedger, or a neutral value).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "charges.hpp"
#include "liveness.hpp"
#include "segment_file.hpp"
#include "segment_lock.hpp"
#include "status.hpp"

namespace kvcached {

struct MemberView {
  uint32_t row;
  uint32_t pid;
  bool alive;
  int64_t created, demand, set_aside, to_come;
  int64_t created_ever, released_ever;  // by all holders of the row: they only grow
};

struct AccountView {
  uint32_t row;
  std::string instance, name;
  uint32_t owner_pid;
  bool owner_alive, ready, asleep;
  int64_t guarantee, limit, pinned;
  double weight;
  int64_t leased, created, charge, in_use, cached, warm, demand;
  int64_t granted, refused, reclaims, reclaimed, lock_timeouts;
  int64_t asked, hits, misses, evictions, evictions_by_pressure;
  int64_t waits, waited_us, longest_wait_us;
  std::vector<int64_t> wait_buckets;
  int64_t block_bytes, block_tokens, page_bytes, ceiling;
  std::vector<MemberView> members;
};

struct SegmentView {
  std::string device;
  bool consistent;  // nothing changed while this was read
  int64_t capacity, headroom, foreign, set_aside;
  int64_t high_water, reaps, lock_timeouts, locks_stolen;
  std::vector<AccountView> accounts;
};

enum class Setting { kGuarantee, kLimit };
enum class Bell { kFreed, kPressure };

class Segment {
 public:
  static Status open(const OpenRequest& request, std::shared_ptr<Segment>* opened);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // Gives back every row that this handle holds, then its locks. The file stays.
  void close();

  const std::string& path() const { return path_; }
  const std::string& device() const { return device_; }
  int64_t capacity() const;
  int64_t headroom() const;
  int lock_fd() const { return liveness_.fd(); }
  bool usable() const { return !closed_.load(std::memory_order_relaxed) && !liveness_.inherited(); }

  // A copy of everything, without taking the lock. Repeated while it changes under the reader.
  Status snapshot(SegmentView* view) const;
  // Clears the rows of the dead; `reaped` is how many owners and members were.
  Status reap(uint32_t* reaped);
  // `key` is an instance, or a name that only one account has.
  Status configure(const std::string& key, Setting setting, int64_t size_bytes);
  Status set_weight(const std::string& key, double weight);
  // Asks the account's owner to give back so much of what it does not use.
  Status ask_back(const std::string& key, int64_t size_bytes);
  // Says how many bytes of the device are in use and are nobody's pages, as measured just now.
  Status set_foreign(int64_t size_bytes);
  // Milliseconds since that was said last; -1: never.
  int64_t foreign_age_ms() const;
  // Bytes of all pages that exist.
  int64_t created() const;
  // -1 leaves a number as it is.
  Status set_capacity(int64_t capacity_bytes, int64_t headroom_bytes);

  uint32_t sequence(Bell bell) const;
  // Sleeps until the bell's sequence differs from `seen`, for `seconds` at most; returns the
  // sequence. May return early when a signal arrives.
  uint32_t wait(Bell bell, uint32_t seen, double seconds);

  // Test only: takes the lock and keeps it for so long.
  bool hold_lock(double seconds);

 private:
  friend class AccountHandle;
  friend class MemberHandle;

  Segment() = default;
  static Status open_once(const OpenRequest& request, std::shared_ptr<Segment>* opened,
                          bool* removed);
  Status claim_slot();
  Status check_usable(bool writing) const;
  Status busy() const;

  // These need the lock.
  Status find_or_create(const std::string& instance, const std::string& name, uint32_t* index);
  Status find(const std::string& key, uint32_t* index) const;
  // Whether what all accounts are sure of still fits when `index` is sure of `floor`.
  Status check_floors(Code code, uint32_t index, int64_t floor, int64_t lendable) const;
  Status raise_pinned(uint32_t index, int64_t pinned_bytes);
  Status claim_owner(uint32_t index);
  Status claim_member(uint32_t index, uint32_t* member);
  void vacate_owner(uint32_t index);
  void vacate_member(uint32_t index, uint32_t member);
  bool vacate_if_empty(uint32_t index);
  uint32_t reap_locked();
  // True, and the high-water mark raised, if the account may be charged so much more.
  bool reserve_locked(uint32_t index, int64_t size_bytes);

  void changed();  // some account may be able to lease a different amount now
  void ring(Bell bell);
  layout::Bell& bell(Bell which) const;
  layout::Account& account(uint32_t index) const { return mapping_.shared()->accounts[index]; }
  layout::Header& header() const { return mapping_.shared()->header; }
  const layout::Shared& shared() const { return *mapping_.shared(); }
  AccountView view_account(uint32_t index) const;
  void view_rows(SegmentView* view) const;

  std::string path_, device_;
  bool read_only_ = false;
  std::atomic<bool> closed_{true};  // until open() is through
  FileMapping mapping_;             // outlives close(): another thread may be reading
  Liveness liveness_;
  mutable SegmentLock lock_;
};

}  // namespace kvcached
