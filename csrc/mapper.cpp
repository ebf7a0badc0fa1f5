// What others ask of the mapper. Its thread is in mapper_thread.cpp.
#include "mapper.hpp"

#include <algorithm>
#include <chrono>

namespace kvcached {
namespace {

Status invalid(const std::string& message) {
  return {Code::kInvalidArgument, "mapper: " + message};
}

std::chrono::steady_clock::time_point after(double seconds) {
  const double bounded = seconds > 0 ? std::min(seconds, 1e8) : 0;  // also not a number
  return std::chrono::steady_clock::now() +
         std::chrono::nanoseconds(static_cast<int64_t>(bounded * 1e9));
}

}  // namespace

Status Mapper::open(std::shared_ptr<Arena> arena, std::shared_ptr<MemberHandle> member,
                    std::shared_ptr<Mapper>* mapper) {
  Status status = arena->check_process();
  if (!status.is_ok()) return status;
  if (arena->created_bytes() != arena->zero_bytes()) return invalid("its arena must be empty");
  // In a forked child the condition variables have waiters that do not exist, and the thread
  // object names none: nothing may be destroyed there.
  const auto destroy = [](Mapper* dying) {
    if (dying->arena_->check_process().is_ok()) delete dying;
  };
  std::shared_ptr<Mapper> made(new Mapper(std::move(arena), std::move(member)), destroy);
  status = made->start();
  if (status.is_ok()) *mapper = std::move(made);
  return status;
}

Mapper::Mapper(std::shared_ptr<Arena> arena, std::shared_ptr<MemberHandle> member)
    : arena_(std::move(arena)),
      member_(std::move(member)),
      page_bytes_(static_cast<int64_t>(arena_->page_bytes())),
      pages_(static_cast<size_t>(arena_->pages())),
      created_bytes_(static_cast<int64_t>(arena_->created_bytes())) {}

Mapper::~Mapper() {
  close();
}

void Mapper::close() {
  if (!arena_->check_process().is_ok()) return;
  std::thread ending;
  {
    Lock lock(mutex_);
    stop_ = true;
    wake_.notify_one();
    ending = std::move(thread_);
  }
  if (!ending.joinable()) return;
  ending.join();
  Lock lock(mutex_);
  int64_t released = 0;
  // What comes out of quarantine now is kept for reuse by nobody: it goes back with the rest.
  (void)arena_->trim(0, &released);
  created_bytes_ -= released;
  quarantined_bytes_ = static_cast<int64_t>(arena_->quarantined_bytes());
  for (Page& page : pages_) set_pending(page, false);
  settle_books();
  changed_.notify_all();
}

Status Mapper::check_open() const {
  if (stop_) return invalid("it is closed");
  if (!member_->usable()) {
    return {Code::kLedger, "mapper: its place in the ledger was closed, or the ledger's file cut"};
  }
  return Status::ok();
}

Status Mapper::check_page(int64_t page) const {
  if (page >= 0 && page < arena_->pages()) return Status::ok();
  return invalid("page " + std::to_string(page) + " is outside 0.." +
                 std::to_string(arena_->pages() - 1));
}

Status Mapper::check_commands(const Pages& unmap, const Pages& needed, const Pages& ahead) {
  Status status = check_open();
  const Pages* lists[] = {&unmap, &needed, &ahead};
  for (const Pages* list : lists) {
    for (const int64_t page : *list) {
      if (status.is_ok()) status = check_page(page);
      if (!status.is_ok()) break;
      const std::string name = "page " + std::to_string(page);
      const bool wanted = at(page).want != Want::kGone;
      if (at(page).named) status = invalid(name + " is named twice in one call");
      if (list == &unmap && !wanted) status = invalid(name + " is not mapped");
      if (list == &ahead && wanted) status = invalid(name + " is mapped already");
      at(page).named = true;
    }
  }
  for (const Pages* list : lists) {
    for (const int64_t page : *list) {
      if (check_page(page).is_ok()) at(page).named = false;
    }
  }
  return status;
}

Status Mapper::submit(const Pages& unmap, const Pages& needed, const Pages& ahead,
                      uintptr_t stream) {
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  status = check_commands(unmap, needed, ahead);
  if (!status.is_ok()) return status;
  Pages leaving;
  for (const int64_t page : unmap) drop(page, &leaving);
  leave(std::move(leaving), stream);
  const auto leased = [&](int64_t page) { return at(page).want == Want::kGone ? 1 : 0; };
  int64_t fresh = static_cast<int64_t>(ahead.size());
  for (const int64_t page : needed) fresh += leased(page);
  member_->created(fresh * page_bytes_);
  for (const int64_t page : needed) want(page, Want::kNeeded);
  for (const int64_t page : ahead) want(page, Want::kAhead);
  settle_books();
  poke();
  return status;
}

Status Mapper::need(const Pages& pages) {
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  status = check_commands({}, {}, pages);
  if (!status.is_ok()) return status;
  for (const int64_t page : pages) want(page, Want::kNeeded);
  settle_books();  // a page that is still there was held already
  poke();
  return status;
}

Status Mapper::clear(uintptr_t stream) {
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  status = check_open();
  if (!status.is_ok()) return status;
  Pages leaving;
  for (int64_t page = 0; page < arena_->pages(); ++page) {
    if (at(page).want != Want::kGone) drop(page, &leaving);
  }
  leave(std::move(leaving), stream);
  settle_books();
  poke();
  return status;
}

// Nobody wants the page any more: what is there must leave, what is not is never mapped.
void Mapper::drop(int64_t page, Pages* leaving) {
  Page& entry = at(page);
  entry.want = Want::kGone;
  entry.refused = false;
  if (entry.phase == Phase::kMapped || entry.phase == Phase::kMapping) {
    leaving->push_back(page);
    return;
  }
  if (entry.pending) ++counters_.cancelled;
  set_pending(entry, false);
}

// Someone wants the page. Where it is still there, it is kept; settle_books() then finds that more
// is booked than there is to pay for, and refunds it.
void Mapper::want(int64_t page, Want want) {
  Page& entry = at(page);
  const bool there = entry.phase == Phase::kMapped || entry.phase == Phase::kMapping;
  if (entry.want == Want::kGone && there) ++counters_.kept;
  entry.want = std::max(entry.want, want);
  entry.leaving = 0;
  if (there) return;
  entry.refused = false;
  set_pending(entry, true);
  (entry.want == Want::kNeeded ? needed_ : ahead_).push_back(page);
}

void Mapper::set_pending(Page& page, bool pending) {
  pending_pages_ += (pending ? 1 : 0) - (page.pending ? 1 : 0);
  page.pending = pending;
}

// Puts a fence behind these pages, and behind those that could not have one before: a later fence
// is as good. Without one they stay mapped.
void Mapper::leave(Pages pages, uintptr_t stream) {
  if (!unfenced_.empty()) {
    for (const int64_t page : unfenced_) {
      const Page& entry = at(page);
      if (entry.want == Want::kGone && entry.leaving == 0) pages.push_back(page);
    }
    unfenced_.clear();
  }
  if (pages.empty()) return;
  Leaving batch;
  batch.number = ++batches_;
  if (!arena_->record_fence(stream, &batch.fence).is_ok()) {
    ++counters_.fence_failures;
    for (const int64_t page : pages) at(page).leaving = 0;
    unfenced_ = std::move(pages);
    return;
  }
  for (const int64_t page : pages) at(page).leaving = batch.number;
  batch.pages = std::move(pages);
  leaving_.push_back(std::move(batch));
}

// Bytes that must be leased before everything that is wanted could exist: pages that were refunded
// and are wanted after all, and what is in quarantine beside them.
int64_t Mapper::unbooked() const {
  return created_bytes_ + pending_pages_ * page_bytes_ - member_->held();
}

void Mapper::settle_books() {
  const int64_t held = member_->held();
  const int64_t owed = created_bytes_ + pending_pages_ * page_bytes_;
  if (held > owed) {
    member_->released(held - owed);
  } else if (held < created_bytes_) {
    member_->created(created_bytes_ - held);
  }
}

void Mapper::poke() {
  idle_ = false;
  wake_.notify_one();
}

Status Mapper::wait(const Pages& pages, double seconds, bool* mapped) {
  *mapped = false;
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  bool again = false;
  for (const int64_t page : pages) {
    if (status = check_page(page); !status.is_ok()) return status;
    if (at(page).want == Want::kGone) {
      return invalid("page " + std::to_string(page) + " is not wanted");
    }
    if (at(page).phase == Phase::kMapped) continue;
    if (status = check_open(); !status.is_ok()) return status;
    if (at(page).refused || at(page).want == Want::kAhead) {
      again = true;
      want(page, Want::kNeeded);
    }
  }
  if (again) poke();
  const auto until = after(seconds);
  for (const int64_t page : pages) {
    const auto answered = [&] {
      return at(page).phase == Phase::kMapped || at(page).refused || at(page).want == Want::kGone ||
             stop_;
    };
    if (!changed_.wait_until(lock, until, answered)) return Status::ok();
    if (at(page).refused) return refusal_;
    if (at(page).phase != Phase::kMapped) {
      return invalid("page " + std::to_string(page) + " was given up while a thread waited for it");
    }
  }
  *mapped = true;
  return Status::ok();
}

Status Mapper::give_up(const Pages& pages) {
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  for (const int64_t page : pages) {
    if (status = check_page(page); !status.is_ok()) return status;
    changed_.wait(lock, [&] { return at(page).phase != Phase::kMapping; });
    if (at(page).want == Want::kGone || at(page).phase == Phase::kMapped) continue;
    at(page).refused = true;
    set_pending(at(page), false);
  }
  settle_books();
  changed_.notify_all();
  return status;
}

Status Mapper::drain(double seconds, bool* done) {
  *done = false;
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  changed_.wait_until(lock, after(seconds), [&] { return idle_ || stop_; });
  *done = idle_ && unfenced_.empty();
  return status;
}

Status Mapper::missing(const Pages& pages, int64_t* count) const {
  *count = 0;
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  for (const int64_t page : pages) {
    if (status = check_page(page); !status.is_ok()) return status;
    *count += at(page).phase == Phase::kMapped ? 0 : 1;
  }
  return status;
}

Status Mapper::counters(MapperCounters* counters) const {
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  *counters = counters_;
  return status;
}

Status Mapper::quarantined_bytes(int64_t* bytes) const {
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  *bytes = quarantined_bytes_;
  return status;
}

Status Mapper::check() {
  Status status = arena_->check_process();
  if (!status.is_ok()) return status;
  Lock lock(mutex_);
  changed_.wait(lock, [&] { return !busy_; });
  if (status = arena_->check(); !status.is_ok()) return status;
  const auto wrong = [](const std::string& what) {
    return Status(Code::kDriver, "mapper does not add up: " + what);
  };
  int64_t pending = 0;
  for (int64_t page = 0; page < arena_->pages(); ++page) {
    const Page& entry = at(page);
    bool mapped = false;
    (void)arena_->is_mapped(page, &mapped);
    if (mapped != (entry.phase == Phase::kMapped)) {
      return wrong("page " + std::to_string(page) + (mapped ? " is" : " is not") + " mapped");
    }
    if (entry.pending && (mapped || entry.want == Want::kGone)) {
      return wrong("page " + std::to_string(page) + " is pending");
    }
    pending += entry.pending ? 1 : 0;
  }
  const int64_t created = static_cast<int64_t>(arena_->created_bytes());
  if (pending != pending_pages_ || created != created_bytes_) {
    return wrong(std::to_string(created) + " bytes exist, counted " +
                 std::to_string(created_bytes_) + "; " + std::to_string(pending) +
                 " pages are pending, counted " + std::to_string(pending_pages_));
  }
  const int64_t held = member_->held();
  if (member_->usable() && (held < created || held > created + pending * page_bytes_)) {
    return wrong(std::to_string(held) + " bytes are booked, " + std::to_string(created) +
                 " exist and " + std::to_string(pending) + " pages are pending");
  }
  return status;
}

}  // namespace kvcached
