// The ledger's reader on files that somebody has tampered with, and every operation on them.
//
// An input is a program: words of the file are overwritten, the file is cut, the ledger is opened,
// and operations are called, in any order. Whatever it does, the answer must be a value or an
// error: no fault, no undefined behaviour, no endless loop, no number that makes no sense.
//
// Built with libFuzzer (flavour "fuzz"), or with fuzz_loop.cpp by any compiler.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "account.hpp"
#include "segment.hpp"
#include "support.hpp"

namespace kvcached::test {
namespace {

using layout::Shared;

constexpr int64_t kCapacity = int64_t{1} << 30;
const char kDevice[] = "host:fuzz";
const char* const kNames[] = {"one", "two", "three", "",
                              "a-name-that-is-much-too-long-for-a-row-x"};
const int64_t kSpecial[] = {0,
                            1,
                            -1,
                            2,
                            4096,
                            kCapacity,
                            kCapacity + 1,
                            -kCapacity,
                            INT64_MAX,
                            INT64_MAX - 1,
                            INT64_MIN,
                            INT64_MIN + 1,
                            INT64_MAX / 2,
                            INT64_MIN / 2,
                            int64_t{1} << 50,
                            int64_t{1} << 32};

// Reads an input; past its end everything is zero.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }
  template <typename Value>
  Value take() {
    Value value{};
    const size_t size = std::min(left_, sizeof value);
    std::memcpy(&value, data_, size);
    data_ += size;
    left_ -= size;
    return value;
  }
  // A number: one of the special ones, a small one, or any.
  int64_t number() {
    const uint8_t kind = take<uint8_t>();
    if (kind < 128) return kSpecial[kind % (sizeof kSpecial / sizeof *kSpecial)];
    if (kind < 224) return static_cast<int64_t>(take<uint16_t>()) * 4096;
    return take<int64_t>();
  }
  // As the bindings pass sizes on.
  int64_t size() { return std::max<int64_t>(0, number()); }
  const char* name() { return kNames[take<uint8_t>() % (sizeof kNames / sizeof *kNames)]; }

 private:
  const uint8_t* data_;
  size_t left_;
};

// The file that everything happens to, and what it looks like untouched.
struct Bench {
  std::string folder = make_folder("fuzz");
  std::string path = folder + "/" + ledger_file_name(kDevice);
  std::shared_ptr<Segment> standing;  // stays open: most programs need no new handle
  int fd = -1;
  Shared* file = nullptr;
  std::vector<char> untouched;
  uint32_t own_slot = 0;

  Bench() {
    must(Segment::open({folder, kDevice, kCapacity, 0, true, false}, &standing), "open");
    fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    void* mapped = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd < 0 || mapped == MAP_FAILED) fail("cannot map %s", path.c_str());
    file = static_cast<Shared*>(mapped);
    own_slot = static_cast<uint32_t>(getpid()) % layout::kMaxSlots;
    populate();
    std::atexit(remove_files);
  }

  // Three accounts, of which one has an owner and two members, as a process that died left them.
  void populate() {
    std::shared_ptr<Segment> dying;
    must(Segment::open({folder, kDevice, -1, 0, true, false}, &dying), "open");
    std::unique_ptr<AccountHandle> account;
    std::unique_ptr<MemberHandle> members[3];
    must(AccountHandle::join(dying, "one", "one", 4096, &account), "join");
    for (auto& member : members) {
      const char* instance = &member == members + 2 ? "two" : "one";
      must(MemberHandle::attach(dying, instance, "x", 4096, &member), "attach");
      if (member->pin(8192) != Grant::kGranted) fail("pin");
    }
    if (account->lease(65536) != Grant::kGranted) fail("lease");
    account->set_demand(4096);
    const char* bytes = reinterpret_cast<const char*>(file);
    untouched.assign(bytes, bytes + sizeof(Shared));
  }

  static void remove_files();

  void restore() {
    struct stat info{};
    if (fstat(fd, &info) != 0 || info.st_nlink == 0) fail("the file is gone");
    if (info.st_size != static_cast<off_t>(sizeof(Shared)) &&
        ftruncate(fd, static_cast<off_t>(sizeof(Shared))) != 0) {
      fail("cannot restore the file");
    }
    std::memcpy(static_cast<void*>(file), untouched.data(), untouched.size());
  }
};

