// The ledger file's layout, byte for byte. Nothing else in the project computes an offset of it.
//
// Every value has one writer, named beside it; values with different writers lie in different cache
// lines. Each is stored with one atomic store, and what must change together is derived from
// counters that only grow, so that a process may die between any two instructions.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace kvcached::layout {

constexpr char kMagic[8] = {'K', 'V', 'C', 'L', 'E', 'D', 'G', 'R'};
constexpr uint32_t kVersion = 5;
constexpr uint32_t kMaxAccounts = 64;
constexpr uint32_t kMaxMembers = 16;
constexpr uint32_t kMaxSlots = 1024;
constexpr size_t kDeviceSize = 96;
constexpr size_t kInstanceSize = 48;
constexpr size_t kNameSize = 64;
constexpr size_t kLine = 64;
constexpr size_t kWaitBuckets = 13;
constexpr uint32_t kAsleep = 2;  // a state of an owner's engine
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

using U32 = std::atomic<uint32_t>;
using I64 = std::atomic<int64_t>;
static_assert(U32::is_always_lock_free && I64::is_always_lock_free && sizeof(I64) == 8);

// Written once, before the file gets its name.
struct alignas(kLine) Identity {
  char magic[8];
  uint32_t version;
  uint32_t header_size;
  uint64_t total_size;
  uint64_t nonce[2];
  char device[kDeviceSize];
};

// Written by operators, under the lock.
struct alignas(kLine) Settings {
  I64 capacity;
  I64 headroom;
};

// The lock: 0, or the holder's slot + 1, with the top bit set while others wait.
struct alignas(kLine) LockLine {
  U32 word;
  U32 unused;
  I64 stolen;    // by whoever holds the lock
  I64 timeouts;  // by anyone whose wait ran out
};

// A sequence number that other processes sleep on. `sleepers` is a flag: a waiter sets it before it
// sleeps, the next bump clears it and wakes all, so a waiter that dies costs one system call.
struct alignas(kLine) Bell {
  U32 sequence;
  U32 sleepers;
};

// Grows with every change that may alter what some account can lease.
struct alignas(kLine) VersionLine {
  I64 version;
};

// Written under the lock.
struct alignas(kLine) Statistics {
  I64 high_water;
  I64 reaps;
  U32 account_rows;  // rows ever used: readers look no further
};

// Bytes of the device that are in use and are nobody's pages, as last measured: weights,
// activations, contexts, other programs. Written by whoever measures; the last word counts.
struct alignas(kLine) Outside {
  I64 foreign;
  I64 measured_ms;  // when, by the system's monotonic clock; 0: never
};

struct Header {
  Identity identity;
  Settings settings;
  LockLine lock;
  Bell freed;
  Bell pressure;
  VersionLine version;
  Statistics statistics;
  Outside outside;
};

// One process that maps memory for an account. Bytes that it holds: created - released, both only
// grow (over all holders of the row), so that the death of a member is booked with one store.
struct alignas(kLine) Member {
  U32 state;      // 0 free, 1 used; under the lock
  U32 pid;        // under the lock
  I64 created;    // by the member
  I64 released;   // by the member; by its reaper once it is dead
  I64 demand;     // by the member: what it still wants, leased or not
  I64 set_aside;  // by the member, under the lock: what will be allocated beside pages
  I64 beside;     // by the member, under the lock: the foreign memory on top of which that comes
};

// Written under the lock, `state` last when a row appears and first when it goes.
struct alignas(kLine) AccountName {
  U32 state;        // 0 free, 1 used
  U32 member_rows;  // rows ever used: readers look no further
  I64 pinned;
  char instance[kInstanceSize];
  char name[kNameSize];
};

// Written by operators, under the lock.
struct alignas(kLine) AccountSettings {
  I64 guarantee;
  I64 limit;
  std::atomic<double> weight;
  I64 asked;  // only grows: bytes that operators asked the account to give back
};

