#include "arena.hpp"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bare.hpp"
#include "bindings/bindings.hpp"
#include "cuda_backend.hpp"
#include "dlpack.hpp"
#include "host_backend.hpp"
#include "host_memory.hpp"
#include "probe.hpp"

namespace py = pybind11;

namespace kvcached {
namespace {

using SharedArena = std::shared_ptr<Arena>;

// Runs `work` without the GIL: the core's mutexes are only ever waited for without it.
template <typename Work>
auto without_gil(Work&& work) {
  WithoutGil release;
  return work();
}

// An arena that dies with the GIL held, as Python objects do, unmaps its pages without it.
void destroy(Arena* arena) {
  if (PyGILState_Check() != 0) {
    without_gil([&] { delete arena; });
  } else {
    delete arena;
  }
}

SharedArena open_arena(std::shared_ptr<Probe> backend,
                       const std::vector<std::pair<size_t, size_t>>& regions, int64_t pages,
                       size_t size, size_t pool_bytes, bool zero_holes) {
  ArenaOptions options;
  for (const auto& [offset, chunk] : regions) options.regions.push_back({offset, chunk});
  options.pages = pages;
  options.size = size;
  options.pool_bytes = pool_bytes;
  options.zero_holes = zero_holes;
  std::unique_ptr<Arena> arena;
  raise_if_failed(
      without_gil([&] { return Arena::open(std::move(backend), std::move(options), &arena); }));
  return SharedArena(arena.release(), &destroy);
}

// Calls an Arena method that answers with a status and a number of bytes.
template <auto Method, typename... Arguments>
int64_t counted(Arena& arena, Arguments&&... arguments) {
  int64_t bytes = 0;
  raise_if_failed(
      without_gil([&] { return (arena.*Method)(std::forward<Arguments>(arguments)..., &bytes); }));
  return bytes;
}

// Calls an Arena method that only looks. A forked child may not even wait for the mutex.
template <auto Method>
auto observed(const Arena& arena) {
  raise_if_failed(arena.check_process());
  return without_gil([&] { return (arena.*Method)(); });
}

bool is_mapped(const Arena& arena, int64_t page) {
  raise_if_failed(arena.check_process());
  bool mapped = false;
  raise_if_failed(without_gil([&] { return arena.is_mapped(page, &mapped); }));
  return mapped;
}

// The same for a backend.
template <auto Method>
auto observed_backend(const Probe& backend) {
  if (backend.inherited()) {
    raise_if_failed({Code::kInvalidArgument,
                     "backend: it belongs to the process that this one was forked from"});
  }
  return without_gil([&] { return (backend.*Method)(); });
}

void check(const Arena& arena) {
  raise_if_failed(observed<&Arena::check>(arena));
}

std::map<std::string, int64_t> counters(const Arena& arena) {
  const Counters counted = observed<&Arena::counters>(arena);
  return {{"maps", counted.maps},
          {"unmaps", counted.unmaps},
          {"creates", counted.creates},
          {"releases", counted.releases},
          {"failures", counted.failures}};
}

// What a DLPack tensor keeps alive, and the one number that its shape points to.
struct Export {
  dlpack::ManagedTensor managed{};
  int64_t shape = 0;
  SharedArena arena;
};

// Frameworks may call this from any thread, with or without the GIL.
void delete_export(dlpack::ManagedTensor* managed) {
  delete static_cast<Export*>(managed->owner);
}

// A capsule that nobody took ("used_dltensor" once taken) still owns its tensor.
void delete_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  void* managed = PyCapsule_GetPointer(capsule, "dltensor");
  delete_export(static_cast<dlpack::ManagedTensor*>(managed));
}

py::object make_capsule(SharedArena arena, size_t offset, size_t size) {
  raise_if_failed(arena->check_process());
  raise_if_failed(arena->check_range(offset, size));
  auto made = std::make_unique<Export>();
  made->shape = static_cast<int64_t>(size);
  dlpack::Tensor& tensor = made->managed.tensor;
  tensor.data = reinterpret_cast<void*>(arena->address() + offset);
  tensor.device = {arena->device().type, arena->device().ordinal};
  tensor.dimensions = 1;
  tensor.dtype = {0, 8, 1};
  tensor.shape = &made->shape;
  made->managed.owner = made.get();
  made->managed.deleter = &delete_export;
  made->arena = std::move(arena);
  PyObject* capsule = PyCapsule_New(&made->managed, "dltensor", &delete_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  made.release();
  return py::reinterpret_steal<py::object>(capsule);
}

// Bytes of an arena, for the from_dlpack() of any framework.
struct Span {
  SharedArena arena;
  size_t offset;
  size_t size;
};

Fault make_fault(int64_t nth, const std::string& code, const std::optional<std::string>& operation,
                 int64_t times) {
  static const std::map<std::string, Code> codes = {{"out_of_memory", Code::kOutOfMemory},
                                                    {"driver", Code::kDriver}};
  static const std::map<std::string, Operation> operations = {
      {"reserve", Operation::kReserve},     {"free_reservation", Operation::kFreeReservation},
      {"create", Operation::kCreate},       {"map", Operation::kMap},
      {"access", Operation::kAccess},       {"unmap", Operation::kUnmap},
      {"release", Operation::kRelease},     {"record_fence", Operation::kRecordFence},
      {"fence_done", Operation::kFenceDone}};
  const auto known_code = codes.find(code);
  const auto known_operation = operations.find(operation.value_or(""));
  if (nth < 1 || times < 1 || known_code == codes.end() ||
      (operation.has_value() && known_operation == operations.end())) {
    raise_if_failed({Code::kInvalidArgument, "inject: no such call, code or operation"});
  }
  return {nth, times, known_code->second,
          operation.has_value() ? known_operation->second : Operation::kAny};
}

template <typename Made>
std::shared_ptr<Probe> open_backend(Made&& make) {
  std::shared_ptr<Backend> backend;
  raise_if_failed(without_gil([&] { return make(&backend); }));
  return std::make_shared<Probe>(std::move(backend));
}

std::pair<size_t, size_t> memory_info(Probe& backend) {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  raise_if_failed(without_gil([&] { return backend.memory_info(&free_bytes, &total_bytes); }));
  return {free_bytes, total_bytes};
}

void bind_backends(py::module_& module) {
  py::class_<Probe, std::shared_ptr<Probe>>(module, "Backend",
                                            "A device's virtual memory. Any thread may use it.")
      .def_property_readonly("kind", &Probe::kind)
      .def_property_readonly("granularity", &Probe::granularity)
      .def("free_bytes", [](Probe& self) { return memory_info(self).first; })
      .def("total_bytes", [](Probe& self) { return memory_info(self).second; })
      .def("live_handles", &observed_backend<&Probe::live_handles>)
      .def("live_fences", &observed_backend<&Probe::live_fences>)
      .def("live_reservations", &observed_backend<&Probe::live_reservations>)
      .def("created_bytes", &observed_backend<&Probe::created_bytes>)
      .def("calls", &observed_backend<&Probe::calls>)
      .def(
          "inject",
          [](Probe& self, int64_t nth, const std::string& code,
             const std::optional<std::string>& operation,
             int64_t times) { self.inject(make_fault(nth, code, operation, times)); },
          py::arg("nth"), py::arg("code") = "out_of_memory", py::arg("operation") = py::none(),
          py::arg("times") = 1)
      .def("inject_off", &Probe::inject_off)
      .def("hold_fences", &Probe::hold_fences, py::arg("hold") = true)
      .def("pass_fences", &Probe::pass_fences, py::arg("count") = SIZE_MAX);
  module.def(
      "host_backend",
      [](const std::string& name, int min_fd) {
        return open_backend(
            [&](std::shared_ptr<Backend>* made) { return HostBackend::open(name, min_fd, made); });
      },
      py::arg("name"), py::arg("min_fd") = -1);
  module.def(
      "time_bare_pages",
      [](Probe& backend, size_t page_bytes, int64_t rounds, bool keep) {
        BareTimes times;
        raise_if_failed(without_gil(
            [&] { return time_bare_pages(backend.inner(), page_bytes, rounds, keep, &times); }));
        return std::make_pair(times.in_us, times.out_us);
      },
      py::arg("backend"), py::arg("page_bytes"), py::arg("rounds"), py::arg("keep"));
  module.def(
      "host_memory_info",
      [](const std::string& proc, const std::string& cgroup) {
        size_t free_bytes = 0;
        size_t total_bytes = 0;
        raise_if_failed(host_memory_info(&free_bytes, &total_bytes, proc, cgroup));
        return std::make_pair(free_bytes, total_bytes);
      },
      py::arg("proc") = "/proc", py::arg("cgroup") = "/sys/fs/cgroup");
  module.def(
      "cuda_backend",
      [](int ordinal) {
        return open_backend(
            [&](std::shared_ptr<Backend>* made) { return CudaBackend::open(ordinal, made); });
      },
      py::arg("ordinal"));
}

void bind_span(py::module_& module) {
  py::class_<Span>(module, "Span", "Bytes of an arena, for any framework's from_dlpack().")
      .def_readonly("offset", &Span::offset)
      .def_readonly("nbytes", &Span::size)
      .def(
          "__dlpack__",
          [](const Span& self, const py::kwargs&) {
            return make_capsule(self.arena, self.offset, self.size);
          },
          "A new capsule. Options are ignored: no work of ours is pending on these bytes.")
      .def("__dlpack_device__", [](const Span& self) {
        const DlpackDevice device = self.arena->device();
        return std::make_pair(device.type, device.ordinal);
      });
}

}  // namespace

void bind_arena(py::module_& module) {
  bind_backends(module);
  bind_span(module);
  py::class_<Arena, SharedArena>(module, "Arena", "A reservation and the pages mapped into it.")
      .def(py::init(&open_arena), py::arg("backend"), py::arg("regions"), py::arg("pages"),
           py::arg("size"), py::arg("pool_bytes") = 0, py::arg("zero_holes") = false)
      .def("map", &counted<&Arena::map, const std::vector<int64_t>&>, py::arg("pages"))
      .def("unmap", &counted<&Arena::unmap, const std::vector<int64_t>&>, py::arg("pages"))
      .def("trim", &counted<&Arena::trim, size_t>, py::arg("keep_bytes") = 0)
      .def("retry_quarantine", &counted<&Arena::retry_quarantine>)
      .def("uncover", &counted<&Arena::uncover>)
      .def("is_mapped", &is_mapped, py::arg("page"))
      .def("mapped_pages", &observed<&Arena::mapped_pages>)
      .def("created_bytes", &observed<&Arena::created_bytes>)
      .def("mapped_bytes", &observed<&Arena::mapped_bytes>)
      .def("pooled_bytes", &observed<&Arena::pooled_bytes>)
      .def("quarantined_bytes", &observed<&Arena::quarantined_bytes>)
      .def("zero_bytes", &observed<&Arena::zero_bytes>)
      .def("bare_places", &observed<&Arena::bare_places>)
      .def("last_failure", &observed<&Arena::last_failure>)
      .def("counters", &counters)
      .def("check", &check)
      .def_property_readonly("address", &Arena::address)
      .def_property_readonly("size", &Arena::size)
      .def_property_readonly("pages", &Arena::pages)
      .def_property_readonly("page_bytes", &Arena::page_bytes)
      .def("tensor", &make_capsule, py::arg("offset"), py::arg("nbytes"))
      .def(
          "span",
          [](SharedArena self, size_t offset, size_t nbytes) {
            raise_if_failed(self->check_range(offset, nbytes));
            return Span{std::move(self), offset, nbytes};
          },
          py::arg("offset"), py::arg("nbytes"));
}

}  // namespace kvcached
