// Dynamo looks at every Python frame that begins while a compiled function runs, and may
// run it compiled. What a segment calls runs without it, in the forward and in each replay:
// a replay is called by backward, where Dynamo would make other graphs of the same frames,
// that save other tensors. A function that was compiled by itself is called as such in both.
#pragma once

#include <Python.h>

#include "bindings/python_object.h"

namespace reprise::bindings {

// Without Dynamo for a scope. Costs a comparison where it is not at work.
class DynamoPaused {
 public:
  DynamoPaused() {
    if (_PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) !=
        _PyEval_EvalFrameDefault) {
      outer_ = set_callback(Py_None);
    }
  }
  ~DynamoPaused() {
    if (outer_) {
      const ErrorSetAside outer_error;
      set_callback(outer_.get());
    }
  }
  DynamoPaused(const DynamoPaused&) = delete;
  DynamoPaused& operator=(const DynamoPaused&) = delete;

 private:
  // Returns the one before; null where there is no Dynamo.
  static Ref set_callback(PyObject* callback) {
    Ref module = Ref::steal(PyImport_ImportModule("torch._C._dynamo.eval_frame"));
    Ref before =
        module ? Ref::steal(PyObject_CallMethod(module.get(), "set_eval_frame", "O", callback))
               : Ref();
    if (!before) {
      PyErr_Clear();
    }
    return before;
  }

  Ref outer_;
};

}  // namespace reprise::bindings
