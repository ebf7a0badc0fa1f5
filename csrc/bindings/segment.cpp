// Binds the ledger. Whatever can block (the lock, a sleep, opening the file) runs without the GIL.
#include "segment.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "account.hpp"
#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace kvcached {

namespace {

using NoGil = py::call_guard<WithoutGil>;

int64_t checked(int64_t size_bytes) {
  if (size_bytes < 0) {
    raise_if_failed({Code::kInvalidArgument,
                     "a size of " + std::to_string(size_bytes) + " bytes: expected 0 or more"});
  }
  return size_bytes;
}

[[noreturn]] void raise_unusable(const Segment& segment) {
  raise_if_failed({Code::kLedger, segment.path() + ": this handle is closed, or was inherited " +
                                      "through a fork, or its file was cut"});
  throw std::logic_error("unreachable");
}

bool granted(Grant grant, const Segment& segment) {
  if (grant == Grant::kUnusable) raise_unusable(segment);
  return grant == Grant::kGranted;
}

// Runs `call` without the GIL and raises what it returns with it.
template <typename Call>
void run(Call&& call) {
  Status status;
  {
    WithoutGil release;
    status = call();
  }
  raise_if_failed(status);
}

std::shared_ptr<Segment> open_segment(const std::string& directory, const std::string& device,
                                      int64_t capacity, int64_t headroom, bool create,
                                      bool read_only) {
  OpenRequest request{directory, device, capacity, headroom, create, read_only};
  std::shared_ptr<Segment> segment;
  run([&] { return Segment::open(request, &segment); });
  return segment;
}

py::dict member_dict(const MemberView& view) {
  py::dict out;
  out["pid"] = view.pid;
  out["alive"] = view.alive;
  out["created"] = view.created;
  out["demand"] = view.demand;
  out["set_aside"] = view.set_aside;
  out["to_come"] = view.to_come;
  out["created_ever"] = view.created_ever;
  out["released_ever"] = view.released_ever;
  return out;
}

// A name is cut at a byte, which may be within a character.
py::str text(const std::string& bytes) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "ignore"));
}

py::dict account_dict(const AccountView& view) {
  py::dict out;
  out["instance"] = text(view.instance);
  out["name"] = text(view.name);
  out["owner_pid"] = view.owner_pid == 0 ? py::object(py::none()) : py::int_(view.owner_pid);
  out["owner_alive"] = view.owner_alive;
  out["ready"] = view.ready;
  out["asleep"] = view.asleep;
  out["guarantee"] = view.guarantee;
  out["limit"] = view.limit == layout::kNoLimit ? py::object(py::none()) : py::int_(view.limit);
  out["weight"] = view.weight;
  out["pinned"] = view.pinned;
  out["leased"] = view.leased;
  out["created"] = view.created;
  out["charge"] = view.charge;
  out["in_use"] = view.in_use;
  out["cached"] = view.cached;
  out["warm"] = view.warm;
  out["demand"] = view.demand;
  out["granted"] = view.granted;
  out["refused"] = view.refused;
  out["reclaims"] = view.reclaims;
  out["reclaimed"] = view.reclaimed;
  out["lock_timeouts"] = view.lock_timeouts;
  out["asked"] = view.asked;
  out["hits"] = view.hits;
  out["misses"] = view.misses;
  out["evictions"] = view.evictions;
  out["evictions_by_pressure"] = view.evictions_by_pressure;
  out["waits"] = view.waits;
  out["waited_us"] = view.waited_us;
  out["longest_wait_us"] = view.longest_wait_us;
  out["wait_buckets"] = py::tuple(py::cast(view.wait_buckets));
  out["block_bytes"] = view.block_bytes;
  out["block_tokens"] = view.block_tokens;
  out["page_bytes"] = view.page_bytes;
  out["ceiling"] = view.ceiling;
  py::list members;
  for (const MemberView& member : view.members) members.append(member_dict(member));
  out["members"] = members;
  return out;
}