Bench& bench() {
  static Bench* made = new Bench();
  return *made;
}

void Bench::remove_files() {
  unlink(bench().path.c_str());
  rmdir(bench().folder.c_str());
}

class Program {
 public:
  explicit Program(Input input) : in_(input) {}

  void run() {
    bench().restore();
    segment_ = bench().standing;
    for (int step = 0; step < 64 && !in_.empty(); ++step) one();
    account_.reset();
    member_.reset();
    if (segment_ != bench().standing) segment_->close();
    segment_.reset();
    // Whatever has been done to it, a good file is read as one afterwards.
    bench().restore();
    SegmentView view;
    must(bench().standing->snapshot(&view), "a restored file");
    if (view.accounts.size() != 2 || view.accounts[0].charge != 65536 + 16384) fail("lost");
  }

 private:
  void one() {
    const uint8_t what = in_.take<uint8_t>();
    if (what < 96) return patch(what);
    if (what < 104) return cut();
    if (what < 116) return reopen(what);
    if (what < 160) return on_ledger(what % 12);
    if (cut_) return;  // hot operations do not ask whether the file was cut (segment_file.hpp)
    if (what < 216) return on_account(what % 20);
    on_member(what % 9);
  }

  // Overwrites a word, in the header or in a row, or a single byte of it.
  void patch(uint8_t what) {
    size_t word = in_.take<uint16_t>();
    if (what < 64) word %= (sizeof(layout::Header) + 3 * sizeof(layout::Account)) / 8;
    if (what < 24) word %= sizeof(layout::Header) / 8;
    word %= sizeof(Shared) / 8;
    if (cut_) return;
    char* place = reinterpret_cast<char*>(bench().file) + word * 8;
    int64_t value = in_.number();
    if (what % 4 == 3) {
      place += value & 7;
      *place = static_cast<char>(in_.take<uint8_t>());
    } else if (what % 4 == 2) {
      const int32_t half = static_cast<int32_t>(value);
      std::memcpy(place + (value < 0 ? 4 : 0), &half, sizeof half);
    } else {
      std::memcpy(place, &value, sizeof value);
    }
    // With a living process in the lock others wait; that is tested elsewhere, and takes long.
    std::atomic<uint32_t>& lock = bench().file->header.lock.word;
    const uint32_t holder = (lock.load() & 0x7fffffffu) - 1;
    if (holder - bench().own_slot < 8) lock = 0;
  }

  void cut() {
    reopen(1);  // its own handle: one on a file that is cut can only be given up
    if (segment_ == bench().standing) return;
    cut_ = true;
    const off_t size = in_.take<uint32_t>() % (2 * sizeof(Shared));
    if (ftruncate(bench().fd, size) != 0) fail("cannot cut the file");
    if (size == static_cast<off_t>(sizeof(Shared))) cut_ = false;
  }

  void reopen(uint8_t what) {
    account_.reset();
    member_.reset();
    OpenRequest request{bench().folder, kDevice, -1, 0, what % 2 == 0, what % 3 == 0};
    if (what % 5 == 0) request.capacity_bytes = in_.number();
    if (what % 7 == 0) request.headroom_bytes = in_.number();
    std::shared_ptr<Segment> opened;
    if (segment_ != bench().standing) segment_->close();
    segment_ = Segment::open(request, &opened).is_ok() ? opened : bench().standing;
  }

