#include "bindings/python_host.h"

#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/early_stop.h"
#include "bindings/python_object.h"
#include "bindings/source_location.h"
#include "host.h"
#include "segment/recorder.h"
#include "torch_compat.h"

namespace reprise::bindings {
namespace {

PyObject* g_checkpoint_error = nullptr;
PyObject* g_unpack = nullptr;
PyObject* g_unpack_for_dynamo = nullptr;
PyObject* g_group_type = nullptr;
PyObject* g_default_device_type = nullptr;  // torch.utils._device.DeviceContext

// --- Holder: what a pack hook returns when Python calls it --------------------

struct Holder {
  PyObject_HEAD torch::autograd::SavedVariableHooks* hooks;  // owned
};

void holder_dealloc(PyObject* self) {
  delete reinterpret_cast<Holder*>(self)->hooks;
  Py_TYPE(self)->tp_free(self);
}

PyTypeObject g_holder_type{};

PyObject* unpack(PyObject*, PyObject* holder) {
  HANDLE_TH_ERRORS
  if (Py_TYPE(holder) != &g_holder_type) {
    PyErr_Format(PyExc_TypeError,
                 "torch_reprise: internal error, please report: an unpack hook got a %.100s",
                 Py_TYPE(holder)->tp_name);
    return nullptr;
  }
  const at::Tensor tensor = reinterpret_cast<Holder*>(holder)->hooks->call_unpack_hook();
  return THPVariable_Wrap(tensor);
  END_HANDLE_TH_ERRORS
}

PyMethodDef g_unpack_def = {"_unpack_saved_tensor", unpack, METH_O, nullptr};

// --- HookPack -----------------------------------------------------------------

struct HookPack {
  PyObject_HEAD vectorcallfunc vectorcall;
  Recorder* recorder;  // strong: one count of its intrusive reference count
};

PyObject* pack(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* kwnames) {
  HANDLE_TH_ERRORS
  if (PyVectorcall_NARGS(nargsf) != 1 || kwnames != nullptr || !is_tensor(args[0])) {
    PyErr_SetString(PyExc_TypeError, "a saved-tensor pack hook takes one tensor");
    return nullptr;
  }
  auto hooks = reinterpret_cast<HookPack*>(self)->recorder->make_hooks();
  hooks->call_pack_hook(THPVariable_Unpack(args[0]));
  auto* holder = PyObject_New(Holder, &g_holder_type);
  if (holder == nullptr) {
    return nullptr;
  }
  holder->hooks = hooks.release();
  return reinterpret_cast<PyObject*>(holder);
  END_HANDLE_TH_ERRORS
}

void hook_pack_dealloc(PyObject* self) {
  // Takes the count back; may free a segment, which may run finalizers.
  auto recorder =
      c10::intrusive_ptr<Recorder>::reclaim(reinterpret_cast<HookPack*>(self)->recorder);
  Py_TYPE(self)->tp_free(self);
}

PyObject* is_internal(PyObject*, void*) { Py_RETURN_TRUE; }

PyObject* user_hooks(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  auto below = compat::hook_pair_below(self);
  if (!below.has_value()) {
    Py_RETURN_NONE;
  }
  return PyTuple_Pack(2, below->first.ptr(getPyInterpreter()),
                      below->second.ptr(getPyInterpreter()));
  END_HANDLE_TH_ERRORS
}

PyGetSetDef g_hook_pack_getset[] = {
    {"_checkpoint_internal", is_internal, nullptr, nullptr, nullptr},
    {"_user_hooks", user_hooks, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyTypeObject g_hook_pack_type{};

void ready(PyTypeObject& type, const char* name, size_t size, destructor dealloc) {
  Py_SET_REFCNT(reinterpret_cast<PyObject*>(&type), 1);  // static: never freed
  type.tp_name = name;
  type.tp_basicsize = static_cast<Py_ssize_t>(size);
  type.tp_dealloc = dealloc;
  type.tp_flags |= Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  if (PyType_Ready(&type) != 0) {
    throw_python_error();
  }
}

// Is this the frame of torch.autograd that calls the engine?
bool waits_for_backward(PyFrameObject* frame) {
  Ref code = Ref::steal(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
  PyObject* name = reinterpret_cast<PyCodeObject*>(code.get())->co_name;
  return PyUnicode_CompareWithASCIIString(name, "_engine_run_backward") == 0;
}

// --- Host ---------------------------------------------------------------------

class PythonHost final : public Host {
 public:
  HookPair make_hook_pair(c10::intrusive_ptr<Recorder> recorder) override {
    if (!idle_pairs_.empty()) {
      HookPair pair = std::move(idle_pairs_.back());
      idle_pairs_.pop_back();
      as_hook_pack(pair)->recorder = recorder.release();
      return pair;
    }
    auto* pack_hook = PyObject_New(HookPack, &g_hook_pack_type);
    if (pack_hook == nullptr) {
      throw_python_error();
    }
    pack_hook->vectorcall = pack;
    pack_hook->recorder = recorder.release();
    Py_INCREF(g_unpack);
    return {c10::SafePyObject(reinterpret_cast<PyObject*>(pack_hook), getPyInterpreter()),
            c10::SafePyObject(g_unpack, getPyInterpreter())};
  }

  void take_back(HookPair pair) noexcept override {
    HookPack* pack_hook = as_hook_pack(pair);
    // The thread-local state of a backward inside of fn holds copies.
    if (pack_hook == nullptr || Py_REFCNT(reinterpret_cast<PyObject*>(pack_hook)) != 1 ||
        idle_pairs_.size() >= kMostIdlePairs) {
      return;
    }
    const auto dropped =
        c10::intrusive_ptr<Recorder>::reclaim(std::exchange(pack_hook->recorder, nullptr));
    idle_pairs_.push_back(std::move(pair));
  }

  Recorder* recorder_of(PyObject* pack_hook) noexcept override {
    return Py_TYPE(pack_hook) == &g_hook_pack_type
               ? reinterpret_cast<HookPack*>(pack_hook)->recorder
               : nullptr;
  }

  SourceLocation current_location() noexcept override { return bindings::current_location(); }

  std::string describe(const SourceLocation& where) override { return bindings::describe(where); }

  int acquire_interpreter() noexcept override {
    return Py_IsInitialized() != 0 ? static_cast<int>(PyGILState_Ensure()) : kNoInterpreter;
  }

  void release_acquired(int token) noexcept override {
    if (token != kNoInterpreter) {
      PyGILState_Release(static_cast<PyGILState_STATE>(token));
    }
  }

  void* release_interpreter() noexcept override {
    return PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr;
  }

  void reacquire_interpreter(void* token) noexcept override {
    if (token != nullptr) {
      PyEval_RestoreThread(static_cast<PyThreadState*>(token));
    }
  }

  bool is_default_device_mode(const c10::SafePyObject& mode) noexcept override {
    return reinterpret_cast<PyObject*>(Py_TYPE(mode.ptr(&mode.pyinterpreter()))) ==
           g_default_device_type;
  }

  std::shared_ptr<c10::SafePyObject> cpu_device_mode() override {
    WithInterpreter lock;
    Ref mode = checked(PyObject_CallFunction(g_default_device_type, "s", "cpu"));
    return std::make_shared<c10::SafePyObject>(mode.release(), getPyInterpreter());
  }

  std::optional<uint64_t> fingerprint_of_parts(const at::Tensor& tensor) noexcept override {
    WithInterpreter lock;
    // A subclass that cannot be taken apart is not compared.
    const ErrorSetAside outer_error;
    std::optional<uint64_t> found;
    const Ref module = Ref::steal(PyImport_ImportModule("torch_reprise._parts"));
    const Ref wrapped = Ref::steal(THPVariable_Wrap(tensor));
    const Ref result =
        module && wrapped
            ? Ref::steal(PyObject_CallMethod(module.get(), "fingerprint", "(O)", wrapped.get()))
            : Ref();
    if (result && result.get() != Py_None) {
      const auto value = PyLong_AsUnsignedLongLong(result.get());
      if (PyErr_Occurred() == nullptr) {
        found = value;
      }
    }
    return found;
  }

  HookPair as_function_and_data(
      std::unique_ptr<torch::autograd::SavedVariableHooks> hooks) override {
    WithInterpreter lock;
    auto* holder = PyObject_New(Holder, &g_holder_type);
    if (holder == nullptr) {
      throw_python_error();
    }
    holder->hooks = hooks.release();
    PyObject* function = g_unpack_for_dynamo != nullptr ? g_unpack_for_dynamo : g_unpack;
    Py_INCREF(function);
    return {c10::SafePyObject(function, getPyInterpreter()),
            c10::SafePyObject(reinterpret_cast<PyObject*>(holder), getPyInterpreter())};
  }

  bool reports_its_end(PyObject* group) noexcept override {
    WithInterpreter lock;
    return g_group_type != nullptr &&
           PyObject_TypeCheck(group, reinterpret_cast<PyTypeObject*>(g_group_type)) != 0;
  }

  bool is_distributed() noexcept override {
    WithInterpreter lock;
    const ErrorSetAside outer_error;
    PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed");
    Ref answer = module != nullptr
                     ? Ref::steal(PyObject_CallMethod(module, "is_initialized", nullptr))
                     : Ref();
    return answer && answer.get() == Py_True;
  }

  bool is_alone() noexcept override {
    WithInterpreter lock;
    PyThreadState* self = PyThreadState_Get();
    for (PyThreadState* thread = PyInterpreterState_ThreadHead(PyInterpreterState_Get());
         thread != nullptr; thread = PyThreadState_Next(thread)) {
      if (thread == self) {
        continue;
      }
      Ref frame = Ref::steal(reinterpret_cast<PyObject*>(PyThreadState_GetFrame(thread)));
      // The thread that called backward waits in it while a device thread replays.
      if (frame && !waits_for_backward(reinterpret_cast<PyFrameObject*>(frame.get()))) {
        return false;
      }
    }
    return true;
  }

  bool stop_after_operator() noexcept override { return bindings::stop_after_operator(); }

  [[noreturn]] void throw_early_stop() override {
    WithInterpreter lock;
    PyErr_SetNone(early_stop_type());
    throw_python_error();
  }

  [[noreturn]] void throw_checkpoint_error(const std::string& message) override {
    WithInterpreter lock;
    set_checkpoint_error_message(message.c_str());
    throw_python_error();
  }

 private:
  static HookPack* as_hook_pack(const HookPair& pair) noexcept {
    PyObject* pack_hook = pair.first.ptr(getPyInterpreter());
    return Py_TYPE(pack_hook) == &g_hook_pack_type ? reinterpret_cast<HookPack*>(pack_hook)
                                                   : nullptr;
  }

  static constexpr int kNoInterpreter = -1;

  // As many as segments are nested, on all threads. Guarded by the interpreter lock.
  static constexpr size_t kMostIdlePairs = 16;
  std::vector<HookPair> idle_pairs_;
};

}  // namespace

void set_checkpoint_error(PyObject* type) {
  Py_INCREF(type);
  Py_XDECREF(g_checkpoint_error);
  g_checkpoint_error = type;
}

PyObject* unpack_function() { return g_unpack; }

void set_unpack_for_dynamo(PyObject* function) {
  Py_INCREF(function);
  Py_XDECREF(g_unpack_for_dynamo);
  g_unpack_for_dynamo = function;
}

void set_group_type(PyObject* type) {
  Py_INCREF(type);
  Py_XDECREF(g_group_type);
  g_group_type = type;
}

void set_checkpoint_error_message(const char* message) {
  PyErr_SetString(g_checkpoint_error != nullptr ? g_checkpoint_error : PyExc_RuntimeError, message);
}

void install_host() {
  static PythonHost* host = nullptr;
  if (host != nullptr) {
    return;
  }
  ready(g_holder_type, "torch_reprise._C.Holder", sizeof(Holder), holder_dealloc);
  g_hook_pack_type.tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL;
  g_hook_pack_type.tp_vectorcall_offset = offsetof(HookPack, vectorcall);
  g_hook_pack_type.tp_call = PyVectorcall_Call;
  g_hook_pack_type.tp_getset = g_hook_pack_getset;
  ready(g_hook_pack_type, "torch_reprise._C.HookPack", sizeof(HookPack), hook_pack_dealloc);
  g_unpack = checked(PyCFunction_New(&g_unpack_def, nullptr)).release();
  Ref device_module = checked(PyImport_ImportModule("torch.utils._device"));
  g_default_device_type =
      checked(PyObject_GetAttrString(device_module.get(), "DeviceContext")).release();
  early_stop_type();
  host = new PythonHost;  // never destroyed: graphs may outlive the module
  set_host(host);
}

}  // namespace reprise::bindings
