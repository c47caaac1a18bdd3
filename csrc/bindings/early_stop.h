// Leaving fn when its replay has all it needs.
//
// Note [Leaving an operator]
//
//   def fn(x, w):
//       return torch.tanh(x @ w)      # saves x, w, and last the result of tanh
//
// The last tensor is offered from inside of tanh. An exception thrown there
// unwinds some twenty frames of C++ and is translated twice on its way to Python:
// as much as all other bookkeeping of a small segment. Where the rest of the
// operator costs less than that (the core decides), it may finish instead, and
// the exception is raised in the frame that called it, at the call, which is
// where the thrown one would have come out. Nothing of fn runs in between.
//
// CPython has one door for that: a pending call (Py_AddPendingCall), which the
// main thread makes right after the call instruction that is executing. Other
// Python code may run first (a finalizer, a weak reference's callback, when the
// operator's arguments go), so the pending call looks at the frame: in any but
// the one that it is meant for it puts itself back. It is used only if the
// instruction is a call, since after an operator such as x + y the interpreter
// goes on to other instructions first, `__exit__` of a context among them.
//
// Where all this does not hold (other threads, other versions of CPython) the
// exception is thrown through the operator.
#pragma once

#include <Python.h>

namespace reprise::bindings {

// The exception type that ends a replay. Strong, for ever.
PyObject* early_stop_type();

// See Host::stop_after_operator. Without the interpreter lock.
bool stop_after_operator() noexcept;

// Around one run of fn on this thread: a stop that was asked for and not raised
// before fn ended is forgotten.
class StopScope {
 public:
  StopScope();
  ~StopScope();
  StopScope(const StopScope&) = delete;
  StopScope& operator=(const StopScope&) = delete;

  // Was a stop asked for and not raised? Then fn ended with the operator that was
  // executing, or with a function in C around it.
  bool ended_by_itself() const;

 private:
  const void* outer_entry_;
  bool outer_asked_;
};

}  // namespace reprise::bindings
