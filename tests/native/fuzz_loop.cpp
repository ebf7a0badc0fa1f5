// A driver for fuzz targets where there is no libFuzzer: runs every input of the corpus, then
// mutates them, seeded, until the time is over. What it runs is always on disk: a crash leaves it.
//
//   fuzz_ledger CORPUS [SECONDS] [SEED]      CORPUS: a folder, or one file
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "support.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace kvcached::test {
namespace {

using Bytes = std::vector<uint8_t>;
constexpr size_t kMost = 512;

Bytes read_file(const std::string& path) {
  Bytes bytes(kMost);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const ssize_t got = fd < 0 ? -1 : ::read(fd, bytes.data(), bytes.size());
  if (got < 0) fail("cannot read %s", path.c_str());
  ::close(fd);
  bytes.resize(static_cast<size_t>(got));
  return bytes;
}

std::vector<Bytes> read_corpus(const std::string& path) {
  std::vector<std::string> names;
  if (DIR* folder = opendir(path.c_str())) {
    while (const dirent* entry = readdir(folder)) {
      if (entry->d_name[0] != '.') names.push_back(path + "/" + entry->d_name);
    }
    closedir(folder);
  } else {
    names.push_back(path);
  }
  std::sort(names.begin(), names.end());
  std::vector<Bytes> corpus;
  for (const std::string& name : names) corpus.push_back(read_file(name));
  return corpus;
}

Bytes mutate(const std::vector<Bytes>& corpus, Dice& dice) {
  const auto any = [&] {
    return static_cast<size_t>(dice.below(static_cast<int64_t>(corpus.size())));
  };
  Bytes bytes = corpus.empty() ? Bytes() : corpus[any()];
  for (int64_t edits = dice.between(1, 6); edits > 0; --edits) {
    const size_t at = bytes.empty() ? 0 : static_cast<size_t>(dice.next() % bytes.size());
    const auto place = bytes.begin() + static_cast<long>(at);
    const auto byte = static_cast<uint8_t>(dice.next());
    switch (dice.below(5)) {
      case 0:
        if (!bytes.empty()) *place = byte;
        break;
      case 1:
        bytes.insert(place, byte);
        break;
      case 2:
        if (!bytes.empty()) bytes.erase(place);
        break;
      case 3:
        for (int64_t more = dice.between(1, 12); more > 0; --more) {
          bytes.push_back(static_cast<uint8_t>(dice.next()));
        }
        break;
      default:
        if (!corpus.empty()) {
          const Bytes& other = corpus[any()];
          bytes.insert(place, other.begin(), other.end());
        }
    }
  }
  if (bytes.size() > kMost) bytes.resize(kMost);
  return bytes;
}

// Where the input that runs now can be found when the process is gone.
class Record {
 public:
  explicit Record(const char* path) {
    const int fd = ::open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, kMost + 8) != 0) fail("cannot write %s", path);
    void* mapped = mmap(nullptr, kMost + 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) fail("cannot map %s", path);
    ::close(fd);
    place_ = static_cast<uint8_t*>(mapped);
  }
  void run(const Bytes& bytes) {
    const uint64_t size = bytes.size();
    std::memcpy(place_ + kMost, &size, sizeof size);
    if (!bytes.empty()) std::memcpy(place_, bytes.data(), bytes.size());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }

 private:
  uint8_t* place_ = nullptr;
};

int loop(const std::string& path, double seconds, uint64_t seed) {
  const std::vector<Bytes> corpus = read_corpus(path);
  Record record("fuzz-current");
  for (const Bytes& bytes : corpus) record.run(bytes);
  Dice dice(seed);
  const auto start = std::chrono::steady_clock::now();
  std::chrono::duration<double> passed{0};
  int64_t executions = 0;
  while (passed.count() < seconds) {
    for (int i = 0; i < 1000; ++i, ++executions) record.run(mutate(corpus, dice));
    passed = std::chrono::steady_clock::now() - start;
  }
  unlink("fuzz-current");
  std::printf("fuzz: %zu inputs of the corpus, %ld executions in %.1f s, seed %lu\n", corpus.size(),
              (long)executions, passed.count(), (unsigned long)seed);
  return 0;
}

}  // namespace
}  // namespace kvcached::test

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: %s CORPUS [SECONDS] [SEED]\n", arguments[0]);
    return 2;
  }
  const double seconds = count > 2 ? std::atof(arguments[2]) : 0;
  const uint64_t seed = count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 1;
  return kvcached::test::loop(arguments[1], seconds, seed);
}
