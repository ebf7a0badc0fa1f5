#include "id_sets.hpp"

namespace kvcached {

OrderedSet::OrderedSet(int32_t capacity) {
  std::size_t words = capacity;
  do {
    words = (words + 63) / 64;
    levels_.emplace_back(words, 0);
  } while (words > 1);
}

void OrderedSet::insert(int32_t value) {
  for (auto& level : levels_) {
    uint64_t& word = level[value >> 6];
    const bool was_empty = word == 0;
    word |= uint64_t{1} << (value & 63);
    if (!was_empty) return;
    value >>= 6;
  }
}

void OrderedSet::erase(int32_t value) {
  for (auto& level : levels_) {
    uint64_t& word = level[value >> 6];
    word &= ~(uint64_t{1} << (value & 63));
    if (word != 0) return;
    value >>= 6;
  }
}

int32_t OrderedSet::first() const {
  if (levels_.back()[0] == 0) return -1;
  int32_t index = 0;
  for (auto level = levels_.rbegin(); level != levels_.rend(); ++level)
    index = index * 64 + __builtin_ctzll((*level)[index]);
  return index;
}

int32_t OrderedSet::last() const {
  if (levels_.back()[0] == 0) return -1;
  int32_t index = 0;
  for (auto level = levels_.rbegin(); level != levels_.rend(); ++level)
    index = index * 64 + 63 - __builtin_clzll((*level)[index]);
  return index;
}

LinkedIds::LinkedIds(int32_t capacity)
    : sentinel_(capacity), next_(capacity + 1, -1), previous_(capacity + 1, -1) {
  next_[sentinel_] = previous_[sentinel_] = sentinel_;
}

void LinkedIds::push_back(int32_t id) {
  const int32_t tail = previous_[sentinel_];
  next_[tail] = id;
  previous_[id] = tail;
  next_[id] = sentinel_;
  previous_[sentinel_] = id;
}

void LinkedIds::erase(int32_t id) {
  next_[previous_[id]] = next_[id];
  previous_[next_[id]] = previous_[id];
}

}  // namespace kvcached
