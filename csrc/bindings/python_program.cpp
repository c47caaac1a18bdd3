#include "bindings/python_program.h"

#include "bindings/dynamo.h"
#include "bindings/early_stop.h"
#include "bindings/module_memo.h"
#include "lease.h"

namespace reprise::bindings {

namespace {

// A method as the with statement looks it up: of the type.
Ref method_of_type(PyObject* object, const char* name) {
  return Ref::steal(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), name));
}

}  // namespace

Ref call_in_context(PyObject* context, PyObject* function, PyObject* args, PyObject* kwargs,
                    bool* suppressed) {
  *suppressed = false;
  if (context == nullptr) {
    return Ref::steal(PyObject_Call(function, args, kwargs));
  }
  const Ref exit = method_of_type(context, "__exit__");
  const Ref enter = exit ? method_of_type(context, "__enter__") : Ref();
  if (!enter) {
    return Ref();
  }
  const Ref entered = Ref::steal(PyObject_CallFunctionObjArgs(enter.get(), context, nullptr));
  if (!entered) {
    return Ref();
  }
  Ref result = Ref::steal(PyObject_Call(function, args, kwargs));
  if (result) {
    Ref left = Ref::steal(
        PyObject_CallFunctionObjArgs(exit.get(), context, Py_None, Py_None, Py_None, nullptr));
    return left ? std::move(result) : Ref();
  }
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback != nullptr) {
    PyException_SetTraceback(value, traceback);
  }
  // Inside of __exit__ the exception is the one being handled (sys.exc_info).
  PyObject *outer_type = nullptr, *outer_value = nullptr, *outer_traceback = nullptr;
  PyErr_GetExcInfo(&outer_type, &outer_value, &outer_traceback);
  Py_XINCREF(type);
  Py_XINCREF(value);
  Py_XINCREF(traceback);
  PyErr_SetExcInfo(type, value, traceback);
  Ref left = Ref::steal(PyObject_CallFunctionObjArgs(
      exit.get(), context, type, value, traceback != nullptr ? traceback : Py_None, nullptr));
  PyErr_SetExcInfo(outer_type, outer_value, outer_traceback);
  const int swallow = left ? PyObject_IsTrue(left.get()) : 0;
  if (!left || swallow < 0) {  // __exit__ itself raised: that error counts
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return Ref();
  }
  if (swallow > 0) {
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    *suppressed = true;
    return Ref();
  }
  PyErr_Restore(type, value, traceback);
  return Ref();
}

namespace {

// The exception that ends a replay lets go of the frames that it passed through. Where one of them
// has it in a variable (what contextlib makes, before 3.11) they are a cycle, which would keep all
// of fn's tensors until garbage is collected.
void clear_early_stop() {
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  const Ref owned[] = {Ref::steal(type), Ref::steal(value), Ref::steal(traceback)};
  if (value != nullptr && PyExceptionInstance_Check(value)) {
    PyException_SetTraceback(value, Py_None);
  }
}

// Has fn turned the exception that ends a replay into this one (except BaseException: sys.exit())?
// Ctrl-C is the user's.
bool comes_of_early_stop(PyObject* error) {
  if (PyErr_GivenExceptionMatches(error, PyExc_KeyboardInterrupt) != 0) {
    return false;
  }
  Ref link = Ref::borrow(error);
  for (int i = 0; link && i < 64; ++i) {
    if (PyErr_GivenExceptionMatches(link.get(), early_stop_type()) != 0) {
      return true;
    }
    Ref next = Ref::steal(PyException_GetContext(link.get()));
    link = next ? std::move(next) : Ref::steal(PyException_GetCause(link.get()));
  }
  return false;
}

// The error that is set, made an exception.
bool error_comes_of_early_stop() {
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  const bool does = value != nullptr && comes_of_early_stop(value);
  PyErr_Restore(type, value, traceback);
  return does;
}

}  // namespace

PythonProgram::PythonProgram(PyObject* function, PyObject* args, PyObject* kwargs,
                             PyObject* replay_context, PyObject* debug_session,
                             std::vector<at::Tensor>& inputs, std::vector<PyObject*>& others)
    : function_(Ref::borrow(function)),
      replay_context_(Ref::borrow(replay_context)),
      debug_session_(Ref::borrow(debug_session)) {
  args_.emplace(args, inputs, &others);
  if (kwargs != nullptr && PyDict_GET_SIZE(kwargs) > 0) {
    kwargs_ = std::make_unique<Structure>(kwargs, inputs, &others);
  }
}

