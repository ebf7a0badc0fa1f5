// What the programs of this folder share: giving up in words, dice that repeat, a folder.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "status.hpp"

namespace kvcached::test {

// Ends the process where something that must hold does not. _Exit: other threads may be at work.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("violation: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::fflush(nullptr);
  std::abort();
}

inline void must(const Status& status, const char* what) {
  if (!status) fail("%s: %s", what, status.message().c_str());
}

// The same numbers on every machine (splitmix64): the standard's distributions differ.
class Dice {
 public:
  explicit Dice(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t bound) {
    return static_cast<int64_t>(next() % static_cast<uint64_t>(bound));
  }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(double part) { return static_cast<double>(next() >> 11) * 0x1.0p-53 < part; }

 private:
  uint64_t state_;
};

// A new folder in memory where there is some; the caller removes it.
inline std::string make_folder(const char* name) {
  for (const char* parent : {"/dev/shm", "/tmp"}) {
    std::string path = std::string(parent) + "/kvcached-" + name + "-XXXXXX";
    if (mkdtemp(path.data()) != nullptr) return path;
  }
  fail("no folder for the ledger");
}

}  // namespace kvcached::test
