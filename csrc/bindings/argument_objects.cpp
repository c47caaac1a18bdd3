#include "bindings/argument_objects.h"

namespace reprise::bindings {
namespace {

bool is_container(PyObject* value) { return PyList_CheckExact(value) || PyDict_CheckExact(value); }

Ref shallow_copy(PyObject* container) {
  return checked(PyList_CheckExact(container)
                     ? PyList_GetSlice(container, 0, PyList_GET_SIZE(container))
                     : PyDict_Copy(container));
}

// The dict with copies of the lists and dicts in it.
Ref copy_of(PyObject* dict) {
  Ref copy = checked(PyDict_Copy(dict));
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value) != 0;) {
    if (is_container(value)) {
      const Ref inner = shallow_copy(value);
      if (PyDict_SetItem(copy.get(), key, inner.get()) != 0) {
        throw_python_error();
      }
    }
  }
  return copy;
}

bool same_items(PyObject* a, PyObject* b) {
  if (Py_TYPE(a) != Py_TYPE(b)) {
    return false;
  }
  if (PyList_CheckExact(a)) {
    if (PyList_GET_SIZE(a) != PyList_GET_SIZE(b)) {
      return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(a); ++i) {
      if (PyList_GET_ITEM(a, i) != PyList_GET_ITEM(b, i)) {
        return false;
      }
    }
    return true;
  }
  if (PyDict_GET_SIZE(a) != PyDict_GET_SIZE(b)) {
    return false;
  }
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(a, &position, &key, &value) != 0;) {
    if (PyDict_GetItem(b, key) != value) {
      return false;
    }
  }
  return true;
}

// Is the dict what `begin` is a copy of?
bool as_it_was(PyObject* dict, PyObject* begin) {
  if (PyDict_GET_SIZE(dict) != PyDict_GET_SIZE(begin)) {
    return false;
  }
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value) != 0;) {
    PyObject* then = PyDict_GetItem(begin, key);
    if (then == nullptr || (is_container(value) ? !same_items(value, then) : value != then)) {
      return false;
    }
  }
  return true;
}

void set_content(PyObject* dict, PyObject* content) {
  PyDict_Clear(dict);
  if (PyDict_Update(dict, content) != 0) {
    throw_python_error();
  }
}

}  // namespace

void ArgumentObjects::note(const std::vector<PyObject*>& objects) {
  for (PyObject* object : objects) {
    const bool of_many = PyType_Check(object) || PyModule_Check(object);
    PyObject** dict = of_many ? nullptr : _PyObject_GetDictPtr(object);
    if (dict != nullptr && *dict != nullptr && PyDict_CheckExact(*dict)) {
      noted_.push_back({Ref::borrow(*dict), copy_of(*dict)});
    }
  }
}

void ArgumentObjects::settle() {
  std::vector<Noted> changed;
  for (auto& noted : noted_) {
    if (!as_it_was(noted.dict.get(), noted.begin.get())) {
      changed.push_back(std::move(noted));
    }
  }
  noted_ = std::move(changed);
}

ArgumentObjectsScope::ArgumentObjectsScope(const ArgumentObjects& objects) {
  for (const auto& [dict, begin] : objects.noted_) {
    replaced_.push_back({Ref::borrow(dict.get()), checked(PyDict_Copy(dict.get()))});
    const Ref fresh = copy_of(begin.get());
    set_content(dict.get(), fresh.get());
  }
}

ArgumentObjectsScope::~ArgumentObjectsScope() {
  if (replaced_.empty()) {
    return;
  }
  const ErrorSetAside outer_error;
  for (const auto& [dict, now] : replaced_) {
    PyDict_Clear(dict.get());
    PyDict_Update(dict.get(), now.get());
  }
}

}  // namespace reprise::bindings
