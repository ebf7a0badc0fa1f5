// The bindings are the only files that know Python. Each binds one part of the core.
#pragma once

#include <pybind11/pybind11.h>

#include "status.hpp"

namespace kvcached {

// Raises the Python exception of kvcached.errors that belongs to a failed status.
void raise_if_failed(const Status& status);

void bind_arena(pybind11::module_& module);
void bind_block_queue(pybind11::module_& module);
void bind_blocks(pybind11::module_& module);
void bind_mapper(pybind11::module_& module);
void bind_segment(pybind11::module_& module);

}  // namespace kvcached