PythonProgram::~PythonProgram() {
  if (Py_IsInitialized() == 0) {
    // The members must not run their destructors: move them where nobody will.
    new Ref(std::move(function_));
    new std::optional<Structure>(std::move(args_));
    (void)kwargs_.release();
    new Ref(std::move(replay_context_));
    new Ref(std::move(debug_session_));
    new Reach::Modules(std::move(modules_));
    new std::vector<Reach::Buffer>(std::move(buffers_));
    new std::vector<Binding>(std::move(bindings_));
    new ArgumentObjects(std::move(argument_objects_));
    new ContextVariables(std::move(context_variables_));
    return;
  }
  WithInterpreter lock;
  // Finalizers may run here: an error that is already set must survive them.
  const ErrorSetAside outer_error;
  function_ = Ref();
  args_.reset();
  kwargs_.reset();
  replay_context_ = Ref();
  debug_session_ = Ref();
  modules_.clear();
  buffers_.clear();
  bindings_.clear();
  argument_objects_ = ArgumentObjects();
  context_variables_ = ContextVariables();
}

void PythonProgram::hold(Reach& reach, const std::vector<PyObject*>& objects,
                         bool context_variables, bool bindings) {
  if (bindings) {
    bindings_ = bindings_of(function_.get());
  }
  modules_ = std::move(reach.modules);
  buffers_ = std::move(reach.buffers);
  argument_objects_.note(objects);
  if (context_variables) {
    context_variables_ = ContextVariables::current();
  }
}

void PythonProgram::settle() {
  argument_objects_.settle();
  for (auto& buffer : buffers_) {
    buffer.is_stand_in = buffer.is_stand_in || !buffer.holds();
    buffer.let_go_of_history();
  }
  // A name that the function itself gives another value is the program's own business.
  std::erase_if(bindings_, [](const Binding& binding) { return !binding.holds(); });
  for (auto& binding : bindings_) {
    binding.let_go_of_history();
  }
}

namespace {

// Modules are in training or evaluation as in the forward, for a scope.
class TrainingScope {
 public:
  explicit TrainingScope(const Reach::Modules& modules) {
    visit_modes(modules, false, [this](PyObject* owner, PyObject* now, bool training) {
      if ((now != Py_False) != training) {
        flipped_.push_back({Ref::borrow(owner), Ref::borrow(now)});
        set(owner, training ? Py_True : Py_False);
      }
    });
  }
  // Appends what a scope changes: the address of each owner. `all`: another replay may have
  // changed a mode for a while, so that what is there now does not tell.
  static void add_to(Lease::Keys& keys, const Reach::Modules& modules, bool all) {
    visit_modes(modules, all, [&](PyObject* owner, PyObject* now, bool training) {
      if (all || (now != Py_False) != training) {
        keys.push_back(owner);
      }
    });
  }
  ~TrainingScope() {
    if (flipped_.empty()) {
      return;
    }
    const ErrorSetAside outer_error;
    for (const auto& [owner, was] : flipped_) {
      set(owner.get(), was.get());
    }
  }
  TrainingScope(const TrainingScope&) = delete;
  TrainingScope& operator=(const TrainingScope&) = delete;