py::dict snapshot(const Segment& segment) {
  SegmentView view;
  run([&] { return segment.snapshot(&view); });
  py::dict out;
  out["device"] = view.device;
  out["consistent"] = view.consistent;
  out["capacity"] = view.capacity;
  out["headroom"] = view.headroom;
  out["foreign"] = view.foreign;
  out["set_aside"] = view.set_aside;
  out["high_water"] = view.high_water;
  out["reaps"] = view.reaps;
  out["lock_timeouts"] = view.lock_timeouts;
  out["locks_stolen"] = view.locks_stolen;
  py::list accounts;
  for (const AccountView& account : view.accounts) accounts.append(account_dict(account));
  out["accounts"] = accounts;
  return out;
}

std::unique_ptr<AccountHandle> join(const std::shared_ptr<Segment>& segment,
                                    const std::string& instance, const std::string& name,
                                    int64_t pinned) {
  std::unique_ptr<AccountHandle> account;
  checked(pinned);
  run([&] { return AccountHandle::join(segment, instance, name, pinned, &account); });
  return account;
}

// Shared with the mapper that keeps its books.
std::shared_ptr<MemberHandle> attach(const std::shared_ptr<Segment>& segment,
                                     const std::string& instance, const std::string& name,
                                     int64_t pinned) {
  std::unique_ptr<MemberHandle> member;
  checked(pinned);
  run([&] { return MemberHandle::attach(segment, instance, name, pinned, &member); });
  return member;
}

py::tuple standings(const AccountHandle& account) {
  StandingsView view = account.standings();
  py::list rows;
  for (const StandingView& each : view.accounts) {
    rows.append(py::make_tuple(each.guarantee, each.limit, each.weight, each.charge, each.in_use,
                               each.cached, each.warm, each.demand,
                               std::max<int64_t>(1, each.page_bytes), each.working));
  }
  return py::make_tuple(view.lendable, view.own, rows);
}

// Most leases find the lock free and the memory there: those never let go of the GIL.
bool lease(AccountHandle& account, int64_t size_bytes) {
  checked(size_bytes);
  Grant grant = account.try_lease(size_bytes);
  if (grant == Grant::kContended) {
    WithoutGil release;
    grant = account.lease(size_bytes);
  }
  return granted(grant, account.segment());
}

template <Grant (MemberHandle::*kAsk)(int64_t)>
bool ask(MemberHandle& member, int64_t size_bytes) {
  checked(size_bytes);
  Grant grant;
  {
    WithoutGil release;
    grant = (member.*kAsk)(size_bytes);
  }
  return granted(grant, member.segment());
}

void refuse(bool accepted, const char* what, int64_t size_bytes) {
  if (accepted) return;
  raise_if_failed({Code::kInvalidArgument, std::string(what) + std::to_string(size_bytes) +
                                               " bytes, which is more than there are"});
}

void bind_core(py::module_& module) {
  py::class_<Segment, std::shared_ptr<Segment>>(module, "Segment", "The shared ledger file.")
      .def_static("open", &open_segment, py::arg("directory"), py::arg("device"),
                  py::arg("capacity"), py::arg("headroom"), py::arg("create"), py::arg("read_only"))
      .def_property_readonly("path", &Segment::path)
      .def_property_readonly("device", &Segment::device)
      .def_property_readonly("capacity", &Segment::capacity)
      .def_property_readonly("headroom", &Segment::headroom)
      .def_property_readonly("lock_fd", &Segment::lock_fd)
      .def_property_readonly("usable", &Segment::usable)
      .def("join", &join, py::arg("instance"), py::arg("name"), py::arg("pinned"))
      .def("attach", &attach, py::arg("instance"), py::arg("name"), py::arg("pinned"))
      .def("snapshot", &snapshot)
      .def("reap",
           [](Segment& segment) {
             uint32_t reaped = 0;
             run([&] { return segment.reap(&reaped); });
             return reaped;
           })
      .def("set_guarantee",
           [](Segment& segment, const std::string& key, int64_t size_bytes) {
             run([&] { return segment.configure(key, Setting::kGuarantee, size_bytes); });
           })
      .def("set_limit",
           [](Segment& segment, const std::string& key, std::optional<int64_t> size_bytes) {
             int64_t limit = size_bytes.value_or(layout::kNoLimit);
             run([&] { return segment.configure(key, Setting::kLimit, limit); });
           })
      .def("set_weight",
           [](Segment& segment, const std::string& key, double weight) {
             run([&] { return segment.set_weight(key, weight); });
           })
      .def("ask_back",
           [](Segment& segment, const std::string& key, int64_t size_bytes) {
             checked(size_bytes);
             run([&] { return segment.ask_back(key, size_bytes); });
           })
      .def("set_capacity",
           [](Segment& segment, std::optional<int64_t> capacity, std::optional<int64_t> headroom) {
             int64_t total = capacity ? checked(*capacity) : -1;
             int64_t spare = headroom ? checked(*headroom) : -1;
             run([&] { return segment.set_capacity(total, spare); });
           })
      .def("set_foreign",
           [](Segment& segment, int64_t size_bytes) {
             checked(size_bytes);
             run([&] { return segment.set_foreign(size_bytes); });
           })
      .def("foreign_age_ms", &Segment::foreign_age_ms)
      .def("created", &Segment::created)
      .def_property_readonly("freed_seq", [](Segment& s) { return s.sequence(Bell::kFreed); })
      .def_property_readonly("pressure_seq", [](Segment& s) { return s.sequence(Bell::kPressure); })
      .def(
          "wait_freed",
          [](Segment& s, uint32_t seen, double timeout) {
            return s.wait(Bell::kFreed, seen, timeout);
          },
          NoGil())
      .def(
          "wait_pressure",
          [](Segment& s, uint32_t seen, double timeout) {
            return s.wait(Bell::kPressure, seen, timeout);
          },
          NoGil())
      .def("hold_lock", &Segment::hold_lock, NoGil(), "Test only: keeps the lock for so long.")
      .def("close", &Segment::close, NoGil());
}

