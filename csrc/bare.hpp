// A page in and out with nothing but the backend's own calls: what an arena is measured against.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend.hpp"

namespace kvcached {

// Microseconds of each round.
struct BareTimes {
  std::vector<double> in_us;
  std::vector<double> out_us;
};

// Maps and unmaps one page `rounds` times at a place of its own. With `keep` the page is one
// handle all the time; otherwise each round creates it and releases it again.
Status time_bare_pages(Backend& backend, size_t page_bytes, int64_t rounds, bool keep,
                       BareTimes* times);

}  // namespace kvcached
