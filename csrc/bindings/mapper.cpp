// Binds the mapper. Its mutex is never waited for with the GIL held.
#include "mapper.hpp"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace kvcached {
namespace {

using Pages = Mapper::Pages;

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

// Calls a method that answers with a status and a value.
template <auto Method, typename Answer, typename... Arguments>
Answer asked(Mapper& mapper, const Arguments&... arguments) {
  Answer answer{};
  run([&] { return (mapper.*Method)(arguments..., &answer); });
  return answer;
}

void close(Mapper& mapper) {
  WithoutGil release;
  mapper.close();
}

// A mapper that dies with the GIL held, as Python objects do, joins its thread without it.
void let_go(std::shared_ptr<Mapper> mapper) {
  if (PyGILState_Check() == 0) return;
  WithoutGil release;
  mapper.reset();
}

std::shared_ptr<Mapper> open_mapper(std::shared_ptr<Arena> arena,
                                    std::shared_ptr<MemberHandle> member) {
  std::shared_ptr<Mapper> made;
  run([&] { return Mapper::open(std::move(arena), std::move(member), &made); });
  // A mapper that lives when Python ends is closed then: the driver's own exit handlers must not
  // meet a thread that still calls it.
  py::module_::import("atexit").attr("register")(
      py::cpp_function([alive = std::weak_ptr<Mapper>(made)] {
        if (const std::shared_ptr<Mapper> mapper = alive.lock()) close(*mapper);
      }));
  Mapper* raw = made.get();
  return {raw, [made](Mapper*) mutable { let_go(std::move(made)); }};
}

std::map<std::string, int64_t> counters(Mapper& mapper) {
  const auto counted = asked<&Mapper::counters, MapperCounters>(mapper);
  return {{"kept", counted.kept},
          {"cancelled", counted.cancelled},
          {"ahead_refused", counted.ahead_refused},
          {"fence_failures", counted.fence_failures}};
}

}  // namespace

void bind_mapper(py::module_& module) {
  py::class_<Mapper, std::shared_ptr<Mapper>>(module, "Mapper", "The mapping thread of an arena.")
      .def(py::init(&open_mapper), py::arg("arena"), py::arg("member"))
      .def(
          "submit",
          [](Mapper& self, const Pages& unmap, const Pages& needed, const Pages& ahead,
             uintptr_t stream) { run([&] { return self.submit(unmap, needed, ahead, stream); }); },
          py::arg("unmap"), py::arg("needed"), py::arg("ahead") = Pages(), py::arg("stream") = 0)
      .def(
          "need", [](Mapper& self, const Pages& pages) { run([&] { return self.need(pages); }); },
          py::arg("pages"))
      .def(
          "clear", [](Mapper& self, uintptr_t stream) { run([&] { return self.clear(stream); }); },
          py::arg("stream") = 0)
      .def("wait", &asked<&Mapper::wait, bool, Pages, double>, py::arg("pages"),
           py::arg("timeout_s"))
      .def(
          "give_up",
          [](Mapper& self, const Pages& pages) { run([&] { return self.give_up(pages); }); },
          py::arg("pages"))
      .def("drain", &asked<&Mapper::drain, bool, double>, py::arg("timeout_s"))
      .def("missing", &asked<&Mapper::missing, int64_t, Pages>, py::arg("pages"))
      .def("quarantined_bytes", &asked<&Mapper::quarantined_bytes, int64_t>)
      .def("counters", &counters)
      .def("check", [](Mapper& self) { run([&] { return self.check(); }); })
      .def("close", &close);
}

}  // namespace kvcached
