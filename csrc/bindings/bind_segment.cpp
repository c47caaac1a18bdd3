#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <optional>
#include <utility>

#include "bindings/bind.h"
#include "bindings/call_options.h"
#include "bindings/cpython_internals.h"
#include "bindings/dynamo.h"
#include "bindings/early_stop.h"
#include "bindings/module_memo.h"
#include "bindings/python_host.h"
#include "bindings/python_object.h"
#include "bindings/python_program.h"
#include "bindings/reach.h"
#include "bindings/source_location.h"
#include "fingerprint/element_hash.h"
#include "fingerprint/fingerprint.h"
#include "segment/ledger.h"
#include "segment/reentrant.h"
#include "segment/replay.h"
#include "segment/segment.h"
#include "segment/timeline.h"
#include "torch_compat.h"

namespace py = pybind11;

namespace reprise::bindings {
namespace {

// The two contexts of a context_fn, which torch_reprise/_contexts.py has checked.
// Throws the Python error that is set.
std::pair<Ref, Ref> make_contexts(PyObject* context_fn) {
  Ref pair = checked(PyObject_CallNoArgs(context_fn));
  PyObject* forward = nullptr;
  PyObject* replay = nullptr;
  if (PyArg_ParseTuple(pair.get(), "OO", &forward, &replay) == 0) {
    throw_python_error();
  }
  return {Ref::borrow(forward), Ref::borrow(replay)};
}

// What a run returns, having done nothing: where a tracer (export, the autograd of
// torch.compile) is to see torch's own entry instead, and where it is not as simple.
PyObject* not_run() {
  static PyObject* const marker =
      PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type));
  return marker;
}

// What a call reaches besides tensors among its arguments. `others`: what else they are;
// those that the function may change are left. `given`: generators from the user, a
// tuple or None.
Reach reach_of(PyObject* function, PyObject* given, long flags, std::vector<PyObject*>& others) {
  Reach reach;
  if ((flags & (kPreserveRngState | kPreserveState)) != 0) {
    look_around(function, others, reach);
    if (given != Py_None) {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
        reach.generators.push_back(*as_generator(PyTuple_GET_ITEM(given, i)));
      }
    }
  }
  if ((flags & kPreserveState) == 0) {
    reach.modules.clear();
    reach.buffers.clear();
    reach.tensors.clear();
    others.clear();
  }
  return reach;
}

constexpr const char* kSuppressed =
    "torch_reprise: the forward context of context_fn suppressed an exception that the "
    "checkpointed function raised, so there is nothing to return. Its __exit__ must return "
    "False for exceptions of the function.";

// A segment whose forward is about to run.
struct Begun {
  c10::intrusive_ptr<Segment> segment;
  PythonProgram* program = nullptr;  // the segment's
};

Begun begin_segment(PyObject* function, PyObject* args, PyObject* kwargs, long flags,
                    PyObject* replay_context, PyObject* debug_session, PyObject* generators) {
  std::vector<at::Tensor> inputs;
  std::vector<PyObject*> others;
  auto program = std::make_unique<PythonProgram>(function, args, kwargs, replay_context,
                                                 debug_session, inputs, others);
  Reach reach = reach_of(function, generators, flags, others);
  program->hold(reach, others, (flags & kAmbientIgnore) == 0, (flags & kPreserveState) != 0);
  PythonProgram* held = program.get();
  SegmentOptions options = options_of(flags);
  // Selective checkpointing has a check of its own, which can be turned off.
  options.check_versions = (flags & kOwnContexts) == 0;
  options.may_be_ahead = replay_context == nullptr && debug_session == nullptr;
  return {Segment::begin(std::move(program), inputs, options, current_depth(), reach.generators,
                         reach.tensors),
          held};
}

// Is nothing of a segment wanted: nothing is saved for a backward, or functorch saves it
// in its own way?
bool is_plain_call() { return !c10::GradMode::is_enabled() || compat::inside_functorch(); }

