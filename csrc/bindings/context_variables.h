// The variables of contextvars as they were when a segment began, and a scope in which they are so
// again. All with the interpreter lock.
//
// A Context holds an immutable mapping, and gets another one when a variable is set. So a segment
// keeps the mapping, and a replay puts it into the Context that is current, and puts back what that
// Context held, whichever is current then; most find that very one. Where a Context cannot be
// opened (cpython_internals.h), a copy of it is kept, and a copy of that entered for the replay.
#pragma once

#include <Python.h>

#include "bindings/python_object.h"

namespace reprise::bindings {

class ContextVariables {
 public:
  ContextVariables() = default;  // none: a scope with it changes nothing
  static ContextVariables current();
  ContextVariables(ContextVariables&&) = default;
  ContextVariables& operator=(ContextVariables&&) = default;

 private:
  friend class ContextVariablesScope;
  explicit ContextVariables(Ref held) : held_(std::move(held)) {}
  Ref held_;  // the mapping, or a Context that is never entered itself
};

// Changes that are made in it end with it.
class ContextVariablesScope {
 public:
  explicit ContextVariablesScope(const ContextVariables& variables);
  ~ContextVariablesScope();
  ContextVariablesScope(const ContextVariablesScope&) = delete;
  ContextVariablesScope& operator=(const ContextVariablesScope&) = delete;

 private:
  Ref context_;  // the one that was current, or one that was entered
  Ref outer_;    // the variables that it had, if it was current
};

}  // namespace reprise::bindings
