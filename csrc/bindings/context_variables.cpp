#include "bindings/context_variables.h"

#include <utility>

#include "bindings/frames.h"

namespace reprise::bindings {
namespace {

// Null where a Context cannot be opened.
Ref current_mapping() {
  if (reprise_frames_supported() == 0) {
    return Ref();
  }
  PyObject* mapping = reprise_context_variables();
  if (mapping == nullptr) {
    // A thread has no context before it is asked for one.
    checked(PyContext_CopyCurrent());
    mapping = reprise_context_variables();
  }
  return Ref::borrow(mapping);
}

}  // namespace

ContextVariables ContextVariables::current() {
  Ref mapping = current_mapping();
  return ContextVariables(mapping ? std::move(mapping) : checked(PyContext_CopyCurrent()));
}

ContextVariablesScope::ContextVariablesScope(const ContextVariables& variables) {
  PyObject* const wanted = variables.held_.get();
  if (wanted == nullptr) {
    return;
  }
  if (outer_ = current_mapping(); outer_) {
    if (outer_.get() != wanted) {
      reprise_set_context_variables(wanted);
    }
    return;
  }
  entered_ = checked(PyContext_Copy(wanted));
  if (PyContext_Enter(entered_.get()) != 0) {
    throw_python_error();
  }
}

ContextVariablesScope::~ContextVariablesScope() {
  if (outer_ && outer_.get() != reprise_context_variables()) {
    const ErrorSetAside outer_error;  // what a variable held may be finalized
    reprise_set_context_variables(outer_.get());
  }
  if (entered_) {
    const ErrorSetAside outer_error;
    PyContext_Exit(entered_.get());
  }
}

}  // namespace reprise::bindings
