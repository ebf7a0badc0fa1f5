#include "blocks.hpp"

#include <string>

namespace kvcached {
namespace {

constexpr int32_t kBuckets = 64;  // bits of a word
// So many partly used pages lose so little that which of them is filled first does not matter.
constexpr int32_t kFewPages = 8;
// A page without room for this part of what is wanted is left to those who want less.
constexpr int64_t kScrap = 5;

}  // namespace

Status Blocks::validate(int64_t num_blocks, int64_t blocks_per_page) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (num_blocks <= 0 || num_blocks > kMost)
    return {Code::kInvalidArgument, "num_blocks=" + std::to_string(num_blocks) +
                                        ": expected 1 to " + std::to_string(kMost)};
  if (blocks_per_page <= 0 || blocks_per_page > num_blocks)
    return {Code::kInvalidArgument, "blocks_per_page=" + std::to_string(blocks_per_page) +
                                        ": expected 1 to num_blocks=" + std::to_string(num_blocks)};
  return Status::ok();
}

Blocks::Blocks(int32_t num_blocks, int32_t blocks_per_page, bool reserve_block0)
    : num_blocks_(num_blocks),
      blocks_per_page_(blocks_per_page),
      num_pages_((num_blocks + blocks_per_page - 1) / blocks_per_page),
      state_(num_blocks, kFree),
      free_next_(num_blocks, -1),
      free_previous_(num_blocks, -1),
      free_head_(num_pages_, -1),
      page_used_(num_pages_, 0),
      page_cached_(num_pages_, 0),
      present_flag_(num_pages_, 0),
      partial_(num_pages_),
      buckets_(std::min(blocks_per_page, kBuckets), OrderedSet(num_pages_)),
      bucket_(num_pages_, -1),
      vacant_(num_pages_),
      absent_(num_pages_),
      lru_(num_blocks),
      idle_list_(num_pages_) {
  for (int32_t page = 0; page < num_pages_; ++page) absent_.insert(page);
  (void)add_page(0);
  if (reserve_block0) (void)take(0);
}

int32_t Blocks::page_size(int32_t page) const {
  const int32_t rest = num_blocks_ - page * blocks_per_page_;
  return rest < blocks_per_page_ ? rest : blocks_per_page_;
}

Status Blocks::check_id(int32_t id, State expected, const char* action) const {
  if (id < 0 || id >= num_blocks_)
    return {Code::kInvalidArgument, std::string("cannot ") + action + " block " +
                                        std::to_string(id) + ": the pool has blocks 0 to " +
                                        std::to_string(num_blocks_ - 1)};
  if (!present_flag_[page_of(id)])
    return {Code::kInvalidArgument, std::string("cannot ") + action + " block " +
                                        std::to_string(id) + ": its page is not mapped"};
  if (state_[id] == expected) return Status::ok();
  static const char* const kNames[] = {"free", "cached", "in use", "named twice in this call"};
  return {Code::kInvalidArgument, std::string("cannot ") + action + " block " + std::to_string(id) +
                                      ": it is " + kNames[state_[id]]};
}

// Keeps the sets and lists of pages in step after a page's counts changed.
void Blocks::file_page(int32_t page, bool was_idle) {
  const int32_t size = page_size(page);
  const int32_t busy = page_used_[page] + page_cached_[page];
  const bool vacant = busy == 0;
  if (vacant != vacant_.contains(page)) {
    if (vacant) {
      vacant_.insert(page);
      ++empty_;
    } else {
      vacant_.erase(page);
      --empty_;
    }
  }
  file_partial(page, busy > 0 && busy < size ? bucket_of(size - busy) : -1);
  const bool idle = page_used_[page] == 0 && page_cached_[page] > 0;
  if (idle != was_idle) {
    if (idle) {
      idle_list_.push_back(page);
      ++idle_;
    } else {
      idle_list_.erase(page);
      --idle_;
    }
  }
}