// One checkpointed call in the non-reentrant form. `context_fn`, `debug_session`, and
// `generators`, a tuple, may be None.
PyObject* run(PyObject* function, PyObject* args, PyObject* kwargs, long flags,
              PyObject* context_fn, PyObject* debug_session, PyObject* generators) {
  if (is_plain_call()) {
    return PyObject_Call(function, args, kwargs);
  }
  if (const std::string* message = compat::hooks_disabled_message()) {
    PyErr_SetString(PyExc_RuntimeError, message->c_str());
    return nullptr;
  }
  Ref forward_context;
  Ref replay_context;
  if (context_fn != Py_None) {
    std::tie(forward_context, replay_context) = make_contexts(context_fn);
  }
  const Begun begun = begin_segment(function, args, kwargs, flags, replay_context.get(),
                                    debug_session == Py_None ? nullptr : debug_session, generators);
  const auto& segment = begun.segment;
  bool suppressed = false;
  Ref result;
  {
    const RowTimer timer(segment->row(), &LedgerRow::forward_seconds);
    const Timeline::Span span(segment->timeline().get(), Timeline::Kind::kForward,
                              Timeline::Kind::kForwardEnd);
    compat::HookScope hooks(host().make_hook_pair(segment));
    const DynamoPaused paused;
    result = call_in_context(forward_context.get(), function, args, kwargs, &suppressed);
  }
  if (suppressed) {
    set_checkpoint_error_message(kSuppressed);
  }
  if (!result) {
    return nullptr;
  }
  begun.program->settle();
  segment->end_forward(is_tensor(result.get()) ? &THPVariable_Unpack(result.get()) : nullptr);
  return result.release();
}

// run_segment(function, args, kwargs, flags, context_fn, debug_session, generators)
PyObject* run_segment(PyObject*, PyObject* const* argv, Py_ssize_t argc) {
  HANDLE_TH_ERRORS
  if (argc != 7) {
    PyErr_Format(PyExc_TypeError, "run_segment takes 7 arguments, got %zd", argc);
    return nullptr;
  }
  const long flags = PyLong_AsLong(argv[3]);
  return run(argv[0], argv[1], argv[2], flags, argv[4], argv[5], argv[6]);
  END_HANDLE_TH_ERRORS
}

// A segment whose forward somebody else runs, between two calls of ours: hooks of a module
// (composable checkpointing). On this thread, and properly nested.
class OpenSegment {
 public:
  explicit OpenSegment(Begun begun)
      : begun_(std::move(begun)),
        timer_(std::in_place, begun_.segment->row(), &LedgerRow::forward_seconds),
        span_(std::in_place, begun_.segment->timeline().get(), Timeline::Kind::kForward,
              Timeline::Kind::kForwardEnd),
        hooks_(std::in_place, host().make_hook_pair(begun_.segment)) {}

  // The forward returned.
  void end() {
    stop();
    begun_.program->settle();
    begun_.segment->end_forward();
    begun_ = {};
  }
  // It raised.
  void abandon() {
    stop();
    begun_ = {};
  }

 private:
  void stop() {
    hooks_.reset();
    span_.reset();
    timer_.reset();
  }

  Begun begun_;
  std::optional<RowTimer> timer_;
  std::optional<Timeline::Span> span_;
  std::optional<compat::HookScope> hooks_;
};

// Null where nothing of a segment is wanted.
std::unique_ptr<OpenSegment> open_segment(const py::object& function, const py::tuple& args,
                                          const py::dict& kwargs, long flags,
                                          const py::object& replay_context,
                                          const py::object& debug_session) {
  if (is_plain_call()) {
    return nullptr;
  }
  if (const std::string* message = compat::hooks_disabled_message()) {
    throw std::runtime_error(*message);
  }
  return std::make_unique<OpenSegment>(
      begin_segment(function.ptr(), args.ptr(), kwargs.ptr(), flags,
                    replay_context.is_none() ? nullptr : replay_context.ptr(),
                    debug_session.is_none() ? nullptr : debug_session.ptr(), Py_None));
}

