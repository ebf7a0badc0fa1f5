// The block allocator: which blocks are free, cached or in use, and on which pages they lie.
//
// Every operation costs O(1) for each block that it moves, whatever the size of the pool. Blocks
// are handed out from partly used pages before empty ones: from the one that has least room beyond
// what is wanted, or else from the emptiest, so that blocks which come together lie together and
// whole pages come free and can be unmapped; an empty page goes first only where the emptiest has
// room for a small part of what is wanted. While few pages are partly used, and for want of
// another rule, low pages come first: then little is lost, and pages do not come and go for it. A
// cached block is free for others, but its contents still answer a prefix hit; cached blocks are
// evicted in the order in which they were freed. Not thread-safe: one scheduler owns a pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "id_sets.hpp"
#include "status.hpp"

namespace kvcached {

class Blocks {
 public:
  // The page of block 0 (page 0) is pinned: present from the start and never given up. Block 0 is
  // in use from the start if `reserve_block0`.
  Blocks(int32_t num_blocks, int32_t blocks_per_page, bool reserve_block0);
  static Status validate(int64_t num_blocks, int64_t blocks_per_page);

  // --- blocks. All or nothing; on failure the state is unchanged.
  // Hands out `count` ids: free blocks first, then cached ones, oldest first. kOutOfMemory is the
  // ordinary answer where fewer than `count` are available.
  Status alloc(int64_t count, int32_t* ids);
  // Ends the use of blocks. Where `cached[i]` (nullptr: never), block i keeps its contents.
  Status free(const int32_t* ids, const uint8_t* cached, int64_t count);
  // Takes cached blocks back into use (a prefix hit).
  Status touch(const int32_t* ids, int64_t count);
  // Takes one block that is free or cached into use.
  Status take(int32_t id);
  // Up to `count` of the oldest cached blocks become free; appends their ids.
  void uncache(int64_t count, std::vector<int32_t>& evicted);
  // All cached blocks become free.
  void uncache_all();

  // --- pages.
  // Makes up to `count` of the lowest absent pages present; appends their ids.
  void grow(int64_t count, std::vector<int32_t>& pages);
  Status add_page(int32_t page);
  // Gives up to `count` empty pages, highest first; appends their ids.
  void shrink(int64_t count, std::vector<int32_t>& pages);
  // Gives up to `count` unused pages with cached blocks, longest unused first; appends the pages
  // and the blocks whose contents are lost.
  void reclaim(int64_t count, std::vector<int32_t>& pages, std::vector<int32_t>& evicted);

  // No more than `blocks` are in use by way of alloc: fewer are available than are free. What is
  // in use above the bound stays so. kNoBound lifts it.
  static constexpr int64_t kNoBound = std::numeric_limits<int64_t>::max();
  void set_bound(int64_t blocks) { bound_ = std::max<int64_t>(0, blocks); }
  int64_t bound() const { return bound_; }

  int64_t available() const {
    return std::min(free_ + cached_, std::max<int64_t>(0, bound_ - used_));
  }
  // Blocks since the pool was made: cached ones that were used again, those handed out to be
  // filled, and cached ones lost to that, or to a bound of the cache (not to reclaim).
  int64_t hits() const { return hits_; }
  int64_t misses() const { return misses_; }
  int64_t evictions() const { return evictions_; }
  int64_t free_blocks() const { return free_; }
  int64_t cached_blocks() const { return cached_; }
  int64_t used_blocks() const { return used_; }
  int32_t num_blocks() const { return num_blocks_; }
  int32_t blocks_per_page() const { return blocks_per_page_; }
  int32_t num_pages() const { return num_pages_; }
  int32_t present_pages() const { return present_; }
  int32_t empty_pages() const { return empty_; }
  int32_t idle_pages() const { return idle_; }  // unused, with cached blocks
  bool is_present(int32_t page) const {
    return page >= 0 && page < num_pages_ && present_flag_[page];
  }
  // Blocks of a page that are in use; 0 for a page that does not exist.
  int32_t used_in(int32_t page) const {
    return page >= 0 && page < num_pages_ ? page_used_[page] : 0;
  }
  void free_ids(std::vector<int32_t>& ids) const;  // free, then cached

  // Adds everything up anew; the message names the first thing that does not fit.
  Status check() const;

 private:
  enum State : uint8_t { kFree, kCached, kUsed, kMarked };

  int32_t page_of(int32_t id) const { return id / blocks_per_page_; }
  int32_t page_size(int32_t page) const;
  int32_t free_in_page(int32_t page) const {
    return page_size(page) - page_used_[page] - page_cached_[page];
  }
  Status check_id(int32_t id, State expected, const char* action) const;
  void pop_free(int32_t id_page, int32_t* id);
  void use_cached(int32_t id);
  void unlink_free(int32_t id);
  void push_free(int32_t id);
  void file_page(int32_t page, bool was_idle);
  int32_t bucket_of(int32_t free) const;
  void file_partial(int32_t page, int32_t bucket);
  int32_t page_for(int64_t count) const;
  void drop_page(int32_t page);

  const int32_t num_blocks_;
  const int32_t blocks_per_page_;
  const int32_t num_pages_;
  int64_t free_ = 0, cached_ = 0, used_ = 0;
  int64_t bound_ = kNoBound;
  int64_t hits_ = 0, misses_ = 0, evictions_ = 0;
  int32_t present_ = 0, empty_ = 0, idle_ = 0;
  std::vector<uint8_t> state_;                      // by block
  std::vector<int32_t> free_next_, free_previous_;  // by block: the free list of its page
  std::vector<int32_t> free_head_;                  // by page, -1 where none
  std::vector<int32_t> page_used_, page_cached_;    // by page
  std::vector<uint8_t> present_flag_;               // by page
  OrderedSet partial_;                              // present, some blocks free, some not
  int32_t partial_pages_ = 0;
  // The same pages by how many blocks are free; buckets with a page are bits of `filled_`.
  std::vector<OrderedSet> buckets_;
  uint64_t filled_ = 0;
  std::vector<int8_t> bucket_;  // by page, -1 where not partial
  OrderedSet vacant_;           // present, all blocks free
  OrderedSet absent_;           // not present
  LinkedIds lru_;               // cached blocks, oldest first
  LinkedIds idle_list_;         // unused pages with cached blocks, longest unused first
};

}  // namespace kvcached
