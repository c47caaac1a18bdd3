#include "bindings/generators.h"

#include <c10/util/SmallVector.h>
#include <torch/csrc/Generator.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "bindings/python_object.h"

namespace reprise::bindings {
namespace {

PyObject* partial_type() {
  static PyObject* type = [] {
    Ref module = checked(PyImport_ImportModule("functools"));
    return checked(PyObject_GetAttrString(module.get(), "partial")).release();
  }();
  return type;
}

class Search {
 public:
  explicit Search(std::vector<at::Generator>& found) : found_(found) {}

  void callable(PyObject* object) {
    if (PyFunction_Check(object)) {
      function(object);
    } else if (PyMethod_Check(object)) {
      callable(PyMethod_GET_FUNCTION(object));
      attributes(PyMethod_GET_SELF(object));
    } else if (PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(partial_type()))) {
      Ref inner = Ref::steal(PyObject_GetAttrString(object, "func"));
      Ref args = Ref::steal(PyObject_GetAttrString(object, "args"));
      Ref keywords = Ref::steal(PyObject_GetAttrString(object, "keywords"));
      if (inner && args && keywords && is_new(object)) {
        callable(inner.get());
        value(args.get());
        value(keywords.get());
      }
    } else if (!PyCFunction_Check(object)) {
      attributes(object);
      auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
      for (const char* name : {"forward", "__call__"}) {
        Ref method = Ref::steal(PyObject_GetAttrString(type, name));
        if (method && PyFunction_Check(method.get())) {
          function(method.get());
          break;  // a module's __call__ is torch's own
        }
        PyErr_Clear();
      }
    }
    PyErr_Clear();
  }

 private:
  // A generator, or a container of some.
  void value(PyObject* object) {
    if (const at::Generator* generator = as_generator(object)) {
      found_.push_back(*generator);
    } else if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
        item(PySequence_Fast_GET_ITEM(object, i));
      }
    } else if (PyDict_CheckExact(object)) {
      PyObject *key = nullptr, *entry = nullptr;
      for (Py_ssize_t position = 0; PyDict_Next(object, &position, &key, &entry) != 0;) {
        item(entry);
      }
    }
  }

  void item(PyObject* object) {
    if (const at::Generator* generator = as_generator(object)) {
      found_.push_back(*generator);
    }
  }

  void function(PyObject* object) {
    PyObject* closure = PyFunction_GET_CLOSURE(object);
    for (Py_ssize_t i = 0; closure != nullptr && i < PyTuple_GET_SIZE(closure); ++i) {
      PyObject* content = PyCell_GET(PyTuple_GET_ITEM(closure, i));
      if (content != nullptr) {
        value(content);
        if (is_object_with_attributes(content)) {
          attributes(content);
        }
      }
    }
    if (PyObject* defaults = PyFunction_GET_DEFAULTS(object)) {
      value(defaults);
    }
    if (PyObject* defaults = PyFunction_GET_KW_DEFAULTS(object)) {
      value(defaults);
    }
    auto* code = reinterpret_cast<PyCodeObject*>(PyFunction_GET_CODE(object));
    PyObject* globals = PyFunction_GET_GLOBALS(object);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code->co_names); ++i) {
      if (PyObject* global = PyDict_GetItem(globals, PyTuple_GET_ITEM(code->co_names, i))) {
        value(global);
      }
    }
  }

  static bool is_object_with_attributes(PyObject* object) {
    return !PyType_Check(object) && !PyFunction_Check(object) && !PyModule_Check(object);
  }

  // True the first time an object is met.
  bool is_new(PyObject* object) {
    if (std::find(seen_.begin(), seen_.end(), object) != seen_.end()) {
      return false;
    }
    seen_.push_back(object);
    return true;
  }

  // The attributes of an object, and of its submodules if it is a module.
  void attributes(PyObject* object) {
    PyObject** dict = _PyObject_GetDictPtr(object);
    Ref held;
    if (dict == nullptr || *dict == nullptr) {
      // Since 3.11 a dict may not exist before it is asked for.
      if (dict == nullptr && Py_TYPE(object)->tp_dictoffset == 0) {
        return;
      }
      held = Ref::steal(PyObject_GenericGetDict(object, nullptr));
      if (!held || !PyDict_Check(held.get())) {
        PyErr_Clear();
        return;
      }
    } else {
      held = Ref::borrow(*dict);
    }
    if (!is_new(object)) {
      return;
    }
    static PyObject* const modules_name = PyUnicode_InternFromString("_modules");
    // Dicts of a module with tensors alone.
    static PyObject* const parameters_name = PyUnicode_InternFromString("_parameters");
    static PyObject* const buffers_name = PyUnicode_InternFromString("_buffers");
    PyObject *key = nullptr, *entry = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(held.get(), &position, &key, &entry) != 0;) {
      if (PyDict_CheckExact(entry)) {
        if (key == parameters_name || key == buffers_name) {
          continue;
        }
        if (key == modules_name) {
          PyObject *name = nullptr, *submodule = nullptr;
          for (Py_ssize_t i = 0; PyDict_Next(entry, &i, &name, &submodule) != 0;) {
            if (submodule != Py_None) {
              attributes(submodule);
            }
          }
          continue;
        }
      }
      value(entry);
    }
  }

  std::vector<at::Generator>& found_;
  c10::SmallVector<PyObject*, 32> seen_;  // a block has tens of modules, not thousands
};

// Is this type torch.Generator or derived from it? Looking through the bases of
// every attribute's type would be most of the cost of a search, so what was found
// is kept by type and version, which CPython changes with the type's bases and
// does not use twice. Guarded by the interpreter lock.
bool is_generator_type(PyTypeObject* type) noexcept {
  struct Line {
    PyTypeObject* type = nullptr;
    unsigned int version = 0;
    bool yes = false;
  };
  static std::array<Line, 256> lines;
  auto* generator = reinterpret_cast<PyTypeObject*>(THPGeneratorClass);
  const unsigned int version = type->tp_version_tag;
  if (version == 0) {
    return PyType_IsSubtype(type, generator) != 0;
  }
  Line& line = lines[(reinterpret_cast<uintptr_t>(type) >> 4) % lines.size()];
  if (line.type != type || line.version != version) {
    line = {type, version, PyType_IsSubtype(type, generator) != 0};
  }
  return line.yes;
}

}  // namespace

const at::Generator* as_generator(PyObject* object) noexcept {
  return is_generator_type(Py_TYPE(object)) ? &reinterpret_cast<THPGenerator*>(object)->cdata
                                            : nullptr;
}

void find_generators(PyObject* function, std::vector<at::Generator>& found) {
  Search(found).callable(function);
}

}  // namespace reprise::bindings
