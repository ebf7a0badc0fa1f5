#include "blocks.hpp"

#include <pybind11/stl.h>

#include <memory>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace kvcached {
namespace {

std::unique_ptr<Blocks> make_blocks(int64_t num_blocks, int64_t blocks_per_page,
                                    bool reserve_block0) {
  raise_if_failed(Blocks::validate(num_blocks, blocks_per_page));
  return std::make_unique<Blocks>(static_cast<int32_t>(num_blocks),
                                  static_cast<int32_t>(blocks_per_page), reserve_block0);
}

int32_t block_id(PyObject* value) {
  const long id = PyLong_AsLong(value);
  if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
  if (id < INT32_MIN || id > INT32_MAX)
    raise_if_failed(
        {Code::kInvalidArgument, "block " + std::to_string(id) + " is not in the pool"});
  return static_cast<int32_t>(id);
}

std::vector<int32_t> block_ids(const py::handle& sequence) {
  py::object fast = py::reinterpret_steal<py::object>(
      PySequence_Fast(sequence.ptr(), "expected a sequence of block ids"));
  if (!fast) throw py::error_already_set();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(fast.ptr());
  std::vector<int32_t> ids(count);
  PyObject** items = PySequence_Fast_ITEMS(fast.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) ids[i] = block_id(items[i]);
  return ids;
}

py::object alloc(Blocks& blocks, int64_t count) {
  int32_t one;
  std::vector<int32_t> many;
  int32_t* ids = &one;
  if (count > 1 && count <= blocks.available()) {
    many.resize(count);
    ids = many.data();
  }
  Status status = blocks.alloc(count, ids);
  if (status.code() == Code::kOutOfMemory) return py::none();  // shortage is a value
  raise_if_failed(status);
  py::list list(count);
  for (int64_t i = 0; i < count; ++i) PyList_SET_ITEM(list.ptr(), i, PyLong_FromLong(ids[i]));
  return list;
}

}  // namespace

void bind_blocks(py::module_& module) {
  using Pages = std::vector<int32_t>;
  py::class_<Blocks, std::shared_ptr<Blocks>>(module, "Blocks")
      .def(py::init([](int64_t num_blocks, int64_t blocks_per_page, bool reserve_block0) {
             return std::shared_ptr<Blocks>(
                 make_blocks(num_blocks, blocks_per_page, reserve_block0));
           }),
           py::arg("num_blocks"), py::arg("blocks_per_page"), py::arg("reserve_block0") = true)
      .def("alloc", &alloc, py::arg("count"))
      .def(
          "free",
          [](Blocks& blocks, const py::handle& ids, bool cached) {
            const Pages list = block_ids(ids);
            const std::vector<uint8_t> flags(cached ? list.size() : 0, 1);
            raise_if_failed(blocks.free(list.data(), cached ? flags.data() : nullptr, list.size()));
          },
          py::arg("ids"), py::arg("cached") = false)
      .def(
          "touch",
          [](Blocks& blocks, const py::handle& ids) {
            const Pages list = block_ids(ids);
            raise_if_failed(blocks.touch(list.data(), list.size()));
          },
          py::arg("ids"))
      .def(
          "uncache",
          [](Blocks& blocks, int64_t count) {
            Pages evicted;
            blocks.uncache(count, evicted);
            return evicted;
          },
          py::arg("count"))
      .def("uncache_all", &Blocks::uncache_all)
      .def(
          "grow",
          [](Blocks& blocks, int64_t count) {
            Pages pages;
            blocks.grow(count, pages);
            return pages;
          },
          py::arg("count"))
      .def(
          "add_page", [](Blocks& blocks, int32_t page) { raise_if_failed(blocks.add_page(page)); },
          py::arg("page"))
      .def(
          "shrink",
          [](Blocks& blocks, int64_t count) {
            Pages pages;
            blocks.shrink(count, pages);
            return pages;
          },
          py::arg("count"))
      .def(
          "reclaim",
          [](Blocks& blocks, int64_t count) {
            Pages pages, evicted;
            blocks.reclaim(count, pages, evicted);
            return std::make_pair(pages, evicted);
          },
          py::arg("count"))
      .def("available", &Blocks::available)
      .def(
          "set_bound",
          [](Blocks& blocks, std::optional<int64_t> bound) {
            blocks.set_bound(bound.value_or(Blocks::kNoBound));
          },
          py::arg("blocks"))
      .def("is_present", &Blocks::is_present, py::arg("page"))
      .def("used_in", &Blocks::used_in, py::arg("page"))
      .def("check", [](const Blocks& blocks) { raise_if_failed(blocks.check()); })
      .def_property_readonly("hits", &Blocks::hits)
      .def_property_readonly("misses", &Blocks::misses)
      .def_property_readonly("evictions", &Blocks::evictions)
      .def_property_readonly("free_blocks", &Blocks::free_blocks)
      .def_property_readonly("cached_blocks", &Blocks::cached_blocks)
      .def_property_readonly("used_blocks", &Blocks::used_blocks)
      .def_property_readonly("num_blocks", &Blocks::num_blocks)
      .def_property_readonly("blocks_per_page", &Blocks::blocks_per_page)
      .def_property_readonly("num_pages", &Blocks::num_pages)
      .def_property_readonly("present_pages", &Blocks::present_pages)
      .def_property_readonly("empty_pages", &Blocks::empty_pages)
      .def_property_readonly("idle_pages", &Blocks::idle_pages);

  bind_block_queue(module);
}

}  // namespace kvcached
