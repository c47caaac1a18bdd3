#include "bindings/context_variables.h"

#include <utility>

#include "bindings/cpython_internals.h"

namespace reprise::bindings {
namespace {

// The thread's own; null where a Context cannot be opened.
Ref current_context() {
  if (reprise_reads_internals() == 0) {
    return Ref();
  }
  PyObject* context = reprise_current_context();
  if (context == nullptr) {
    // A thread has none before it is asked for one.
    checked(PyContext_CopyCurrent());
    context = reprise_current_context();
  }
  return Ref::borrow(context);
}

}  // namespace

ContextVariables ContextVariables::current() {
  const Ref context = current_context();
  return ContextVariables(context ? Ref::borrow(reprise_variables_of(context.get()))
                                  : checked(PyContext_CopyCurrent()));
}

ContextVariablesScope::ContextVariablesScope(const ContextVariables& variables) {
  PyObject* const wanted = variables.held_.get();
  if (wanted == nullptr) {
    return;
  }
  if (context_ = current_context(); context_) {
    outer_ = Ref::borrow(reprise_variables_of(context_.get()));
    if (outer_.get() != wanted) {
      reprise_set_variables_of(context_.get(), wanted);
    }
    return;
  }
  context_ = checked(PyContext_Copy(wanted));
  if (PyContext_Enter(context_.get()) != 0) {
    throw_python_error();
  }
}

ContextVariablesScope::~ContextVariablesScope() {
  if (!context_ || (outer_ && outer_.get() == reprise_variables_of(context_.get()))) {
    return;
  }
  const ErrorSetAside outer_error;  // what a variable held may be finalized
  if (outer_) {
    reprise_set_variables_of(context_.get(), outer_.get());
  } else {
    PyContext_Exit(context_.get());
  }
}

}  // namespace reprise::bindings