void bind_account(py::module_& module) {
  py::class_<AccountHandle>(module, "Account", "The owner's side of an account.")
      .def("lease", &lease)
      .def("give_back",
           [](AccountHandle& account, int64_t size_bytes) {
             refuse(account.give_back(checked(size_bytes)), "gave back ", size_bytes);
           })
      .def("leasable", &AccountHandle::leasable)
      .def("ceiling", &AccountHandle::ceiling)
      .def("charge", &AccountHandle::charge)
      .def("others_demand", &AccountHandle::others_demand)
      .def("pressed", &AccountHandle::pressed)
      .def("press", &AccountHandle::press)
      .def("standings", &standings)
      .def_property_readonly("version", &AccountHandle::version)
      .def("set_demand",
           [](AccountHandle& account, int64_t size) { account.set_demand(checked(size)); })
      .def("publish", &AccountHandle::publish)
      .def("set_state", &AccountHandle::set_state)
      .def("describe", &AccountHandle::describe)
      .def("count_reclaimed", &AccountHandle::count_reclaimed)
      .def("publish_cache", &AccountHandle::publish_cache)
      .def("asked", &AccountHandle::asked)
      .def("answer", [](AccountHandle& account, int64_t size) { account.answer(checked(size)); })
      .def_property_readonly("usable", &AccountHandle::usable)
      .def("close", &AccountHandle::close, NoGil());
}

void bind_member(py::module_& module) {
  py::class_<MemberHandle, std::shared_ptr<MemberHandle>>(module, "Member",
                                                          "A mapping process's side of an account.")
      .def("set_demand",
           [](MemberHandle& member, int64_t size) { member.set_demand(checked(size)); })
      .def("pin", &ask<&MemberHandle::pin>)
      .def("describe", &MemberHandle::describe)
      .def("set_aside", &ask<&MemberHandle::set_aside>)
      .def("created",
           [](MemberHandle& member, int64_t size_bytes) {
             if (!member.created(checked(size_bytes))) raise_unusable(member.segment());
           })
      .def("released",
           [](MemberHandle& member, int64_t size_bytes) {
             refuse(member.released(checked(size_bytes)), "released ", size_bytes);
           })
      .def("held", &MemberHandle::held)
      .def_property_readonly("usable", &MemberHandle::usable)
      .def("close", &MemberHandle::close, NoGil());
}

}  // namespace

void bind_segment(py::module_& module) {
  bind_core(module);
  bind_account(module);
  bind_member(module);
  module.def("ledger_file_name", &ledger_file_name, py::arg("device"),
             "The name of a device's ledger file within its folder.");
  module.def(
      "remove_ledger",
      [](const std::string& directory, const std::string& device) {
        run([&] { return remove_ledger_file(directory, device); });
      },
      py::arg("directory"), py::arg("device"),
      "Removes the ledger of a device that no process has open for writing.");
}

}  // namespace kvcached
