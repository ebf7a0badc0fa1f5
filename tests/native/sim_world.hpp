// The world of a simulation: processes are started, told what to do, killed; the ledger's settings
// change; and after each turn everything is added up.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sim_process.hpp"

namespace kvcached::test {

struct Options {
  std::string backend = "host";
  int64_t steps = 10000;  // of each seed
};

struct Totals {
  int64_t steps = 0, turns = 0, started = 0, left = 0, turned_away = 0, failed_steps = 0;
  int64_t killed_between = 0, killed_within = 0, killed_with_lock = 0;
  int64_t calls = 0, refusals = 0, granted = 0, refused = 0, forks = 0, settings = 0, storms = 0;
  int64_t reaps = 0, steals = 0, timeouts = 0;
  uint64_t digest = 0;  // of all that happened
};

class World {
 public:
  World(uint64_t seed, Options options);
  // Ends the process where something does not hold.
  void run(Totals& totals);

 private:
  struct Living {
    Spec spec;
    pid_t pid = 0;
    int orders = -1, reports = -1;
    int64_t clock_ns = 0;
    int64_t frozen_until = 0;  // it is not given a turn before this one
    Report last;
  };

  void act();
  void start_one();
  void turn(size_t which, Turn order);
  void turn_at_random();
  void storm();
  void operate();
  void kill_one(size_t which);
  bool receive(Living& living, bool may_die);
  void bury(size_t which);
  void count(const Report& before, const Report& after);
  void end();

  void check();
  void check_account(const AccountView& account);
  void tell(const AccountView& account) const;
  void check_kernel();
  void mix(uint64_t value) { digest_ = (digest_ ^ value) * 1099511628211u; }
  void settle_capacity();

  const uint64_t seed_;
  const Options options_;
  Dice dice_;
  std::string folder_;
  const std::string device_ = "host:simulation";
  int64_t unit_ = 4096;
  std::shared_ptr<Segment> segment_;
  std::vector<Living> living_;
  Totals totals_;
  int64_t most_lendable_ = 0;
  uint64_t next_tag_ = 1;
  uint64_t digest_ = 1469598103934665603u;
};

}  // namespace kvcached::test