// Where a page with so many free blocks is filed: one number a bucket, several for large pages.
int32_t Blocks::bucket_of(int32_t free) const {
  if (blocks_per_page_ <= kBuckets) return free - 1;
  return static_cast<int32_t>(int64_t{free - 1} * kBuckets / blocks_per_page_);
}

void Blocks::file_partial(int32_t page, int32_t bucket) {
  const int32_t before = bucket_[page];
  if (before == bucket) return;
  if (before >= 0) {
    buckets_[before].erase(page);
    if (buckets_[before].first() < 0) filled_ &= ~(uint64_t{1} << before);
  } else {
    partial_.insert(page);
    ++partial_pages_;
  }
  if (bucket >= 0) {
    buckets_[bucket].insert(page);
    filled_ |= uint64_t{1} << bucket;
  } else {
    partial_.erase(page);
    --partial_pages_;
  }
  bucket_[page] = static_cast<int8_t>(bucket);
}

// The page to fill when `count` blocks are wanted; -1 where none has a free one.
int32_t Blocks::page_for(int64_t count) const {
  if (partial_pages_ == 0) return vacant_.first();
  if (partial_pages_ <= kFewPages) return partial_.first();
  const auto wanted = static_cast<int32_t>(std::min<int64_t>(count, blocks_per_page_));
  const uint64_t roomy = filled_ >> bucket_of(wanted) << bucket_of(wanted);
  if (roomy != 0) return buckets_[__builtin_ctzll(roomy)].first();
  const int32_t emptiest = buckets_[63 - __builtin_clzll(filled_)].first();
  return empty_ > 0 && free_in_page(emptiest) * kScrap < wanted ? vacant_.first() : emptiest;
}

void Blocks::push_free(int32_t id) {
  const int32_t page = page_of(id);
  const int32_t head = free_head_[page];
  free_next_[id] = head;
  free_previous_[id] = -1;
  if (head >= 0) free_previous_[head] = id;
  free_head_[page] = id;
  state_[id] = kFree;
  ++free_;
}

void Blocks::unlink_free(int32_t id) {
  const int32_t next = free_next_[id], previous = free_previous_[id];
  if (next >= 0) free_previous_[next] = previous;
  if (previous >= 0)
    free_next_[previous] = next;
  else
    free_head_[page_of(id)] = next;
  --free_;
}

Status Blocks::take(int32_t id) {
  if (id >= 0 && id < num_blocks_ && state_[id] == kCached) return touch(&id, 1);
  Status status = check_id(id, kFree, "take");
  if (!status) return status;
  const int32_t page = page_of(id);
  unlink_free(id);
  state_[id] = kUsed;
  ++used_;
  const bool was_idle = page_used_[page] == 0 && page_cached_[page] > 0;
  ++page_used_[page];
  file_page(page, was_idle);
  return Status::ok();
}

Status Blocks::alloc(int64_t count, int32_t* ids) {
  if (count <= 0 || count > num_blocks_)
    return {Code::kInvalidArgument, "cannot allocate " + std::to_string(count) +
                                        " blocks: expected 1 to " + std::to_string(num_blocks_)};
  if (count > available())
    return {Code::kOutOfMemory, std::to_string(count) + " blocks wanted, " +
                                    std::to_string(available()) + " available"};
  int64_t done = 0;
  while (done < count && free_ > 0) {
    const int32_t page = page_for(count - done);
    const bool was_idle = page_used_[page] == 0 && page_cached_[page] > 0;
    // Everything wanted from this page in one go: its bookkeeping is done once.
    int32_t id = free_head_[page], taken = 0;
    for (; id >= 0 && done < count; ++taken) {
      ids[done++] = id;
      state_[id] = kUsed;
      id = free_next_[id];
    }
    free_head_[page] = id;
    if (id >= 0) free_previous_[id] = -1;
    free_ -= taken;
    used_ += taken;
    page_used_[page] += taken;
    file_page(page, was_idle);
  }
  for (; done < count; ++done) {
    ids[done] = lru_.front();
    use_cached(ids[done]);
    ++evictions_;
  }
  misses_ += count;
  return Status::ok();
}

