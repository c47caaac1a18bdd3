// Small tools over CPython's C API for the paths that must be fast: the calls
// that run once per segment use it directly, everything else uses pybind11.
#pragma once

#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

namespace reprise::bindings {

// The interpreter lock for a scope, whether or not this thread holds it.
class WithInterpreter {
 public:
  WithInterpreter() : state_(PyGILState_Ensure()) {}
  ~WithInterpreter() { PyGILState_Release(state_); }
  WithInterpreter(const WithInterpreter&) = delete;
  WithInterpreter& operator=(const WithInterpreter&) = delete;

 private:
  PyGILState_STATE state_;
};

// An owned reference. Every member needs the interpreter lock.
class Ref {
 public:
  Ref() = default;
  static Ref steal(PyObject* object) { return Ref(object); }
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    PyObject* old = std::exchange(object_, std::exchange(other.object_, nullptr));
    Py_XDECREF(old);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// Is it a tensor by its type? THPVariable_Check asks isinstance(), which believes what an object
// says of its class (weakref.proxy, mocks).
inline bool is_tensor(PyObject* object) noexcept {
  return PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

// Drops the error that is set, if there is one. Ctrl-C is not lost: it comes again.
inline void drop_error() {
  if (PyErr_Occurred() != nullptr && PyErr_ExceptionMatches(PyExc_KeyboardInterrupt) != 0) {
    PyErr_SetInterrupt();
  }
  PyErr_Clear();
}

// The value of a name in a dict, borrowed; null without a new error if there is none.
// PyDict_GetItem sets the error that may be set aside for its look-up, which takes as long again.
inline PyObject* entry_of(PyObject* dict, PyObject* name) noexcept {
#if PY_VERSION_HEX < 0x030E0000
  if (PyErr_Occurred() == nullptr) [[likely]] {
    PyObject* entry = _PyDict_GetItem_KnownHash(dict, name, PyObject_Hash(name));
    if (entry == nullptr) {
      drop_error();  // of a key that is no string, compared with the name
    }
    return entry;
  }
#endif
  return PyDict_GetItem(dict, name);
}

// Sets an error aside for a scope in which Python code may run, and drops
// one that is left over from it.
class ErrorSetAside {
 public:
  ErrorSetAside() { PyErr_Fetch(&type_, &value_, &traceback_); }
  ~ErrorSetAside() {
    drop_error();
    PyErr_Restore(type_, value_, traceback_);
  }
  ErrorSetAside(const ErrorSetAside&) = delete;
  ErrorSetAside& operator=(const ErrorSetAside&) = delete;

 private:
  PyObject* type_ = nullptr;
  PyObject* value_ = nullptr;
  PyObject* traceback_ = nullptr;
};

// Turns the error that is set into a C++ exception that may travel through
// torch and through threads.
[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

// `object`, or the error that is set.
inline Ref checked(PyObject* object) {
  if (object == nullptr) {
    throw_python_error();
  }
  return Ref::steal(object);
}

}  // namespace reprise::bindings
