// BlockQueue: the free queue that an engine's pool of block objects keeps, on top of Blocks.
//
// It speaks in the engine's own objects: they stay in the engine's list and are found by their
// position, which must be the value of their `block_id`. A freed object is cached where its hash is
// not None. Written against CPython itself: an engine calls it for each allocation, and the
// dispatch of a binding library would cost more than the work.
#include <Python.h>
#include <structmember.h>

#include <memory>
#include <new>
#include <string>
#include <vector>

#include "bindings/bindings.hpp"
#include "blocks.hpp"

namespace py = pybind11;

namespace kvcached {
namespace {

// Reads one attribute of the engine's block objects: straight from its slot where the class has
// __slots__, through the ordinary look-up where it has not.
class Attribute {
 public:
  Attribute(const py::object& sample, const std::string& name)
      : type_(Py_TYPE(sample.ptr())),
        name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str()))) {
    py::object descriptor = py::getattr(py::type::of(sample), name_, py::none());
    if (Py_TYPE(descriptor.ptr()) != &PyMemberDescr_Type) return;
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member;
    if (member->type == T_OBJECT_EX) offset_ = member->offset;
  }

  // A new reference; nullptr with an exception set where there is no such attribute.
  PyObject* get(PyObject* object) const {
    if (offset_ >= 0 && Py_TYPE(object) == type_) {
      PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
      if (value != nullptr) {
        Py_INCREF(value);
        return value;
      }
    }
    return PyObject_GetAttr(object, name_.ptr());
  }

 private:
  PyTypeObject* type_;
  py::object name_;
  Py_ssize_t offset_ = -1;
};

struct Queue {
  std::shared_ptr<Blocks> blocks;
  py::list objects;
  Attribute id;
  Attribute hash;
  std::vector<int32_t> ids;     // scratch
  std::vector<uint8_t> cached;  // scratch
};

struct QueueObject {
  PyObject_HEAD Queue* queue;
};

Queue& queue_of(PyObject* self) {
  return *reinterpret_cast<QueueObject*>(self)->queue;
}

// Runs `work` (which returns a new reference) and turns C++ exceptions into Python's.
template <typename Work>
PyObject* guarded(Work&& work) {
  try {
    return work();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

PyObject* fail(const Status& status) {
  return guarded([&]() -> PyObject* {
    raise_if_failed(status);
    return nullptr;
  });
}

bool read_id(const Queue& queue, PyObject* object, int32_t* id) {
  PyObject* value = queue.id.get(object);
  if (value == nullptr) return false;
  const long number = PyLong_AsLong(value);
  Py_DECREF(value);
  if (number == -1 && PyErr_Occurred() != nullptr) return false;
  *id = number < 0 || number > INT32_MAX ? -1 : static_cast<int32_t>(number);
  return true;
}

bool read_cached(const Queue& queue, PyObject* object, uint8_t* cached) {
  PyObject* value = queue.hash.get(object);
  if (value == nullptr) return false;
  *cached = value != Py_None;
  Py_DECREF(value);
  return true;
}

PyObject* take(Queue& queue, int64_t count) {
  if (count == 0) return PyList_New(0);
  if (count > 0 && count <= queue.blocks->available()) queue.ids.resize(count);
  const Status status = queue.blocks->alloc(count, queue.ids.data());
  if (status.code() == Code::kOutOfMemory) {
    PyErr_SetString(PyExc_ValueError, status.message().c_str());
    return nullptr;
  }
  if (!status) return fail(status);
  PyObject* list = PyList_New(count);
  if (list == nullptr) return nullptr;
  for (int64_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(queue.objects.ptr(), queue.ids[i]);
    Py_INCREF(object);
    PyList_SET_ITEM(list, i, object);
  }
  return list;
}

PyObject* queue_popleft_n(PyObject* self, PyObject* argument) {
  const long long count = PyLong_AsLongLong(argument);
  if (count == -1 && PyErr_Occurred() != nullptr) return nullptr;
  return guarded([&] { return take(queue_of(self), count); });
}

PyObject* queue_popleft(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject* list = take(queue_of(self), 1);
    if (list == nullptr) return nullptr;
    PyObject* object = PyList_GET_ITEM(list, 0);
    Py_INCREF(object);
    Py_DECREF(list);
    return object;
  });
}

PyObject* queue_remove(PyObject* self, PyObject* object) {
  Queue& queue = queue_of(self);
  int32_t id;
  if (!read_id(queue, object, &id)) return nullptr;
  const Status status = queue.blocks->take(id);
  if (!status) return fail(status);
  Py_RETURN_NONE;
}

PyObject* queue_append(PyObject* self, PyObject* object) {
  Queue& queue = queue_of(self);
  int32_t id;
  uint8_t cached;
  if (!read_id(queue, object, &id) || !read_cached(queue, object, &cached)) return nullptr;
  const Status status = queue.blocks->free(&id, &cached, 1);
  if (!status) return fail(status);
  Py_RETURN_NONE;
}

