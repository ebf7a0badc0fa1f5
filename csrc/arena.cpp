#include "arena.hpp"

#include <algorithm>
#include <utility>

namespace kvcached {
namespace {

Status invalid(const std::string& message) {
  return {Code::kInvalidArgument, "arena: " + message};
}

Status check_region(const Region& region, const ArenaOptions& options, size_t granularity) {
  const std::string name = "region at offset " + std::to_string(region.offset);
  if (region.chunk == 0 || region.chunk % granularity != 0 || region.offset % granularity != 0) {
    return invalid(name + " with " + std::to_string(region.chunk) +
                   " bytes a page: both must be multiples of the granularity of " +
                   std::to_string(granularity) + " bytes");
  }
  if (region.offset > options.size ||
      (options.size - region.offset) / region.chunk < static_cast<size_t>(options.pages)) {
    return invalid(name + ": " + std::to_string(options.pages) + " pages of " +
                   std::to_string(region.chunk) + " bytes do not fit into " +
                   std::to_string(options.size) + " bytes");
  }
  return Status::ok();
}

Status check_options(const ArenaOptions& options, size_t granularity) {
  if (options.pages <= 0 || options.size == 0 || options.size % granularity != 0) {
    return invalid("it needs at least one page and a size that is a multiple of " +
                   std::to_string(granularity) + " bytes, got " + std::to_string(options.pages) +
                   " pages and " + std::to_string(options.size) + " bytes");
  }
  if (options.regions.empty()) return invalid("it needs at least one region");
  std::vector<Region> sorted = options.regions;
  std::sort(sorted.begin(), sorted.end(),
            [](const Region& a, const Region& b) { return a.offset < b.offset; });
  size_t end = 0;
  for (const Region& region : sorted) {
    Status status = check_region(region, options, granularity);
    if (!status.is_ok()) return status;
    if (region.offset < end) {
      return invalid("region at offset " + std::to_string(region.offset) +
                     " overlaps the one before it, which ends at " + std::to_string(end));
    }
    end = region.offset + region.chunk * static_cast<size_t>(options.pages);
  }
  return Status::ok();
}

}  // namespace

Status Arena::open(std::shared_ptr<Backend> backend, ArenaOptions options,
                   std::unique_ptr<Arena>* arena) {
  if (backend->inherited()) {
    return invalid("its backend was made before fork(); make a new one in this process");
  }
  Status status = check_options(options, backend->granularity());
  if (!status.is_ok()) return status;
  std::unique_ptr<Arena> made(new Arena(std::move(backend), std::move(options)));
  status = made->reservation_.open(made->backend_, made->options_.size);
  if (status.is_ok() && made->options_.zero_holes) {
    CallScope calls(*made->backend_);
    status = made->cover_.open(made->address(), made->options_.regions, made->options_.pages);
  }
  if (status.is_ok()) *arena = std::move(made);
  return status;
}

Arena::Arena(std::shared_ptr<Backend> backend, ArenaOptions options)
    : backend_(std::move(backend)),
      options_(std::move(options)),
      cover_(backend_),
      store_(backend_, options_.pool_bytes, options_.zero_holes ? &cover_ : nullptr),
      pages_(static_cast<size_t>(options_.pages)) {
  for (const Region& region : options_.regions) page_bytes_ += region.chunk;
}

Arena::~Arena() {
  if (backend_->inherited()) return;
  CallScope calls(*backend_);
  store_.leave_holes();
  pages_.clear();
  store_.close();
  // Addresses with a mapping that will not go away are better leaked than handed to someone else.
  if (!cover_.close() || store_.is_stuck(address(), size())) reservation_.abandon();
}

Status Arena::check_process() const {
  if (!backend_->inherited()) return Status::ok();
  return invalid("it belongs to the process that this one was forked from");
}

Status Arena::record_fence(uintptr_t stream, Fence* fence) const {
  Status status = check_process();
  return status.is_ok() ? Fence::record(backend_, stream, fence) : status;
}

Status Arena::check_pages(const std::vector<int64_t>& pages, bool mapped) const {
  for (const int64_t page : pages) {
    if (page < 0 || page >= options_.pages) {
      return invalid("page " + std::to_string(page) + " is outside 0.." +
                     std::to_string(options_.pages - 1));
    }
    if (pages_[static_cast<size_t>(page)].empty() == mapped) {
      return invalid("page " + std::to_string(page) +
                     (mapped ? " is not mapped" : " is mapped already"));
    }
  }
  if (pages.size() < 2) return Status::ok();
  std::vector<int64_t> sorted = pages;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice == sorted.end()) return Status::ok();
  return invalid("page " + std::to_string(*twice) + " is named twice in one call");
}

