#include "bindings/call_options.h"

#include <algorithm>
#include <array>

#include "bindings/cpython_internals.h"
#include "bindings/python_object.h"

namespace reprise::bindings {

SegmentOptions options_of(long flags) {
  return {.ambient = (flags & kAmbientCheck) != 0    ? AmbientPolicy::kCheck
                     : (flags & kAmbientIgnore) != 0 ? AmbientPolicy::kIgnore
                                                     : AmbientPolicy::kRestore,
          .preserve_rng_state = (flags & kPreserveRngState) != 0,
          .early_stop = (flags & kEarlyStop) != 0,
          .check_determinism = (flags & kCheckDeterminism) != 0,
          .check_values = (flags & kCheckValues) != 0,
          .check_rng = (flags & kCheckRng) != 0};
}

namespace {

PyObject* g_noop_context_fn = nullptr;

// Interned, as the names of keyword arguments and what a program writes out are: compared
// by address.
struct Names {
  PyObject* use_reentrant = PyUnicode_InternFromString("use_reentrant");
  PyObject* preserve_rng_state = PyUnicode_InternFromString("preserve_rng_state");
  PyObject* early_stop = PyUnicode_InternFromString("early_stop");
  PyObject* determinism_check = PyUnicode_InternFromString("determinism_check");
  PyObject* context_fn = PyUnicode_InternFromString("context_fn");
  PyObject* debug = PyUnicode_InternFromString("debug");
  PyObject* respect_hooks = PyUnicode_InternFromString("respect_saved_tensors_hooks");
  // Values of determinism_check.
  PyObject* by_default = PyUnicode_InternFromString("default");
  PyObject* none = PyUnicode_InternFromString("none");
  // Of what runs a graph of Dynamo's that has segments in it, where nobody compiles it.
  PyObject* wrapper = PyUnicode_InternFromString("/torch/_higher_order_ops/wrap.py");

  static const Names& get() {
    static const Names names;
    return names;
  }
  std::array<PyObject*, 7> options() const {
    return {use_reentrant, preserve_rng_state, early_stop, determinism_check, context_fn,
            debug,         respect_hooks};
  }
};

// Is it, as far as can be seen, not such a graph that calls checkpoint()? Where that is not known
// Python looks: called_by_compiled_code() in torch_reprise/_tracing.py.
bool is_called_by_a_program() {
  PyCodeObject* code = nullptr;
  int instruction = 0;
  const void* frame = reprise_next_frame(nullptr, &code, &instruction);  // checkpoint's own
  do {
    frame = frame == nullptr ? nullptr : reprise_next_frame(frame, &code, &instruction);
  } while (frame != nullptr && code == nullptr);
  return frame != nullptr &&
         PyUnicode_Tailmatch(code->co_filename, Names::get().wrapper, 0, PY_SSIZE_T_MAX, 1) == 0;
}

}  // namespace

void PlainOptions::set_noop_context_fn(PyObject* function) { g_noop_context_fn = function; }

bool PlainOptions::set(long flag, PyObject* value) {
  flags_ = value == Py_True ? flags_ | flag : flags_ & ~flag;
  return PyBool_Check(value) != 0;
}

bool PlainOptions::read(PyObject* name, PyObject* value) {
  const Names& names = Names::get();
  if (name == names.use_reentrant) {
    reentrant_ = value == Py_True;
    return PyBool_Check(value) != 0;
  }
  if (name == names.preserve_rng_state) {
    // Dynamo's graph asks for False and does not mean it.
    return set(kPreserveRngState, value) && (value == Py_True || is_called_by_a_program());
  }
  if (name == names.early_stop) {
    return set(kEarlyStop, value);
  }
  if (name == names.determinism_check) {
    if (value == names.none) {
      flags_ &= ~(kCheckDeterminism | kCheckRng);
    }
    return value == names.none || value == names.by_default;
  }
  return name == names.context_fn ? value == g_noop_context_fn
         : name == names.debug    ? value == Py_False
                                  : value == Py_None;
}

std::optional<PlainOptions> PlainOptions::among(PyObject* kwargs) {
  const Names& names = Names::get();
  const auto all = names.options();
  PlainOptions options;
  bool says_which_form = false;
  PyObject *name = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(kwargs, &position, &name, &value) != 0;) {
    if (std::find(all.begin(), all.end(), name) != all.end()) {
      ++options.count_;
      says_which_form = says_which_form || name == names.use_reentrant;
      if (!options.read(name, value)) {
        return std::nullopt;
      }
    } else if (PyUnicode_CHECK_INTERNED(name) == 0) {
      return std::nullopt;  // it may be one all the same
    }
  }
  return says_which_form ? std::make_optional(options) : std::nullopt;
}

PyObject* PlainOptions::rest_of(PyObject* kwargs) const {
  if (PyDict_GET_SIZE(kwargs) == count_) {
    return nullptr;
  }
  for (PyObject* name : Names::get().options()) {
    if (PyDict_Contains(kwargs, name) == 1 && PyDict_DelItem(kwargs, name) != 0) {
      throw_python_error();
    }
  }
  return kwargs;
}

}  // namespace reprise::bindings
