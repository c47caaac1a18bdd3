// The options of a checkpointed call.
#pragma once

#include <Python.h>

#include <optional>

#include "segment/segment.h"

namespace reprise::bindings {

// The bits of `flags`, mirrored in torch_reprise/checkpoint.py.
enum Flags : long {
  kPreserveRngState = 1,
  kEarlyStop = 2,
  kCheckDeterminism = 4,
  kCheckRng = 8,
  kAmbientCheck = 16,
  kAmbientIgnore = 32,
  kPreserveState = 64,
  kCheckValues = 128,
  kOwnContexts = 256,  // a context_fn of the user's
};

SegmentOptions options_of(long flags);

// The options of checkpoint() among its keyword arguments, where they ask for nothing that
// Python has to look at: most calls.
class PlainOptions {
 public:
  // Nothing where they ask for more, are not valid, or do not say which form.
  static std::optional<PlainOptions> among(PyObject* kwargs);
  // What context_fn is by default; a strong reference, for ever.
  static void set_noop_context_fn(PyObject* function);

  long flags() const { return flags_; }
  bool reentrant() const { return reentrant_; }
  // The arguments without the options; null if nothing is left. `kwargs` is changed.
  PyObject* rest_of(PyObject* kwargs) const;

 private:
  // False if the value is no bool.
  bool set(long flag, PyObject* value);
  // False if this value of this option is not plain.
  bool read(PyObject* name, PyObject* value);

  long flags_ = kPreserveRngState | kEarlyStop | kCheckDeterminism | kCheckRng | kPreserveState;
  bool reentrant_ = false;
  Py_ssize_t count_ = 0;
};

}  // namespace reprise::bindings