Status Arena::map_page(int64_t page, Page* mappings) {
  mappings->reserve(options_.regions.size());
  for (const Region& region : options_.regions) {
    const uintptr_t place = address() + region.offset + static_cast<size_t>(page) * region.chunk;
    if (store_.is_stuck(place, region.chunk)) {
      return {Code::kDriver,
              "page " + std::to_string(page) + " is in quarantine: " + store_.last_failure()};
    }
    PageHandle handle;
    Status status = store_.acquire(region.chunk, &handle);
    if (status.is_ok()) status = store_.place(std::move(handle), place, mappings);
    if (!status.is_ok()) {
      return {status.code(), "page " + std::to_string(page) + ": " + status.message()};
    }
  }
  return Status::ok();
}

Status Arena::map(const std::vector<int64_t>& pages, int64_t* grown) {
  *grown = 0;
  Status status = check_process();
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  status = check_pages(pages, false);
  if (!status.is_ok()) return status;
  CallScope calls(*backend_);
  const int64_t before = created();
  store_.retry();
  {
    std::vector<Page> fresh(pages.size());  // dies with its mappings if a page fails
    for (size_t i = 0; i < pages.size() && status.is_ok(); ++i) {
      status = map_page(pages[i], &fresh[i]);
    }
    if (status.is_ok()) {
      for (size_t i = 0; i < pages.size(); ++i) {
        pages_[static_cast<size_t>(pages[i])] = std::move(fresh[i]);
      }
      mapped_pages_ += static_cast<int64_t>(pages.size());
    }
  }
  *grown = created() - before;
  return status;
}

Status Arena::unmap(const std::vector<int64_t>& pages, int64_t* released) {
  *released = 0;
  Status status = check_process();
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  status = check_pages(pages, true);
  if (!status.is_ok()) return status;
  CallScope calls(*backend_);
  const int64_t before = created();
  store_.retry();
  for (const int64_t page : pages) Page().swap(pages_[static_cast<size_t>(page)]);
  mapped_pages_ -= static_cast<int64_t>(pages.size());
  *released = before - created();
  return status;
}

Status Arena::trim(size_t keep_bytes, int64_t* released) {
  *released = 0;
  Status status = check_process();
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  CallScope calls(*backend_);
  const int64_t before = created();
  store_.retry();
  store_.trim(keep_bytes);
  *released = before - created();
  return status;
}

Status Arena::retry_quarantine(int64_t* released) {
  *released = 0;
  Status status = check_process();
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  CallScope calls(*backend_);
  const int64_t before = created();
  store_.retry();
  *released = before - created();
  return status;
}

Status Arena::uncover(int64_t* released) {
  *released = 0;
  Status status = check_process();
  if (!status.is_ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  CallScope calls(*backend_);
  const int64_t before = created();
  store_.leave_holes();
  const bool gone = cover_.close();
  *released = before - created();
  if (gone) return status;
  return {Code::kDriver, "arena: the driver keeps zeros mapped that nobody needs"};
}

Status Arena::is_mapped(int64_t page, bool* mapped) const {
  if (page < 0 || page >= options_.pages) {
    return invalid("page " + std::to_string(page) + " is outside 0.." +
                   std::to_string(options_.pages - 1));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  *mapped = !pages_[static_cast<size_t>(page)].empty();
  return Status::ok();
}

std::vector<int64_t> Arena::mapped_pages() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> mapped;
  mapped.reserve(static_cast<size_t>(mapped_pages_));
  for (size_t page = 0; page < pages_.size(); ++page) {
    if (!pages_[page].empty()) mapped.push_back(static_cast<int64_t>(page));
  }
  return mapped;
}

size_t Arena::created_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<size_t>(created());
}

size_t Arena::mapped_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<size_t>(mapped_pages_) * page_bytes_;
}

size_t Arena::pooled_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return store_.pooled_bytes();
}

size_t Arena::quarantined_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return store_.quarantined_bytes();
}

size_t Arena::zero_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return cover_.created_bytes();
}

int64_t Arena::bare_places() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return cover_.bare_places();
}

Counters Arena::counters() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return store_.counters();
}

std::string Arena::last_failure() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return store_.last_failure();
}

Status Arena::check() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t mapped_bytes = 0;
  int64_t mapped = 0;
  for (const Page& page : pages_) {
    if (page.empty()) continue;
    ++mapped;
    for (const Mapping& mapping : page) mapped_bytes += mapping.size();
  }
  if (mapped != mapped_pages_ || mapped_bytes != static_cast<size_t>(mapped) * page_bytes_) {
    return {Code::kDriver, "arena does not add up: " + std::to_string(mapped) + " pages with " +
                               std::to_string(mapped_bytes) + " bytes are mapped, counted " +
                               std::to_string(mapped_pages_)};
  }
  return store_.check(mapped_bytes);
}

Status Arena::check_range(size_t offset, size_t size) const {
  if (size > 0 && offset <= this->size() && size <= this->size() - offset) return Status::ok();
  return invalid("bytes " + std::to_string(offset) + " to " + std::to_string(offset) + " + " +
                 std::to_string(size) + " do not lie inside its " + std::to_string(this->size()) +
                 " bytes");
}

}  // namespace kvcached