  void on_ledger(int which) {
    Segment& ledger = *segment_;
    const Setting setting = which % 2 == 0 ? Setting::kGuarantee : Setting::kLimit;
    switch (which) {
      case 0:
        return look();
      case 1: {
        uint32_t reaped = 0;
        return (void)ledger.reap(&reaped);
      }
      case 2:
      case 3:
        return (void)ledger.configure(in_.name(), setting, in_.size());
      case 4:
        return (void)ledger.set_weight(in_.name(), in_.take<double>());
      case 5:
        return (void)ledger.ask_back(in_.name(), in_.size());
      case 6:
        return (void)(cut_ ? Status::ok() : ledger.set_foreign(in_.size()));
      case 7:
        return (void)ledger.set_capacity(in_.number(), in_.number());
      case 8: {
        const Bell bell = in_.take<uint8_t>() % 2 == 0 ? Bell::kFreed : Bell::kPressure;
        return (void)(cut_ ? 0 : ledger.wait(bell, in_.take<uint32_t>(), 0));
      }
      case 9: {
        const std::string device(in_.name());
        if (ledger_file_name(device).find('/') != std::string::npos) fail("a path");
        return;
      }
      case 10:
        return join();
      default:
        return attach();
    }
  }

  void join() {
    account_.reset();
    std::unique_ptr<AccountHandle> joined;
    const std::string name = in_.name();
    if (AccountHandle::join(segment_, name, name, in_.size(), &joined))
      account_ = std::move(joined);
  }

  void attach() {
    member_.reset();
    std::unique_ptr<MemberHandle> attached;
    const std::string name = in_.name();
    if (MemberHandle::attach(segment_, name, name, in_.size(), &attached)) {
      member_ = std::move(attached);
    }
  }

  void look() {
    SegmentView view;
    if (!segment_->snapshot(&view)) return;
    for (const AccountView& account : view.accounts) {
      if (account.leased < 0 || account.created < 0 || account.charge < account.created ||
          account.members.size() > layout::kMaxMembers) {
        fail("leased %ld, created %ld, charge %ld", (long)account.leased, (long)account.created,
             (long)account.charge);
      }
    }
    if (!cut_) {
      (void)segment_->created();
      (void)segment_->foreign_age_ms();
    }
  }

  void on_account(int which) {
    if (account_ == nullptr) return join();
    AccountHandle& account = *account_;
    switch (which) {
      case 0:
        return (void)account.lease(in_.size());
      case 1:
        return (void)account.try_lease(in_.size());
      case 2:
        return (void)account.give_back(in_.size());
      case 3:
        return lease_what_is_leasable();
      case 4:
        return (void)account.ceiling();
      case 5:
        return (void)account.charge();
      case 6:
        return (void)account.others_demand();
      case 7:
        return (void)account.pressed();
      case 8:
        return (void)account.version();
      case 9:
        return (void)account.standings();
      case 10:
        return account.set_demand(in_.size());
      case 11:
        return account.press();
      case 12:
        return account.publish(in_.size(), in_.size(), in_.size(), which % 2 == 0);
      case 13:
        return account.set_state(1);
      case 14:
        return account.describe(in_.size(), in_.size(), in_.size());
      case 15:
        return account.count_reclaimed(in_.size());
      case 16:
        return account.publish_cache(in_.size(), in_.size(), in_.size(), in_.size());
      case 17:
        return account.answer(account.asked());
      case 18:
        return account.answer(in_.size());
      default:
        return account_.reset();
    }
  }

  void lease_what_is_leasable() {
    const int64_t leasable = account_->leasable();
    if (leasable < 0 || account_->ceiling() < 0) fail("leasable %ld", (long)leasable);
    (void)account_->lease(leasable);
  }

  void on_member(int which) {
    if (member_ == nullptr) return attach();
    MemberHandle& member = *member_;
    switch (which) {
      case 0:
        return (void)member.pin(in_.size());
      case 1:
        return member.describe(in_.size(), in_.size(), in_.size());
      case 2:
        return member.set_demand(in_.size());
      case 3:
        return (void)member.set_aside(in_.size());
      case 4:
        return (void)member.created(in_.size());
      case 5:
        return (void)member.released(in_.size());
      case 6: {
        if (member.held() < 0) fail("it holds %ld bytes", (long)member.held());
        return;
      }
      case 7:
        return (void)member.released(member.held());
      default:
        return member_.reset();
    }
  }

  Input in_;
  std::shared_ptr<Segment> segment_;
  std::unique_ptr<AccountHandle> account_;
  std::unique_ptr<MemberHandle> member_;
  bool cut_ = false;
};

}  // namespace
}  // namespace kvcached::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvcached::test::Program(kvcached::test::Input(data, size)).run();
  return 0;
}
