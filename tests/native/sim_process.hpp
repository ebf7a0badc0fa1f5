// One process of a simulated instance: a real process, on the real core, that does as it is told
// over a pipe, so that nothing happens twice at once and a run repeats exactly.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "account.hpp"
#include "arena.hpp"
#include "blocks.hpp"
#include "mapper.hpp"
#include "segment.hpp"
#include "sim_backend.hpp"
#include "sim_memory.hpp"
#include "support.hpp"

namespace kvcached::test {

// What a process is.
struct Spec {
  std::string folder, device, instance, backend;
  bool owner = true;  // schedules for the instance; otherwise it only maps, as a second rank does
  int64_t pages = 24;
  int32_t blocks_per_page = 4;
  size_t regions = 1;
  size_t chunk = 4096;  // bytes of a page in each region
  uint64_t tag = 1;     // marks what this process writes, as nobody else's
  int64_t page_bytes() const { return static_cast<int64_t>(regions * chunk); }
};

enum class Order : uint32_t {
  kRun,          // steps, chosen by the seed
  kStorm,        // wants all memory that there is
  kRelieve,      // gives back everything that it does not use
  kClose,        // leaves as an engine does that is shut down
  kDieWithLock,  // is killed while it holds the ledger's lock
};

struct Turn {
  Order order = Order::kRun;
  uint32_t steps = 0;
  uint64_t seed = 0;
  uint32_t die_step = 0;  // of these steps, counted from 1: at the driver call that `die` names,
  int64_t die_call = 0;   // or, where the step makes fewer, at its end
  uint32_t die_after = 0;
  int64_t clock_ns = 0;  // what its clock is off by from now on
};

struct Report {
  uint32_t steps = 0;
  uint32_t closed = 0;   // it has left
  uint32_t started = 0;  // its pinned page is mapped
  uint32_t owner = 0;
  int32_t memory_fd = -1;
  int64_t created = 0;      // bytes that exist
  int64_t held = 0;         // bytes booked for it
  int64_t leased_only = 0;  // bytes that its owner has leased and nobody has booked
  int64_t quarantined = 0;
  int64_t calls = 0, refusals = 0;  // of the backend
  int64_t granted = 0, refused = 0, forks = 0, broken = 0;
  uint64_t digest = 0;
};

class Process {
 public:
  explicit Process(Spec spec) : spec_(std::move(spec)), pattern_(0) {}
  // Serves until the orders end. Never returns.
  [[noreturn]] void serve(int orders, int reports);

 private:
  // --- coming and going (sim_process.cpp)
  bool join_ledger();
  bool start();
  void close();
  void carry_out(const Turn& turn, Report& report);
  [[noreturn]] void die_with_lock();
  void report_on(Report& report);

  // --- steps (sim_steps.cpp)
  void step(Dice& dice);
  void choose(Dice& dice);
  void allocate(Dice& dice, int64_t count);
  bool grow(int64_t pages);
  void free_group(Dice& dice);
  void touch_group(Dice& dice);
  void give_up(int64_t pages);
  void lose(const std::vector<int32_t>& blocks);
  void ask_ledger(Dice& dice);
  void lease_what_is_leasable();
  void set_aside(Dice& dice);
  void fork_a_child();
  void storm();
  void relieve();

  // --- mapping (sim_steps.cpp)
  void flush();
  void settle();
  void work(Dice& dice);
  bool is_needed(int64_t page) const { return blocks_->used_in(static_cast<int32_t>(page)) > 0; }

  // --- what must hold (sim_checks.cpp)
  void check(int64_t total_before, int64_t lent_before);
  void check_books();
  void check_kernel();
  void check_places();
  void check_contents(bool everything);
  void check_block(int32_t block, bool everything);
  void write_block(int32_t block);
  void check_fresh(int32_t block);
  size_t words_at_an_end() const;
  std::vector<uint64_t> read_ends(int32_t block, size_t words) const;  // of every region, in order
  uint64_t pattern(int32_t block) const;
  uintptr_t address_of(int32_t block, size_t region) const;
  size_t block_bytes() const {
    return spec_.chunk / static_cast<size_t>(spec_.blocks_per_page) / 16 * 16;
  }
  int64_t total_charge() const;
  int64_t lent() const;

  const Spec spec_;
  std::shared_ptr<Segment> segment_;
  std::shared_ptr<MemberHandle> member_;
  std::unique_ptr<AccountHandle> account_;  // null: only a member
  std::shared_ptr<SimBackend> backend_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<Mapper> mapper_;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<Blocks> blocks_;
  const layout::Shared* file_ = nullptr;  // for looking only

  bool started_ = false, closed_ = false, broken_ = false;
  int memory_fd_ = -1;
  int64_t steps_ = 0;
  Plan plan_;  // of the step that is under way
  int64_t clock_ns_ = 0;
  uint64_t pattern_;
  std::vector<uint64_t> contents_;            // by block: its pattern; 0 where it has none
  std::vector<std::vector<int32_t>> used_;    // what requests hold
  std::vector<std::vector<int32_t>> cached_;  // what they have left behind
  std::set<int64_t> to_map_;                  // leased, and not told to the mapper
  std::vector<int64_t> to_unmap_;
  std::set<int64_t> wanted_;  // told to the mapper
  int64_t granted_ = 0, refused_ = 0, forks_ = 0;
};

// The clock of the calling thread is off by so much.
void set_clock(int64_t offset_ns);

}  // namespace kvcached::test
