// Many instances on the real core and ledger, as real processes that are really killed, one step at
// a time: a seed is a run, and a run repeats exactly. See docs/reliability.md.
//
//   simulate [--seed FIRST] [--seeds COUNT] [--steps STEPS] [--seconds S] [--backend host|cuda]
//
// Runs COUNT seeds of STEPS steps each; with --seconds as many seeds as fit. Prints one line of
// JSON, or the violation and the seed, and exits 1.
#include <signal.h>

#include <chrono>
#include <cstring>

#include "sim_world.hpp"

namespace kvcached::test {
namespace {

struct Request {
  uint64_t first = 1;
  int64_t seeds = 1;
  double seconds = 0;
  Options options;
};

Request parse(int count, char** arguments) {
  Request request;
  for (int i = 1; i < count; i += 2) {
    const char* name = arguments[i];
    const char* value = i + 1 < count ? arguments[i + 1] : nullptr;
    const auto is = [&](const char* wanted) { return std::strcmp(name, wanted) == 0; };
    if (value == nullptr) fail("%s: a value is missing", name);
    if (is("--seed")) {
      request.first = std::strtoull(value, nullptr, 10);
    } else if (is("--seeds")) {
      request.seeds = std::atoll(value);
    } else if (is("--steps")) {
      request.options.steps = std::atoll(value);
    } else if (is("--seconds")) {
      request.seconds = std::atof(value);
    } else if (is("--backend")) {
      request.options.backend = value;
    } else {
      fail("%s: unknown", name);
    }
  }
  const std::string& backend = request.options.backend;
  if (backend != "host" && backend != "cuda") fail("--backend: host or cuda");
  return request;
}

int simulate(const Request& request) {
  signal(SIGPIPE, SIG_IGN);
  const auto start = std::chrono::steady_clock::now();
  const auto passed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  Totals totals;
  int64_t seeds = 0;
  while (request.seconds > 0 ? passed() < request.seconds : seeds < request.seeds) {
    World(request.first + static_cast<uint64_t>(seeds), request.options).run(totals);
    ++seeds;
  }
  const double seconds = passed();
  std::printf(
      "{\"backend\": \"%s\", \"first_seed\": %lu, \"seeds\": %ld, \"steps\": %ld, "
      "\"seconds\": %.1f, \"steps_per_s\": %.0f, \"turns\": %ld, \"started\": %ld, "
      "\"turned_away\": %ld, \"left\": %ld, \"failed_steps\": %ld, \"killed_between_steps\": %ld, "
      "\"killed_at_a_call\": %ld, \"killed_with_the_lock\": %ld, \"calls\": %ld, "
      "\"calls_refused\": %ld, \"leases\": %ld, \"leases_refused\": %ld, \"forks\": %ld, "
      "\"settings\": %ld, \"storms\": %ld, \"rows_reaped\": %ld, \"locks_stolen\": %ld, "
      "\"lock_timeouts\": %ld, \"digest\": \"%016lx\"}\n",
      request.options.backend.c_str(), request.first, (long)seeds, (long)totals.steps, seconds,
      static_cast<double>(totals.steps) / seconds, (long)totals.turns, (long)totals.started,
      (long)totals.turned_away, (long)totals.left, (long)totals.failed_steps,
      (long)totals.killed_between, (long)totals.killed_within, (long)totals.killed_with_lock,
      (long)totals.calls, (long)totals.refusals, (long)totals.granted, (long)totals.refused,
      (long)totals.forks, (long)totals.settings, (long)totals.storms, (long)totals.reaps,
      (long)totals.steals, (long)totals.timeouts, totals.digest);
  return 0;
}

}  // namespace
}  // namespace kvcached::test

int main(int count, char** arguments) {
  return kvcached::test::simulate(kvcached::test::parse(count, arguments));
}
