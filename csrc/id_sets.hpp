// Sets and lists of block and page ids whose operations cost the same at any size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvcached {

// A set of small integers that finds its lowest or highest member in a few steps (a tree of
// 64-bit words: four levels cover sixteen million).
class OrderedSet {
 public:
  explicit OrderedSet(int32_t capacity);
  void insert(int32_t value);
  void erase(int32_t value);
  bool contains(int32_t value) const { return (levels_[0][value >> 6] >> (value & 63)) & 1; }
  int32_t first() const;  // -1 where empty
  int32_t last() const;   // -1 where empty

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

// Doubly linked lists threaded through arrays, indexed by block or page id.
class LinkedIds {
 public:
  explicit LinkedIds(int32_t capacity);
  void push_back(int32_t id);
  void erase(int32_t id);
  int32_t front() const { return next_[sentinel_] == sentinel_ ? -1 : next_[sentinel_]; }
  int32_t after(int32_t id) const { return next_[id] == sentinel_ ? -1 : next_[id]; }

 private:
  int32_t sentinel_;
  std::vector<int32_t> next_;
  std::vector<int32_t> previous_;
};

}  // namespace kvcached