 private:
  static PyObject* name() {
    static PyObject* const name = PyUnicode_InternFromString("training");
    return name;
  }
  static void set(PyObject* owner, PyObject* mode) {
    const bool is_set = PyDict_Check(owner) ? PyDict_SetItem(owner, name(), mode) == 0
                                            : PyObject_SetAttr(owner, name(), mode) == 0;
    if (!is_set) {
      PyErr_Clear();
    }
  }
  // Whose modes they are, a module's dict or a TorchScript module, with what is there and what
  // was. Without those whose dict is as it was, unless `all`.
  template <typename Visit>
  static void visit_modes(const Reach::Modules& modules, bool all, const Visit& visit) {
    for (const auto& [module, training, version] : modules) {
      PyObject** dict = _PyObject_GetDictPtr(module.get());
      if (!all && version != 0 && dict != nullptr && *dict != nullptr &&
          dict_version(*dict) == version) {
        continue;
      }
      PyObject* now = dict != nullptr && *dict != nullptr ? entry_of(*dict, name()) : nullptr;
      if (now != nullptr) {
        visit(*dict, now, training);
      } else if (const Ref mode = Ref::steal(PyObject_GetAttr(module.get(), name()))) {
        visit(module.get(), mode.get(), training);
      } else {
        PyErr_Clear();
      }
    }
  }
  std::vector<std::pair<Ref, Ref>> flipped_;  // owner, and what it held
};

// Note [Late binding]
//
//   for layer in layers:
//       x = checkpoint(lambda t: layer(t).tanh(), x)
//
// When backward runs, the name stands for the last layer, whichever segment asks. So names
// that somebody else has given another value since the forward have the forward's again, for
// a scope.
//
// The same goes for buffers: torch.func.functional_call puts others in their place. Those that fn
// itself gives another tensor (self.mean = self.mean * 0.9 + ...) have the one that the forward
// began with, and are put back even if nobody changed them since.
class BindingsScope {
 public:
  BindingsScope(const std::vector<Reach::Buffer>& buffers, const std::vector<Binding>& names) {
    for (const auto& buffer : buffers) {
      if (buffer.is_stand_in || !buffer.holds()) {
        outer_.push_back(buffer.as_it_is());
        buffer.restore();
      }
    }
    for (const auto& binding : names) {
      if (!binding.holds()) {
        outer_.push_back(binding.as_it_is());
        binding.restore();
      }
    }
  }
  ~BindingsScope() {
    if (outer_.empty()) {
      return;
    }
    const ErrorSetAside outer_error;
    for (const auto& binding : outer_) {
      binding.restore();
    }
  }
  BindingsScope(const BindingsScope&) = delete;
  BindingsScope& operator=(const BindingsScope&) = delete;

 private:
  std::vector<Binding> outer_;  // what they stood for before
};

// Objects with the attributes, names and modes of the forward, for a scope. Most replays find all
// of them as they were, and look at each once. Replays that change those of one object take turns.
class ObjectsScope {
 public:
  ObjectsScope(const Reach::Modules& modules, const std::vector<Reach::Buffer>& buffers,
               const std::vector<Binding>& bindings, const ArgumentObjects& argument_objects) {
    Lease::Keys keys;
    const bool others_hold = Lease::held_by_others(Lease::Kind::kObject);
    TrainingScope::add_to(keys, modules, others_hold);
    for (const auto& buffer : buffers) {
      if (others_hold || buffer.is_stand_in || !buffer.holds()) {
        keys.push_back(buffer.scope.get());
      }
    }
    for (const auto& binding : bindings) {
      if (others_hold || !binding.holds()) {
        keys.push_back(binding.scope.get());
      }
    }
    argument_objects.add_to(keys);
    if (keys.empty()) {
      return;
    }
    lease_.emplace(Lease::Kind::kObject, keys, [](size_t) {
      return std::string("an object whose attributes its function changes");
    });
    training_.emplace(modules);
    bindings_.emplace(buffers, bindings);
    argument_objects_.emplace(argument_objects);
  }

 private:
  // In the order in which they are put in force.
  std::optional<Lease> lease_;
  std::optional<TrainingScope> training_;
  std::optional<BindingsScope> bindings_;
  std::optional<ArgumentObjectsScope> argument_objects_;
};

}  // namespace

Ref PythonProgram::call(std::vector<at::Tensor>&& inputs, bool* suppressed,
                        std::vector<at::Tensor>* outputs) {
  size_t next = 0;
  Ref args = args_->build(inputs, &next);
  Ref kwargs = kwargs_ ? kwargs_->build(inputs, &next) : Ref();
  inputs.clear();
  const ObjectsScope objects(modules_, buffers_, bindings_, argument_objects_);
  const ContextVariablesScope variables(context_variables_);
  const DynamoPaused paused;
  Ref result =
      call_in_context(replay_context_.get(), function_.get(), args.get(), kwargs.get(), suppressed);
  if (result && outputs != nullptr) {  // before objects that fn returns are put back
    const Structure structure(result.get(), *outputs, nullptr, Structure::Of::kResult);
  }
  return result;
}