void Blocks::use_cached(int32_t id) {
  const int32_t page = page_of(id);
  const bool was_idle = page_used_[page] == 0;
  lru_.erase(id);
  state_[id] = kUsed;
  --page_cached_[page];
  --cached_;
  ++page_used_[page];
  ++used_;
  file_page(page, was_idle);
}

Status Blocks::free(const int32_t* ids, const uint8_t* cached, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Status status = check_id(ids[i], kUsed, "free");
    if (!status) {
      while (i-- > 0) state_[ids[i]] = kUsed;
      return status;
    }
    state_[ids[i]] = kMarked;
  }
  for (int64_t i = 0; i < count;) {
    const int32_t page = page_of(ids[i]);
    // Neighbours in the list mostly lie on one page: its bookkeeping is done once for them all.
    const int32_t first = page * blocks_per_page_, end = first + blocks_per_page_;
    for (; i < count && ids[i] >= first && ids[i] < end; ++i) {
      const int32_t id = ids[i];
      --page_used_[page];
      --used_;
      if (cached != nullptr && cached[i]) {
        state_[id] = kCached;
        lru_.push_back(id);
        ++page_cached_[page];
        ++cached_;
      } else {
        push_free(id);
      }
    }
    file_page(page, false);  // it held a used block, so it was not idle
  }
  return Status::ok();
}

Status Blocks::touch(const int32_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Status status = check_id(ids[i], kCached, "touch");
    if (!status) {
      while (i-- > 0) state_[ids[i]] = kCached;
      return status;
    }
    state_[ids[i]] = kMarked;
  }
  for (int64_t i = 0; i < count; ++i) use_cached(ids[i]);
  hits_ += count;
  return Status::ok();
}

void Blocks::uncache(int64_t count, std::vector<int32_t>& evicted) {
  for (int32_t id = lru_.front(); id >= 0 && count > 0; id = lru_.front(), --count) {
    const int32_t page = page_of(id);
    const bool was_idle = page_used_[page] == 0;
    lru_.erase(id);
    --page_cached_[page];
    --cached_;
    push_free(id);
    file_page(page, was_idle);
    evicted.push_back(id);
    ++evictions_;
  }
}

void Blocks::uncache_all() {
  std::vector<int32_t> evicted;
  const int64_t evictions = evictions_;
  uncache(cached_, evicted);
  evictions_ = evictions;  // who empties the cache does not want for blocks
}

Status Blocks::add_page(int32_t page) {
  if (page < 0 || page >= num_pages_)
    return {Code::kInvalidArgument, "page " + std::to_string(page) + ": the pool has pages 0 to " +
                                        std::to_string(num_pages_ - 1)};
  if (present_flag_[page])
    return {Code::kInvalidArgument, "page " + std::to_string(page) + " is present already"};
  absent_.erase(page);
  present_flag_[page] = 1;
  ++present_;
  const int32_t first = page * blocks_per_page_;
  for (int32_t id = first + page_size(page) - 1; id >= first; --id) push_free(id);
  file_page(page, false);
  return Status::ok();
}

void Blocks::grow(int64_t count, std::vector<int32_t>& pages) {
  for (; count > 0; --count) {
    const int32_t page = absent_.first();
    if (page < 0) return;
    (void)add_page(page);
    pages.push_back(page);
  }
}

void Blocks::drop_page(int32_t page) {
  vacant_.erase(page);
  --empty_;
  free_ -= page_size(page);
  free_head_[page] = -1;
  present_flag_[page] = 0;
  --present_;
  absent_.insert(page);
}

void Blocks::shrink(int64_t count, std::vector<int32_t>& pages) {
  for (; count > 0; --count) {
    const int32_t page = vacant_.last();
    if (page <= 0) return;  // page 0 is pinned
    drop_page(page);
    pages.push_back(page);
  }
}

