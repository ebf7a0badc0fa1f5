// The ledger's arithmetic: what an account is charged, and what it may still lease. Pure reading.
//
// Exact under the lock, but for releases, which may happen at any moment. The order of the loads
// makes every mistake one to the safe side: too much charged, never too little.
//
// The file may hold anything: its owner, or a program of his that has gone astray, may have written
// to it. So no sum of what is read can overflow: a size is taken for none below zero, and for
// kMostBytes above that. Counters that only grow may wrap; what counts is their difference.
#pragma once

#include <algorithm>
#include <cstdint>

#include "segment_layout.hpp"

namespace kvcached::charges {

using layout::Account;
using layout::Header;
using layout::Member;
using layout::Shared;

inline int64_t load(const layout::I64& value) {
  return value.load(std::memory_order_acquire);
}

// More than any device has; all that a ledger can name of it still adds up.
constexpr int64_t kMostBytes = int64_t{1} << 50;

constexpr double kMostWeight = 1e6;

inline int64_t bytes(const layout::I64& value) {
  return std::clamp<int64_t>(load(value), 0, kMostBytes);
}

// How far one counter is ahead of another.
inline int64_t ahead(int64_t counter, int64_t of) {
  const auto difference = static_cast<uint64_t>(counter) - static_cast<uint64_t>(of);
  return std::clamp<int64_t>(static_cast<int64_t>(difference), 0, kMostBytes);
}

inline bool used(const layout::U32& state) {
  return state.load(std::memory_order_acquire) != 0;
}

// Bytes that a member holds.
inline int64_t held(const Member& member) {
  int64_t released = load(member.released);  // before `created`: the difference errs upwards
  return ahead(load(member.created), released);
}

inline uint32_t member_rows(const Account& account) {
  return std::min(account.name.member_rows.load(std::memory_order_acquire), layout::kMaxMembers);
}

inline uint32_t account_rows(const Header& header) {
  return std::min(header.statistics.account_rows.load(std::memory_order_acquire),
                  layout::kMaxAccounts);
}

struct Sums {
  int64_t held = 0;     // bytes that live members hold
  int64_t demand = 0;   // bytes that members wait for
  int64_t created = 0;  // ever, by all members of the account's life
  int64_t leased = 0;   // bytes leased now; 0 without an owner
  int64_t charge = 0;
};

// Member rows that are free have released all that they ever created, so they need no exception.
inline Sums sums(const Account& account) {
  Sums result;
  uint64_t created_ever = 0, released_ever = 0;
  for (uint32_t i = 0, n = member_rows(account); i < n; ++i) {
    const Member& member = account.members[i];
    int64_t freed = load(member.released);
    int64_t created = load(member.created);
    released_ever += static_cast<uint64_t>(freed);
    created_ever += static_cast<uint64_t>(created);
    result.demand += bytes(member.demand);
    result.held += ahead(created, freed);
  }
  result.created = static_cast<int64_t>(created_ever);
  if (used(account.scheduler.claimed)) {
    result.leased = ahead(load(account.scheduler.leased), static_cast<int64_t>(released_ever));
  }
  result.charge = std::max(result.leased, result.held);
  return result;
}

inline int64_t charge(const Account& account) {
  return sums(account).charge;
}

// What the account is sure of: its guarantee, and its pinned page in any case.
inline int64_t floor(const Account& account) {
  return std::max(bytes(account.settings.guarantee), bytes(account.name.pinned));
}

// The pinned page exists whatever the limit says.
inline int64_t limit(const Account& account) {
  return std::max(bytes(account.settings.limit), bytes(account.name.pinned));
}

// A weight that nobody could have set counts as the usual one.
inline double weight(const Account& account) {
  const double found = account.settings.weight.load();
  return found > 0 && found <= kMostWeight ? found : 1.0;
}

// What leases may use of the device, going by the settings alone: what guarantees are held against.
inline int64_t lendable(const Header& header) {
  return bytes(header.settings.capacity) - bytes(header.settings.headroom);
}

// The same, less what is in use on the device and is nobody's pages.
inline int64_t left_by_others(const Header& header) {
  return lendable(header) - bytes(header.outside.foreign);
}

// What of the memory that a member has set aside is not taken yet. What is taken is foreign memory
// and is measured as such: by so much as that has grown since, less is still to come. So nothing is
// counted twice at any moment, whoever measures when.
inline int64_t to_come(const Header& header, const Member& member) {
  int64_t size = bytes(member.set_aside);
  int64_t left = bytes(member.beside) + size - bytes(header.outside.foreign);
  return std::clamp<int64_t>(left, 0, size);
}

// Bytes that will be allocated beside pages: leases leave them alone. `except` is one member that
// does not count; with `granted`, neither do those that still wait for some of theirs.
inline int64_t set_aside(const Shared& shared, const Member* except = nullptr,
                         bool granted = false) {
  int64_t result = 0;
  for (uint32_t i = 0, n = account_rows(shared.header); i < n; ++i) {
    const Account& account = shared.accounts[i];
    if (!used(account.name.state)) continue;
    for (uint32_t j = 0, m = member_rows(account); j < m; ++j) {
      const Member& member = account.members[j];
      if (&member == except || (granted && load(member.demand) > 0)) continue;
      result += to_come(shared.header, member);
    }
  }
  return result;
}

// What members of the account wait for of that.
inline int64_t set_aside_demand(const Account& account) {
  int64_t result = 0;
  for (uint32_t i = 0, n = member_rows(account); i < n; ++i) {
    const Member& member = account.members[i];
    if (load(member.set_aside) > 0) result += bytes(member.demand);
  }
  return result;
}

// What leases may add up to now.
inline int64_t lent(const Shared& shared) {
  return left_by_others(shared.header) - set_aside(shared);
}

// All accounts but one (`except` may be none: kMaxAccounts).
struct Others {
  int64_t charge = 0;  // what they hold
  int64_t claim = 0;   // what they hold or are sure of
  int64_t floor = 0;   // what they are sure of
  int64_t demand = 0;  // what they want and could not lease
};

inline Others others(const Shared& shared, uint32_t except) {
  Others result;
  for (uint32_t i = 0, n = account_rows(shared.header); i < n; ++i) {
    const Account& account = shared.accounts[i];
    if (i == except || !used(account.name.state)) continue;
    Sums own = sums(account);
    int64_t sure = floor(account);
    result.charge += own.charge;
    result.floor += sure;
    result.claim += std::max(own.charge, sure);
    result.demand += own.demand + bytes(account.scheduler.demand);
  }
  return result;
}

struct Room {
  int64_t leasable;  // bytes that a lease would grant to the account now
  int64_t charged;   // bytes charged to all accounts together
};

// A lease is granted when
//   - the account stays within its limit, and
//   - all charges, each counted at least as its floor, stay within what can be lent; or the account
//     stays within its own floor and the bytes are there: then others hold more than their floors,
//     and what they must give back is not this account's to wait for.
inline Room room(const Shared& shared, uint32_t index) {
  const Account& account = shared.accounts[index];
  Others rest = others(shared, index);
  int64_t mine = charge(account);
  int64_t sure = floor(account);
  int64_t all = lent(shared);
  int64_t beyond_floor = rest.claim + std::max(mine, sure) <= all ? all - rest.claim - mine : 0;
  int64_t within_floor = std::min(sure - mine, all - rest.charge - mine);
  int64_t leasable = std::min(std::max(beyond_floor, within_floor), limit(account) - mine);
  return {std::max<int64_t>(0, leasable), rest.charge + mine};
}

// Bytes that operators asked the account for, and that its owner has not answered.
inline int64_t asked(const Account& account) {
  int64_t answered = load(account.scheduler.answered);  // first: the difference errs upwards
  return ahead(load(account.settings.asked), answered);
}

// Whether the account may have to give something back: others wait for memory, an operator asked
// it to, it is above its limit, or what all hold and are sure of no longer fits.
inline bool pressed(const Shared& shared, uint32_t index) {
  const Account& account = shared.accounts[index];
  Others rest = others(shared, index);
  int64_t mine = charge(account);
  return rest.demand > 0 || mine > limit(account) || asked(account) > 0 ||
         rest.claim + std::max(mine, floor(account)) > lent(shared);
}

// The most that the account can ever hold under today's settings, beside what others use today.
inline int64_t ceiling(const Shared& shared, uint32_t index) {
  int64_t most = left_by_others(shared.header) - others(shared, index).floor;
  return std::max<int64_t>(0, std::min(limit(shared.accounts[index]), most));
}

// What the member may set aside now: the room beside all charges and beside what others have set
// aside, or wait to set aside and were there first. All that wait count in the order of their rows,
// so that of two of them one always goes on.
inline int64_t room_beside(const Shared& shared, uint32_t index, uint32_t member) {
  int64_t room = left_by_others(shared.header);
  for (uint32_t i = 0, n = account_rows(shared.header); i < n; ++i) {
    const Account& account = shared.accounts[i];
    if (!used(account.name.state)) continue;
    room -= charge(account);
    for (uint32_t j = 0, m = member_rows(account); j < m; ++j) {
      if (i == index && j == member) continue;
      const Member& other = account.members[j];
      bool first = i < index || (i == index && j < member);
      if (first || load(other.demand) == 0) room -= to_come(shared.header, other);
    }
  }
  return room;
}

}  // namespace kvcached::charges