// Which of what fn returns did it not make: arguments, parameters, buffers, constants? They keep
// the history that they have, or none, unless fn has changed them.
class WasThereBefore {
 public:
  WasThereBefore(const std::vector<at::Tensor>& inputs, const Segment& segment)
      : inputs_(inputs), segment_(segment) {
    for (const auto& input : inputs) {
      versions_.push_back(compat::version_of(input));
    }
  }
  bool operator()(const at::Tensor& output) const {
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (inputs_[i].is_same(output)) {
        return compat::version_of(output) == versions_[i];
      }
    }
    return compat::has_history_from_before(output, segment_.first_node()) ||
           segment_.reached().has_left_alone(output.unsafeGetTensorImpl());
  }

 private:
  const std::vector<at::Tensor>& inputs_;
  const Segment& segment_;
  c10::SmallVector<uint32_t, 8> versions_;
};

// One checkpointed call in the reentrant form. `generators`, a tuple, may be None.
PyObject* run_reentrant(PyObject* function, PyObject* args, PyObject* kwargs, long flags,
                        PyObject* generators) {
  if (is_plain_call()) {
    return PyObject_Call(function, args, kwargs);
  }
  std::vector<at::Tensor> inputs;
  std::vector<PyObject*> others;
  auto program =
      std::make_unique<PythonProgram>(function, args, kwargs, nullptr, nullptr, inputs, others);
  bool any_requires_grad = false;
  for (const auto& input : inputs) {
    any_requires_grad |= input.requires_grad();
  }
  if (!any_requires_grad) {
    if (PyErr_WarnEx(PyExc_UserWarning,
                     "None of the inputs have requires_grad=True, so with use_reentrant=True "
                     "nothing inside of the checkpointed function gets a gradient. Pass a tensor "
                     "that requires grad, or use_reentrant=False.",
                     2) != 0) {
      return nullptr;
    }
    const c10::AutoGradMode no_grad(false);
    return PyObject_Call(function, args, kwargs);
  }
  Reach reach = reach_of(function, generators, flags, others);
  program->hold(reach, others, (flags & kAmbientIgnore) == 0, (flags & kPreserveState) != 0);
  PythonProgram& held = *program;  // the segment's, from now on
  auto segment = Segment::begin(std::move(program), inputs, options_of(flags), current_depth(),
                                reach.generators, reach.tensors);
  reach = Reach();
  if (segment->row()) {
    auto lock = Ledger::get().lock_rows();
    segment->row()->reentrant = true;
  }
  const WasThereBefore was_there_before(inputs, *segment);
  Ref result;
  {
    const RowTimer timer(segment->row(), &LedgerRow::forward_seconds);
    const Timeline::Span span(segment->timeline().get(), Timeline::Kind::kForward,
                              Timeline::Kind::kForwardEnd);
    const c10::AutoGradMode no_grad(false);
    const DynamoPaused paused;
    result = Ref::steal(PyObject_Call(function, args, kwargs));
  }
  if (!result) {
    return nullptr;
  }
  held.settle();
  segment->end_forward();
  std::vector<at::Tensor> found;
  const Structure structure(result.get(), found, nullptr, Structure::Of::kResult);
  result = Ref();
  if (found.empty()) {
    size_t next = 0;
    return structure.build(found, &next).release();
  }
  std::vector<std::optional<at::Tensor>> outputs(found.begin(), found.end());
  for (auto& output : outputs) {
    if (was_there_before(*output)) {
      output.reset();
    }
  }
  std::vector<Ref> joined;
  auto wrapped = join_graph(std::move(segment), inputs, outputs);
  for (size_t i = 0; i < found.size(); ++i) {
    joined.push_back(checked(THPVariable_Wrap(wrapped[i].has_value() ? *wrapped[i] : found[i])));
  }
  size_t next = 0;
  return structure.build(joined, &next).release();
}