// Written by the account's owner. `leased` grows under the lock (also by a member that pins) and
// falls when the owner hands bytes back that were never created. What is leased now is
// leased - the sum of the members' released.
struct alignas(kLine) Scheduler {
  U32 claimed;  // 1 while there is an owner; under the lock
  U32 pid;      // under the lock
  I64 leased;
  I64 in_use;
  I64 cached;
  I64 warm;
  I64 demand;
  U32 state;     // of its engine: 0 while it starts, 1 once it serves, kAsleep
  U32 working;   // 1 while requests run: what is cached is part of what it works with
  I64 answered;  // how far it has followed `asked`
};

// Written by the account's owner.
struct alignas(kLine) Counters {
  I64 granted;
  I64 refused;
  I64 reclaimed;
  I64 lock_timeouts;
  // In blocks: answered from the cache, to be computed, lost from it for the account's own use,
  // lost from it because others wanted the memory.
  I64 hits;
  I64 misses;
  I64 evictions;
  I64 evictions_by_pressure;
};

// Written by the account's owner: leases that had to wait, and how long. Bucket i counts those
// below 2^(i + 8) microseconds that no lower bucket counts, the last one all others.
struct alignas(kLine) Waits {
  I64 count;
  I64 total_us;
  I64 longest_us;
  I64 buckets[kWaitBuckets];
};

// Written by the account's owner, once: what its blocks are, so that others can say what fits. The
// last one is a counter for which the line above has no room: how often it gave memory back because
// others wanted it.
struct alignas(kLine) Geometry {
  I64 block_bytes;
  I64 block_tokens;
  I64 page_bytes;
  I64 reclaims;
};

struct Account {
  AccountName name;
  AccountSettings settings;
  Scheduler scheduler;
  Counters counters;
  Waits waits;
  Geometry geometry;
  Member members[kMaxMembers];
};

struct Shared {
  Header header;
  Account accounts[kMaxAccounts];
};

static_assert(std::atomic<double>::is_always_lock_free && sizeof(std::atomic<double>) == 8);
static_assert(std::is_standard_layout_v<Shared>);
static_assert(sizeof(Identity) == 3 * kLine && offsetof(Identity, device) == 40);
static_assert(offsetof(Header, settings) == 192 && offsetof(Header, lock) == 256);
static_assert(offsetof(Header, freed) == 320 && offsetof(Header, pressure) == 384);
static_assert(offsetof(Header, version) == 448 && offsetof(Header, statistics) == 512);
static_assert(offsetof(Header, outside) == 576 && sizeof(Header) == 640);
static_assert(sizeof(Member) == kLine && offsetof(Member, created) == 8);
static_assert(sizeof(AccountName) == 2 * kLine && offsetof(AccountName, instance) == 16);
static_assert(sizeof(AccountSettings) == kLine && sizeof(Counters) == kLine);
static_assert(sizeof(Waits) == 2 * kLine && offsetof(Account, waits) == 320);
static_assert(sizeof(Geometry) == kLine && offsetof(Account, geometry) == 448);
static_assert(sizeof(Scheduler) == kLine && offsetof(Scheduler, leased) == 8);
static_assert(offsetof(Account, scheduler) == 192 && offsetof(Account, members) == 512);
static_assert(sizeof(Account) == 1536 && sizeof(Shared) == 640 + 64 * 1536);

// Locks of the file's bytes tell who lives. They lie far beyond the contents: a byte for each
// account's owner, for each member, and a slot for each open handle that may take the lock.
constexpr uint64_t kFirstByte = uint64_t{1} << 40;
constexpr uint64_t kBytes = kMaxAccounts + kMaxAccounts * kMaxMembers + kMaxSlots;

constexpr uint64_t owner_byte(uint32_t account) {
  return account;
}
constexpr uint64_t member_byte(uint32_t account, uint32_t member) {
  return kMaxAccounts + account * kMaxMembers + member;
}
constexpr uint64_t slot_byte(uint32_t slot) {
  return kMaxAccounts + kMaxAccounts * kMaxMembers + slot;
}

}  // namespace kvcached::layout
