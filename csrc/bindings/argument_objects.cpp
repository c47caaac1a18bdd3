#include "bindings/argument_objects.h"

#include <algorithm>

#include "bindings/reach.h"

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

// The keys under which the dict has something else than `begin`, a copy of it; null if none.
Ref changed_keys(PyObject* dict, PyObject* begin) {
  Ref keys;
  const auto add = [&keys](PyObject* key) {
    if (!keys) {
      keys = checked(PySet_New(nullptr));
    }
    if (PySet_Add(keys.get(), key) != 0) {
      throw_python_error();
    }
  };
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value) != 0;) {
    PyObject* then = PyDict_GetItem(begin, key);
    if (then == nullptr || (is_container(value) ? !same_items(value, then) : value != then)) {
      add(key);
    }
  }
  for (Py_ssize_t position = 0; PyDict_Next(begin, &position, &key, &value) != 0;) {
    if (PyDict_GetItem(dict, key) == nullptr) {
      add(key);
    }
  }
  return keys;
}

// Gives the dict what `from` has under `keys`, an iterable. An error is left set.
bool copy_items(PyObject* dict, PyObject* from, PyObject* keys) {
  const Ref iterator = Ref::steal(PyObject_GetIter(keys));
  while (iterator) {
    const Ref key = Ref::steal(PyIter_Next(iterator.get()));
    if (!key) {
      break;
    }
    if (PyObject* value = PyDict_GetItem(from, key.get())) {
      PyDict_SetItem(dict, key.get(), value);
    } else if (PyDict_GetItem(dict, key.get()) != nullptr) {
      PyDict_DelItem(dict, key.get());
    }
  }
  return PyErr_Occurred() == nullptr;
}

// Of the tensors in a list or dict of our own; `depth`: 1 if those in it are copies of ours as
// well.
void let_go_of_history(PyObject* container, int depth) {
  if (PyList_CheckExact(container)) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) {
      if (Ref values = without_history(PyList_GET_ITEM(container, i))) {
        PyList_SetItem(container, i, values.release());
      }
    }
    return;
  }
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(container, &position, &key, &value) != 0;) {
    if (const Ref values = without_history(value)) {  // a key that is there: no resizing
      PyDict_SetItem(container, key, values.get());
    } else if (depth > 0 && is_container(value)) {
      let_go_of_history(value, depth - 1);
    }
  }
}

// What a replay needs of the attributes that the forward began with.
Ref what_is_kept(PyObject* begin, PyObject* keys) {
  Ref kept = checked(PyDict_New());
  if (!copy_items(kept.get(), begin, keys)) {
    throw_python_error();
  }
  let_go_of_history(kept.get(), 1);
  return kept;
}

}  // namespace

void ArgumentObjects::note(const std::vector<PyObject*>& objects) {
  for (PyObject* object : objects) {
    const bool of_many = PyType_Check(object) || PyModule_Check(object);
    PyObject** dict = of_many ? nullptr : _PyObject_GetDictPtr(object);
    const auto is_noted = [&] {  // given twice, or two objects with one dict
      return std::any_of(noted_.begin(), noted_.end(),
                         [&](const Noted& noted) { return noted.dict.get() == *dict; });
    };
    if (dict != nullptr && *dict != nullptr && PyDict_CheckExact(*dict) && !is_noted()) {
      noted_.push_back({Ref::borrow(*dict), copy_of(*dict), Ref()});
    }
  }
}

void ArgumentObjects::settle() {
  std::vector<Noted> changed;
  for (auto& noted : noted_) {
    noted.keys = changed_keys(noted.dict.get(), noted.begin.get());
    if (noted.keys) {
      noted.begin = what_is_kept(noted.begin.get(), noted.keys.get());
      changed.push_back(std::move(noted));
    }
  }
  noted_ = std::move(changed);
}

void ArgumentObjects::add_to(Lease::Keys& keys) const {
  for (const auto& noted : noted_) {
    keys.push_back(noted.dict.get());
  }
}

ArgumentObjectsScope::ArgumentObjectsScope(const ArgumentObjects& objects) {
  try {
    for (const auto& [dict, begin, changed] : objects.noted_) {
      const Ref fresh = copy_of(begin.get());
      Ref now = checked(PyDict_Copy(dict.get()));
      Ref keys = changed ? Ref::borrow(changed.get()) : changed_keys(dict.get(), begin.get());
      if (!keys) {
        continue;
      }
      replaced_.push_back({Ref::borrow(dict.get()), std::move(now), std::move(keys)});
      if (!copy_items(dict.get(), fresh.get(), replaced_.back().keys.get())) {
        throw_python_error();
      }
    }
  } catch (...) {
    put_back();
    throw;
  }
}

void ArgumentObjectsScope::put_back() {
  if (replaced_.empty()) {
    return;
  }
  const ErrorSetAside outer_error;
  for (const auto& [dict, now, keys] : replaced_) {
    copy_items(dict.get(), now.get(), keys.get());
    PyErr_Clear();
  }
  replaced_.clear();
}

}  // namespace reprise::bindings