// run_reentrant(function, args, kwargs, flags, generators)
PyObject* run_reentrant_segment(PyObject*, PyObject* const* argv, Py_ssize_t argc) {
  HANDLE_TH_ERRORS
  if (argc != 5) {
    PyErr_Format(PyExc_TypeError, "run_reentrant takes 5 arguments, got %zd", argc);
    return nullptr;
  }
  return run_reentrant(argv[0], argv[1], argv[2], PyLong_AsLong(argv[3]), argv[4]);
  END_HANDLE_TH_ERRORS
}

// The context variables of the user's settings; strong, for ever.
PyObject* g_early_stop_setting = nullptr;
PyObject* g_debug_setting = nullptr;

Ref value_of(PyObject* variable) {
  PyObject* value = nullptr;
  if (PyContextVar_Get(variable, nullptr, &value) != 0) {
    throw_python_error();
  }
  return Ref::steal(value);
}

// Not what is no function, is traced or debugged: that is left to the caller.
bool may_run_plainly(PyObject* function) {
  return PyCallable_Check(function) != 0 && value_of(g_debug_setting).get() != Py_True &&
         !compat::is_traced();
}

PyObject* run_with(bool reentrant, PyObject* function, PyObject* args, PyObject* kwargs, long flags,
                   PyObject* generators) {
  if (const Ref setting = value_of(g_early_stop_setting); setting.get() != Py_None) {
    flags = setting.get() == Py_True ? flags | kEarlyStop : flags & ~kEarlyStop;
  }
  return reentrant ? run_reentrant(function, args, kwargs, flags, generators)
                   : run(function, args, kwargs, flags, Py_None, Py_None, generators);
}

// run_plainly(function, args, kwargs): what checkpoint() was called with, options among
// `kwargs`, which nobody else may have. Options that are not plain are left to the caller too.
PyObject* run_plainly(PyObject*, PyObject* const* argv, Py_ssize_t argc) {
  HANDLE_TH_ERRORS
  if (argc != 3 || !PyTuple_CheckExact(argv[1]) || !PyDict_CheckExact(argv[2])) {
    PyErr_SetString(PyExc_TypeError, "run_plainly takes a function, a tuple and a dict");
    return nullptr;
  }
  const auto options = PlainOptions::among(argv[2]);
  if (!options.has_value() || !may_run_plainly(argv[0])) {
    return Py_NewRef(not_run());
  }
  PyObject* kwargs = options->rest_of(argv[2]);
  return run_with(options->reentrant(), argv[0], argv[1], kwargs, options->flags(), Py_None);
  END_HANDLE_TH_ERRORS
}

// run_configured(reentrant, flags, generators, function, args, kwargs): the same with options
// that were read once, for many calls.
PyObject* run_configured(PyObject*, PyObject* const* argv, Py_ssize_t argc) {
  HANDLE_TH_ERRORS
  if (argc != 6 || !PyTuple_CheckExact(argv[4]) || !PyDict_CheckExact(argv[5])) {
    PyErr_SetString(PyExc_TypeError,
                    "run_configured takes three options, a function, a tuple and a dict");
    return nullptr;
  }
  if (!may_run_plainly(argv[3])) {
    return Py_NewRef(not_run());
  }
  const long flags = PyLong_AsLong(argv[1]);
  if (flags == -1 && PyErr_Occurred() != nullptr) {
    return nullptr;
  }
  PyObject* kwargs = PyDict_GET_SIZE(argv[5]) > 0 ? argv[5] : nullptr;
  return run_with(argv[0] == Py_True, argv[3], argv[4], kwargs, flags, argv[2]);
  END_HANDLE_TH_ERRORS
}