void Blocks::reclaim(int64_t count, std::vector<int32_t>& pages, std::vector<int32_t>& evicted) {
  int32_t page = idle_list_.front();
  while (count > 0 && page >= 0) {
    const int32_t next = idle_list_.after(page);
    if (page != 0) {
      const int32_t first = page * blocks_per_page_;
      for (int32_t id = first; id < first + page_size(page); ++id) {
        if (state_[id] != kCached) continue;
        lru_.erase(id);
        --page_cached_[page];
        --cached_;
        push_free(id);
        evicted.push_back(id);
      }
      file_page(page, true);
      drop_page(page);
      pages.push_back(page);
      --count;
    }
    page = next;
  }
}

void Blocks::free_ids(std::vector<int32_t>& ids) const {
  for (const bool vacant : {false, true})
    for (int32_t page = 0; page < num_pages_; ++page)
      if (vacant ? vacant_.contains(page) : partial_.contains(page))
        for (int32_t id = free_head_[page]; id >= 0; id = free_next_[id]) ids.push_back(id);
  for (int32_t id = lru_.front(); id >= 0; id = lru_.after(id)) ids.push_back(id);
}

Status Blocks::check() const {
  const auto wrong = [](const std::string& what) {
    return Status(Code::kInvalidArgument, "integrity: " + what);
  };
  int64_t free = 0, cached = 0, used = 0;
  int32_t present = 0, empty = 0, idle = 0, partial = 0;
  for (int32_t page = 0; page < num_pages_; ++page) {
    const std::string name = "page " + std::to_string(page);
    if (present_flag_[page] == absent_.contains(page)) return wrong(name + " in the wrong set");
    int32_t count[4] = {0, 0, 0, 0};
    const int32_t first = page * blocks_per_page_;
    for (int32_t id = first; id < first + page_size(page); ++id) ++count[state_[id]];
    if (!present_flag_[page]) {
      if (count[kUsed] + count[kCached] + count[kMarked] > 0) return wrong(name + " lost blocks");
      continue;
    }
    int32_t listed = 0;
    for (int32_t id = free_head_[page]; id >= 0; id = free_next_[id]) {
      if (state_[id] != kFree || page_of(id) != page || ++listed > count[kFree])
        return wrong(name + ": its free list is broken at block " + std::to_string(id));
    }
    if (listed != count[kFree] || count[kMarked] > 0 || count[kUsed] != page_used_[page] ||
        count[kCached] != page_cached_[page])
      return wrong(name + ": its counts do not add up");
    const bool vacant = count[kFree] == page_size(page);
    const int32_t bucket = vacant || count[kFree] == 0 ? -1 : bucket_of(count[kFree]);
    if (vacant != vacant_.contains(page) || (bucket >= 0) != partial_.contains(page) ||
        bucket != bucket_[page] ||
        (bucket >= 0 && !(buckets_[bucket].contains(page) && (filled_ >> bucket & 1) != 0)))
      return wrong(name + " in the wrong set of free pages");
    free += count[kFree], cached += count[kCached], used += count[kUsed];
    ++present, empty += vacant, partial += bucket >= 0;
    idle += count[kUsed] == 0 && count[kCached] > 0;
  }
  int64_t in_lru = 0;
  for (int32_t id = lru_.front(); id >= 0; id = lru_.after(id)) in_lru += state_[id] == kCached;
  int32_t in_idle = 0;
  for (int32_t page = idle_list_.front(); page >= 0; page = idle_list_.after(page)) ++in_idle;
  if (free != free_ || cached != cached_ || used != used_ || in_lru != cached_)
    return wrong("blocks do not add up");
  if (present != present_ || partial != partial_pages_ || empty != empty_ || idle != idle_ ||
      in_idle != idle_)
    return wrong("pages do not add up");
  return Status::ok();
}

}  // namespace kvcached