PyObject* append_all(Queue& queue, PyObject* sequence) {
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
  PyObject** items = PySequence_Fast_ITEMS(sequence);
  queue.ids.resize(count);
  queue.cached.resize(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read_id(queue, items[i], &queue.ids[i]) || !read_cached(queue, items[i], &queue.cached[i]))
      return nullptr;
  }
  const Status status = queue.blocks->free(queue.ids.data(), queue.cached.data(), count);
  if (!status) return fail(status);
  Py_RETURN_NONE;
}

PyObject* queue_append_n(PyObject* self, PyObject* objects) {
  PyObject* sequence = PySequence_Fast(objects, "expected a sequence of blocks");
  if (sequence == nullptr) return nullptr;
  PyObject* result = guarded([&] { return append_all(queue_of(self), sequence); });
  Py_DECREF(sequence);
  return result;
}

PyObject* queue_all(PyObject* self, PyObject*) {
  return guarded([&]() -> PyObject* {
    const Queue& queue = queue_of(self);
    std::vector<int32_t> ids;
    queue.blocks->free_ids(ids);
    py::list list;
    for (int32_t id : ids) list.append(queue.objects[id]);
    return list.release().ptr();
  });
}

PyObject* queue_available(PyObject* self, PyObject*) {
  return PyLong_FromLongLong(queue_of(self).blocks->available());
}

PyObject* queue_num_free(PyObject* self, void*) {
  return queue_available(self, nullptr);
}

PyObject* queue_unused(PyObject* self, void*) {
  return PyLong_FromLongLong(queue_of(self).blocks->free_blocks());
}

PyObject* queue_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"blocks", "objects", "hash_attribute", nullptr};
  PyObject *blocks, *objects;
  const char* hash_attribute;
  if (PyArg_ParseTupleAndKeywords(args, kwargs, "OO!s", const_cast<char**>(names), &blocks,
                                  &PyList_Type, &objects, &hash_attribute) == 0)
    return nullptr;
  return guarded([&]() -> PyObject* {
    auto core = py::cast<std::shared_ptr<Blocks>>(py::handle(blocks));
    py::list list = py::reinterpret_borrow<py::list>(objects);
    if (static_cast<int64_t>(list.size()) != core->num_blocks())
      raise_if_failed({Code::kInvalidArgument, std::to_string(list.size()) +
                                                   " block objects for a pool of " +
                                                   std::to_string(core->num_blocks())});
    const py::object sample = list[0];
    std::unique_ptr<Queue> queue(new Queue{std::move(core),
                                           std::move(list),
                                           Attribute(sample, "block_id"),
                                           Attribute(sample, hash_attribute),
                                           {},
                                           {}});
    queue->ids.resize(1);
    PyObject* self = type->tp_alloc(type, 0);
    if (self != nullptr) reinterpret_cast<QueueObject*>(self)->queue = queue.release();
    return self;
  });
}

int queue_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Queue* queue = reinterpret_cast<QueueObject*>(self)->queue;
  if (queue != nullptr) Py_VISIT(queue->objects.ptr());
  return 0;
}

int queue_clear(PyObject* self) {
  delete reinterpret_cast<QueueObject*>(self)->queue;
  reinterpret_cast<QueueObject*>(self)->queue = nullptr;
  return 0;
}

void queue_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  queue_clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef kMethods[] = {
    {"popleft", queue_popleft, METH_NOARGS, "The next free block; ValueError where there is none."},
    {"popleft_n", queue_popleft_n, METH_O, "The next n free blocks; ValueError on a shortage."},
    {"remove", queue_remove, METH_O, "Takes a free or cached block into use."},
    {"append", queue_append, METH_O, "Ends the use of a block."},
    {"append_n", queue_append_n, METH_O, "Ends the use of blocks."},
    {"prepend_n", queue_append_n, METH_O, "The same: the page decides who is reused first."},
    {"get_all_free_blocks", queue_all, METH_NOARGS, "Free and cached blocks, in order of use."},
    {"available", queue_available, METH_NOARGS, "Free and cached blocks: how many."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef kProperties[] = {
    {"num_free_blocks", queue_num_free, nullptr, "Free and cached blocks: how many.", nullptr},
    {"num_unused_blocks", queue_unused, nullptr, "Free blocks that hold nothing.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot kSlots[] = {{Py_tp_new, reinterpret_cast<void*>(queue_new)},
                        {Py_tp_dealloc, reinterpret_cast<void*>(queue_dealloc)},
                        {Py_tp_traverse, reinterpret_cast<void*>(queue_traverse)},
                        {Py_tp_clear, reinterpret_cast<void*>(queue_clear)},
                        {Py_tp_methods, kMethods},
                        {Py_tp_getset, kProperties},
                        {0, nullptr}};

PyType_Spec kSpec = {"kvcached.vmm_ops.BlockQueue", sizeof(QueueObject), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, kSlots};

}  // namespace

void bind_block_queue(pybind11::module_& module) {
  py::object type = py::reinterpret_steal<py::object>(PyType_FromSpec(&kSpec));
  if (!type) throw py::error_already_set();
  module.attr("BlockQueue") = type;
}

}  // namespace kvcached