PyMethodDef g_methods[] = {
    // NOLINTNEXTLINE: CPython's way to say METH_FASTCALL
    {"run_segment", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run_segment)),
     METH_FASTCALL, "Runs one checkpointed call in the non-reentrant form."},
    {"run_plainly", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run_plainly)),
     METH_FASTCALL, "One call of checkpoint(), if its options are plain."},
    {"run_configured", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run_configured)),
     METH_FASTCALL, "One call with plain options that were read before."},
    {"run_reentrant", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run_reentrant_segment)),
     METH_FASTCALL, "Runs one checkpointed call in the reentrant form."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_segment(py::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), g_methods) != 0) {
    throw py::error_already_set();
  }
  module.attr("NOT_RUN") = py::reinterpret_borrow<py::object>(not_run());
  module.def("set_settings", [](py::object early_stop, py::object debug, py::object noop) {
    g_early_stop_setting = early_stop.release().ptr();
    g_debug_setting = debug.release().ptr();
    PlainOptions::set_noop_context_fn(noop.release().ptr());
  });
  module.attr("SUPPRESSED") = kSuppressed;
  // Which short ways this version of CPython has.
  module.attr("READS_FRAMES") = reprise_reads_internals() != 0;
  module.attr("SEES_CHANGES_OF_DICTS") = ModuleMemo::is_possible();
  py::class_<OpenSegment>(module, "OpenSegment")
      .def("end", &OpenSegment::end)
      .def("abandon", &OpenSegment::abandon);
  module.def("open_segment", &open_segment);
  module.def("is_traced", &compat::is_traced);
  module.attr("EarlyStop") = py::reinterpret_borrow<py::object>(early_stop_type());
  module.attr("PRESERVE_RNG_STATE") = static_cast<long>(kPreserveRngState);
  module.attr("EARLY_STOP") = static_cast<long>(kEarlyStop);
  module.attr("CHECK_DETERMINISM") = static_cast<long>(kCheckDeterminism);
  module.attr("CHECK_RNG") = static_cast<long>(kCheckRng);
  module.attr("AMBIENT_CHECK") = static_cast<long>(kAmbientCheck);
  module.attr("AMBIENT_IGNORE") = static_cast<long>(kAmbientIgnore);
  module.attr("CHECK_VALUES") = static_cast<long>(kCheckValues);
  module.attr("OWN_CONTEXTS") = static_cast<long>(kOwnContexts);
  module.attr("PRESERVE_STATE") = static_cast<long>(kPreserveState);
  module.def("set_checkpoint_error",
             [](const py::object& type) { set_checkpoint_error(type.ptr()); });
  module.attr("unpack") = py::reinterpret_borrow<py::object>(unpack_function());
  module.def("set_unpack_for_dynamo",
             [](const py::object& function) { set_unpack_for_dynamo(function.ptr()); });
  module.def("set_group_type", [](const py::object& type) { set_group_type(type.ptr()); });
  module.def("set_internal_paths",
             [](const std::vector<std::string>& prefixes) { set_internal_paths(prefixes); });
  module.def(
      "fingerprint", [](const at::Tensor& tensor) { return fingerprint(tensor); },
      py::call_guard<py::gil_scoped_release>());
  module.def("combine_fingerprints", &element_hash::combine);
#ifdef REPRISE_CUDA
  module.attr("HAS_CUDA_KERNELS") = true;
#else
  module.attr("HAS_CUDA_KERNELS") = false;
#endif
  module.def("is_recomputing", [] { return ReplayMark::active(); });
  module.def("end_group", [](const py::object& group) { end_group(group.ptr()); });
  module.def("hide_own_hooks", &compat::hide_own_hooks);
  module.def("show_own_hooks", &compat::show_own_hooks);
  module.def("graph_is_retained", &compat::graph_is_retained);
  module.def("enable_native_hooks", &compat::enable_native_hooks);
  module.def("native_hooks_installed", &compat::native_hooks_installed);
}

}  // namespace reprise::bindings
