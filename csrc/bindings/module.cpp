#include <pybind11/stl.h>
#include <unistd.h>

#include "bindings/bindings.hpp"
#include "watch.hpp"

namespace py = pybind11;

namespace kvcached {

namespace {

bool interpreter_ends() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

}  // namespace

WithoutGil::WithoutGil() : ending_(interpreter_ends()), state_(PyEval_SaveThread()) {}

WithoutGil::~WithoutGil() noexcept(false) {
  while (!ending_ && interpreter_ends()) pause();
  PyEval_RestoreThread(state_);
}

void raise_if_failed(const Status& status) {
  if (status.is_ok()) return;
  const char* name = "KvcachedError";
  switch (status.code()) {
    case Code::kOutOfMemory:
      name = "OutOfMemoryError";
      break;
    case Code::kInvalidArgument:
      name = "InvalidArgumentError";
      break;
    case Code::kDriver:
      name = "DriverError";
      break;
    case Code::kUnavailable:
      name = "UnavailableError";
      break;
    case Code::kLedger:
      name = "LedgerError";
      break;
    case Code::kBusy:
      name = "LedgerBusyError";
      break;
    case Code::kOk:
      break;
  }
  // kvcached.errors is pure Python and imports nothing of ours, so this cannot recurse.
  py::object type = py::module_::import("kvcached.errors").attr(name);
  // A damaged file's words may be quoted, and need not be text.
  const std::string& message = status.message();
  py::object text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
      message.data(), static_cast<Py_ssize_t>(message.size()), "backslashreplace"));
  PyErr_SetObject(type.ptr(), text.ptr());
  throw py::error_already_set();
}

}  // namespace kvcached

PYBIND11_MODULE(vmm_ops, module) {
  module.doc() = "The C++ core of kvcached: virtual memory, blocks and the ledger's segment.";
  kvcached::bind_arena(module);
  kvcached::bind_blocks(module);
  kvcached::bind_segment(module);
  kvcached::bind_mapper(module);
  module.def("end_with", &kvcached::end_with, py::arg("pids"), py::arg("grace_s") = 0.0);
}
