// The bindings are the only files that know Python. Each binds one part of the core.
#pragma once

#include <pybind11/pybind11.h>

#include "status.hpp"

namespace kvcached {

// Lets other Python threads run while it lives. Where the interpreter ends meanwhile, its thread
// never comes back: Python before 3.14 would end the thread by unwinding its stack, and this
// destructor with it, which ends the process (as a daemon thread that waits on a ledger would, when
// the ledger is closed at exit).
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil() noexcept(false);  // in case that Python unwinds all the same
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  bool ending_;  // then it is the interpreter's own thread, which goes on
  PyThreadState* state_;
};

// Raises the Python exception of kvcached.errors that belongs to a failed status.
void raise_if_failed(const Status& status);

void bind_arena(pybind11::module_& module);
void bind_block_queue(pybind11::module_& module);
void bind_blocks(pybind11::module_& module);
void bind_mapper(pybind11::module_& module);
void bind_segment(pybind11::module_& module);

}  // namespace kvcached
