// What must hold after every step of a simulated process.
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "charges.hpp"
#include "sim_process.hpp"

namespace kvcached::test {
namespace {

constexpr int64_t kThorough = 64;  // steps between two looks at every byte and every mapping

}  // namespace

void Process::check(int64_t total_before, int64_t lent_before) {
  if (started_) {
    must(blocks_->check(), "blocks");
    must(arena_->check(), "arena");
    must(mapper_->check(), "mapper");
    check_books();
    check_kernel();
    check_contents(steps_ % kThorough == 0);
    if (steps_ % kThorough == 0) check_places();
  }
  // Nobody else runs: what all are charged grew by what this step was granted.
  const int64_t total = total_charge();
  const int64_t could = std::max(lent_before, lent());
  if (total > total_before && total > could) {
    fail("%ld bytes are charged, and %ld can be lent", (long)total, (long)could);
  }
  const int64_t mark = file_->header.statistics.high_water.load();
  if (total > mark) fail("%ld bytes are charged above the mark of %ld", (long)total, (long)mark);
}

// What exists = what is booked, less pages that are still to come = what the ledger says.
void Process::check_books() {
  const auto created = static_cast<int64_t>(backend_->created_bytes());
  if (created != static_cast<int64_t>(arena_->created_bytes())) {
    fail("%ld bytes exist, the arena counts %zu", (long)created, arena_->created_bytes());
  }
  int64_t to_come = 0;
  for (const int64_t page : wanted_) {
    bool mapped = false;
    must(arena_->is_mapped(page, &mapped), "is_mapped");
    if (!mapped) ++to_come;
  }
  const int64_t held = member_->held();
  const int64_t owed = created + to_come * spec_.page_bytes();
  const bool quarantine = arena_->quarantined_bytes() > 0;
  if (held < created || held > owed || (!quarantine && !broken_ && held != owed)) {
    fail("%ld bytes exist, %ld pages are to come, %ld bytes are booked", (long)created,
         (long)to_come, (long)held);
  }
  const size_t mapped = arena_->mapped_bytes();
  const size_t placed = backend_->placed_bytes();
  if (placed < mapped || (!quarantine && placed != mapped)) {
    fail("%zu bytes are placed, the arena maps %zu", placed, mapped);
  }
}

// The kernel's count of this process's memory.
void Process::check_kernel() {
  if (memory_fd_ < 0) return;
  struct stat info{};
  if (fstat(memory_fd_, &info) != 0) fail("fstat");
  const auto exists = static_cast<size_t>(info.st_blocks) * 512;
  if (exists != backend_->created_bytes()) {
    fail("the kernel counts %zu bytes, %zu were created", exists, backend_->created_bytes());
  }
}

// The kernel's list of mappings: each page lies where it should, and nowhere else.
void Process::check_places() {
  if (memory_fd_ < 0) return;
  std::map<uintptr_t, uint64_t> expected;  // granule -> offset in the memory's file
  for (const auto& [address, handle] : backend_->places()) {
    for (size_t i = 0; i < handle.size; i += 4096) expected[address + i] = handle.id + i;
  }
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("/memfd:kvcached:") == std::string::npos) continue;
    unsigned long begin = 0, end = 0, offset = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx %*s %lx", &begin, &end, &offset) != 3) fail("maps");
    for (uintptr_t place = begin; place < end; place += 4096) {
      const auto found = expected.find(place);
      if (found == expected.end() || found->second != offset + (place - begin)) {
        fail("a page lies where none was put");
      }
      expected.erase(found);
    }
  }
  if (!expected.empty()) fail("%zu granules of pages are not where they were put", expected.size());
}

void Process::check_contents(bool everything) {
  if (broken_) return;
  if (memory_fd_ < 0 && !everything) return;  // a GPU's memory is far away
  for (int32_t id = 0; id < blocks_->num_blocks(); ++id) {
    if (contents_[static_cast<size_t>(id)] != 0) check_block(id, everything);
  }
}

uintptr_t Process::address_of(int32_t block, size_t region) const {
  const auto page = static_cast<size_t>(block / spec_.blocks_per_page);
  const auto place = static_cast<size_t>(block % spec_.blocks_per_page);
  return arena_->address() + region * spec_.chunk * static_cast<size_t>(spec_.pages) +
         page * spec_.chunk + place * block_bytes();
}

uint64_t Process::pattern(int32_t block) const {
  return (spec_.tag << 40) | ((pattern_ & 0xffffff) << 16) | static_cast<uint64_t>(block);
}

void Process::write_block(int32_t block) {
  ++pattern_;
  const uint64_t value = pattern(block);
  const size_t words = words_at_an_end();
  const std::vector<uint64_t> filled(words, value);
  for (size_t region = 0; region < spec_.regions; ++region) {
    const uintptr_t address = address_of(block, region);
    memory_->write(address, filled.data(), words);
    memory_->write(address + block_bytes() - words * 8, filled.data(), words);
  }
  contents_[static_cast<size_t>(block)] = value;
}

void Process::check_block(int32_t block, bool everything) {
  const uint64_t value = contents_[static_cast<size_t>(block)];
  if (value == 0) fail("block %d has no contents", block);
  for (const uint64_t word : read_ends(block, everything ? words_at_an_end() : 1)) {
    if (word != value) fail("block %d holds %lx instead of %lx", block, word, value);
  }
}

// Memory that is new reads as zeros; other than that there is only what this process wrote.
void Process::check_fresh(int32_t block) {
  for (const uint64_t word : read_ends(block, words_at_an_end())) {
    if (word != 0 && word >> 40 != spec_.tag) fail("block %d holds another's %lx", block, word);
  }
}

size_t Process::words_at_an_end() const {
  return memory_->words_at_an_end(block_bytes());
}

std::vector<uint64_t> Process::read_ends(int32_t block, size_t words) const {
  std::vector<uint64_t> found(2 * words * spec_.regions);
  uint64_t* to = found.data();
  for (size_t region = 0; region < spec_.regions; ++region) {
    const uintptr_t address = address_of(block, region);
    for (const uintptr_t end : {address, address + block_bytes() - words * 8}) {
      memory_->read(end, to, words);
      to += words;
    }
  }
  return found;
}

}  // namespace kvcached::test