Program::Outcome PythonProgram::run(std::vector<at::Tensor> inputs,
                                    const std::atomic<bool>& stopped) {
  const StopScope scope;
  bool suppressed = false;
  Ref result = call(std::move(inputs), &suppressed);
  const bool stop = stopped.load(std::memory_order_relaxed);
  if (result && stop && scope.ended_by_itself()) {
    return Outcome::kStopped;
  }
  if (result || suppressed) {
    return stop ? Outcome::kWentOnAfterStop : Outcome::kFinished;
  }
  if (stop) {
    const bool untouched = PyErr_ExceptionMatches(early_stop_type()) != 0;
    if (untouched || PyErr_ExceptionMatches(PyExc_Exception) != 0 || error_comes_of_early_stop()) {
      untouched ? clear_early_stop() : PyErr_Clear();
      return untouched ? Outcome::kStopped : Outcome::kWentOnAfterStop;
    }
  }
  throw_python_error();
}

std::vector<at::Tensor> PythonProgram::run_for_outputs(std::vector<at::Tensor> inputs) {
  WithInterpreter lock;
  bool suppressed = false;
  std::vector<at::Tensor> outputs;
  if (!call(std::move(inputs), &suppressed, &outputs)) {
    throw_python_error();
  }
  return outputs;
}

std::string PythonProgram::name() const {
  WithInterpreter lock;
  PyObject* named = function_.get();
  // functools.partial and other callables say who they are by what they wrap.
  Ref inner;
  for (int i = 0; i < 8 && !PyObject_HasAttrString(named, "__qualname__"); ++i) {
    if (!PyObject_HasAttrString(named, "func")) {
      break;
    }
    inner = Ref::steal(PyObject_GetAttrString(named, "func"));
    if (!inner) {
      PyErr_Clear();
      break;
    }
    named = inner.get();
  }
  Ref text;
  if (PyObject_HasAttrString(named, "__qualname__")) {
    text = Ref::steal(PyObject_GetAttrString(named, "__qualname__"));
  } else {
    text = Ref::steal(
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(named)), "__qualname__"));
  }
  const char* utf8 = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
  if (utf8 == nullptr) {
    PyErr_Clear();
    return "a checkpointed function";
  }
  return utf8;
}

std::string PythonProgram::input_name(size_t index) const {
  WithInterpreter lock;
  // The positional ones come first: "[1][0]" is argument 1, its element 0.
  size_t left = index;
  std::string path = args_->path_of(left);
  const char* what = "argument ";
  if (path.empty() && kwargs_) {
    path = kwargs_->path_of(left);
    what = "keyword argument ";
  }
  const auto end = path.find(']');
  if (path.empty() || end == std::string::npos) {
    return Program::input_name(index);
  }
  return what + path.substr(1, end - 1) + path.substr(end + 1);
}

std::string PythonProgram::where_reached(const c10::TensorImpl* tensor) const {
  WithInterpreter lock;
  std::vector<PyObject*> others;
  args_->objects(others);
  if (kwargs_) {
    kwargs_->objects(others);
  }
  return bindings::where_reached(function_.get(), others, tensor);
}

std::string PythonProgram::running_module() const {
  WithInterpreter lock;
  const ErrorSetAside outer_error;  // without the module the message only has less in it
  std::string text;
  Ref errors = Ref::steal(PyImport_ImportModule("torch_reprise._errors"));
  Ref path =
      errors ? Ref::steal(PyObject_CallMethod(errors.get(), "running_module", nullptr)) : Ref();
  const char* utf8 = path ? PyUnicode_AsUTF8(path.get()) : nullptr;
  if (utf8 != nullptr) {
    text = utf8;
  }
  return text;
}

std::string PythonProgram::explain_mismatch() const {
  if (!debug_session_) {
    return {};
  }
  WithInterpreter lock;
  Ref text = checked(PyObject_CallMethod(debug_session_.get(), "report", nullptr));
  const char* utf8 = PyUnicode_AsUTF8(text.get());
  if (utf8 == nullptr) {
    throw_python_error();
  }
  return utf8;
}

}  // namespace reprise::bindings
