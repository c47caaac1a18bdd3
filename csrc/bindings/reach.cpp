#include "bindings/reach.h"

#include <c10/util/SmallVector.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <unordered_set>
#include <utility>

#include "bindings/module_memo.h"
#include "host.h"

namespace reprise::bindings {
namespace {

Ref attribute_of_module(const char* module, const char* name) {
  return checked(PyObject_GetAttrString(checked(PyImport_ImportModule(module)).get(), name));
}

PyTypeObject* partial_type() {
  static PyObject* type = attribute_of_module("functools", "partial").release();
  return reinterpret_cast<PyTypeObject*>(type);
}

PyTypeObject* module_type() {
  static PyObject* type = attribute_of_module("torch.nn.modules.module", "Module").release();
  return reinterpret_cast<PyTypeObject*>(type);
}

PyTypeObject* script_module_type() {
  static PyObject* type = attribute_of_module("torch.jit", "ScriptModule").release();
  return reinterpret_cast<PyTypeObject*>(type);
}

// Names that attributes are compared with: interned, as names in code are.
struct Names {
  static const Names& get() {
    static const auto* names = new Names;
    return *names;
  }
  PyObject* self = PyUnicode_InternFromString("self");
  PyObject* training = PyUnicode_InternFromString("training");
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* buffers = PyUnicode_InternFromString("_buffers");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* max_norm = PyUnicode_InternFromString("max_norm");
  PyObject* running_mean = PyUnicode_InternFromString("running_mean");
  PyObject* running_var = PyUnicode_InternFromString("running_var");
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* call = PyUnicode_InternFromString("__call__");
};

// kScript: TorchScript's modules keep their attributes where no dict shows them.
enum class Kind : uint8_t { kOther, kGenerator, kTensor, kModule, kScript };

Kind find_kind(PyTypeObject* type) noexcept {
  if (PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(THPGeneratorClass)) != 0) {
    return Kind::kGenerator;
  }
  if (PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0) {
    return Kind::kTensor;
  }
  if (PyType_IsSubtype(type, module_type()) == 0) {
    return Kind::kOther;
  }
  return PyType_IsSubtype(type, script_module_type()) != 0 ? Kind::kScript : Kind::kModule;
}

// The attribute of a type that a call of its objects leads to, borrowed: a function, or a static
// method. Null if that is not to be seen. A module's __call__ is torch's own.
PyObject* find_body(PyTypeObject* type) noexcept {
  for (PyObject* name : {Names::get().forward, Names::get().call}) {
    PyObject* found = _PyType_Lookup(type, name);
    if (found != nullptr &&
        (PyFunction_Check(found) || PyObject_TypeCheck(found, &PyStaticMethod_Type))) {
      return found;
    }
  }
  return nullptr;
}

// 0: it has none now.
unsigned int type_version(PyTypeObject* type) noexcept {
#if PY_VERSION_HEX < 0x030B0000
  (void)type;
  return 0;  // sys._clear_type_cache() begins to count anew there
#else
#if PY_VERSION_HEX < 0x030D0000
  if (PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) == 0) {
    return 0;
  }
#endif
  return type->tp_version_tag;
#endif
}

struct TypeFacts {
  Kind kind = Kind::kOther;
  PyObject* body = nullptr;
};

// Looking through the bases of every attribute's type would be most of the cost of a
// search, so what was found is kept by type and version, which CPython changes with the
// type's bases and attributes and does not use twice. Guarded by the interpreter lock.
TypeFacts facts_of(PyTypeObject* type) noexcept {
  struct Line {
    PyTypeObject* type = nullptr;
    unsigned int version = 0;
    TypeFacts facts;
  };
  static std::array<Line, 512> lines;
  const auto find_out = [type] { return TypeFacts{find_kind(type), find_body(type)}; };
  const unsigned int version = type_version(type);
  if (version == 0) {
    return find_out();
  }
  Line& line = lines[(reinterpret_cast<uintptr_t>(type) >> 4) % lines.size()];
  if (line.type != type || line.version != version) {
    line = {type, version, find_out()};
  }
  return line.facts;
}

Kind kind_of(PyTypeObject* type) noexcept { return facts_of(type).kind; }
Kind kind_of(PyObject* object) noexcept { return kind_of(Py_TYPE(object)); }

// The function that a call of the object leads to; null if that is not to be seen.
Ref body_of(PyObject* object) noexcept {
  PyObject* found = facts_of(Py_TYPE(object)).body;
  if (found == nullptr || PyFunction_Check(found)) {
    return Ref::borrow(found);
  }
  Ref function = Ref::steal(PyStaticMethod_Type.tp_descr_get(found, nullptr, nullptr));
  if (!function) {
    PyErr_Clear();  // one that nobody has initialised
  }
  return function && PyFunction_Check(function.get()) ? std::move(function) : Ref();
}

// The names of globals and attributes that a function's code asks for, and the code inside
// of it: lambdas, comprehensions, inner functions.
class NamesInCode {
 public:
  explicit NamesInCode(PyObject* function) { add(function); }

  // The function that a decorated one stands for has names of its own.
  static NamesInCode with_wrapped(PyObject* function) {
    static PyObject* const wrapped = PyUnicode_InternFromString("__wrapped__");
    NamesInCode names(function);
    for (int i = 0; i < kMostWrappers; ++i) {
      PyObject* dict = reinterpret_cast<PyFunctionObject*>(function)->func_dict;
      PyObject* inner = dict != nullptr ? entry_of(dict, wrapped) : nullptr;
      if (inner == nullptr || !PyFunction_Check(inner)) {
        break;
      }
      names.add(inner);
      function = inner;
    }
    return names;
  }

  size_t size() const { return names_.size(); }
  PyObject* operator[](size_t index) const { return names_[index]; }
  bool has(PyObject* name) const {
    return std::find(names_.begin(), names_.end(), name) != names_.end();
  }

 private:
  static constexpr int kMostWrappers = 8;

  void add(PyObject* function) { add_code(PyFunction_GET_CODE(function), 0); }
  // Each name once; within one code they are different.
  void add_code(PyObject* object, int depth) {
    const auto* code = reinterpret_cast<PyCodeObject*>(object);
    const bool is_first = names_.empty();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code->co_names); ++i) {
      PyObject* name = PyTuple_GET_ITEM(code->co_names, i);
      if (is_first || !has(name)) {
        names_.push_back(name);
      }
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(code->co_consts); ++i) {
      PyObject* constant = PyTuple_GET_ITEM(code->co_consts, i);
      if (PyCode_Check(constant) && depth < kMostWrappers) {
        add_code(constant, depth + 1);
      }
    }
  }

  c10::SmallVector<PyObject*, 24> names_;  // borrowed from the code
};

// The function whose code runs when the object is called; null if that is not to be seen.
PyObject* function_of(PyObject* callable) {
  for (int i = 0; i < 8 && !PyFunction_Check(callable); ++i) {
    if (PyMethod_Check(callable)) {
      callable = PyMethod_GET_FUNCTION(callable);
    } else if (PyObject_TypeCheck(callable, partial_type())) {
      // Held by the partial, which outlives this.
      callable = Ref::steal(PyObject_GetAttrString(callable, "func")).get();
    } else {
      return nullptr;
    }
    if (callable == nullptr) {
      PyErr_Clear();
      return nullptr;
    }
  }
  return PyFunction_Check(callable) ? callable : nullptr;
}

class Search {
 public:
  // `sought`: the tensor to be named, or null.
  Search(Reach& reach, const c10::TensorImpl* sought) : reach_(reach), sought_(sought) {}
  ~Search() {
    if (known_ != nullptr) {
      memos_in_use_ = false;
    }
  }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  const std::string& found() const { return found_; }

  void callable(PyObject* object) {
    if (PyFunction_Check(object)) {
      function(object);
    } else if (PyMethod_Check(object)) {
      PyObject* function = PyMethod_GET_FUNCTION(object);
      PyObject* self = PyMethod_GET_SELF(object);
      callable(function);
      if (kind_of(self) != Kind::kModule) {
        object_with_attributes(self, /*certain=*/false);
      } else if (!PyFunction_Check(function) || is_forward(function)) {
        module(self, certain_);
      } else {
        named_attributes(self, NamesInCode::with_wrapped(function));
      }
    } else if (PyObject_TypeCheck(object, partial_type())) {
      Ref inner = Ref::steal(PyObject_GetAttrString(object, "func"));
      Ref args = Ref::steal(PyObject_GetAttrString(object, "args"));
      Ref keywords = Ref::steal(PyObject_GetAttrString(object, "keywords"));
      if (inner && args && keywords && is_new(object)) {
        callable(inner.get());
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args.get()); ++i) {
          used(PyTuple_GET_ITEM(args.get(), i), nullptr);
        }
        PyObject *key = nullptr, *entry = nullptr;
        for (Py_ssize_t position = 0; PyDict_Next(keywords.get(), &position, &key, &entry) != 0;) {
          used(entry, key);
        }
      }
    } else if (!PyCFunction_Check(object)) {
      object_with_attributes(object, certain_ && kind_of(object) == Kind::kModule);
      if (const Ref body = body_of(object)) {
        function(body.get());
      }
    }
    PyErr_Clear();
  }

  // An argument: true if it is a generator or a module. Of a function it is not known whether it is
  // called, and when.
  bool argument(PyObject* object) {
    certain_ = kind_of(object) != Kind::kOther;
    used(object, nullptr);
    certain_ = true;
    return kind_of(object) != Kind::kOther;
  }

 private:
  static bool is_forward(PyObject* function) {
    PyObject* name = reinterpret_cast<PyFunctionObject*>(function)->func_name;
    return PyUnicode_CompareWithASCIIString(name, "forward") == 0 ||
           PyUnicode_CompareWithASCIIString(name, "__call__") == 0;
  }

  // `certain`: fn uses it, so that a change of it before the replay is an error. Of a
  // container fn may use one element of many.
  void value(PyObject* object, PyObject* name, bool certain) {
    if (memo_ != nullptr && PyList_CheckExact(object)) {
      memo_->leave({object, name, certain});
    } else if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
        item(PySequence_Fast_GET_ITEM(object, i), name, false);
      }
    } else if (PyDict_CheckExact(object)) {
      watch(nullptr, object);
      PyObject *key = nullptr, *entry = nullptr;
      for (Py_ssize_t position = 0; PyDict_Next(object, &position, &key, &entry) != 0;) {
        item(entry, name, false);
      }
    } else {
      item(object, name, certain);
    }
  }

  // What a function is given, or closes over: it uses that, and calls what can be called.
  void used(PyObject* object, PyObject* name) {
    if (depth_ < kDeepest) {
      ++depth_;
      use(object, name);
      --depth_;
    }
  }

  void use(PyObject* object, PyObject* name) {
    value(object, name, certain_);
    if (kind_of(object) != Kind::kOther) {
      return;
    }
    if (PyMethod_Check(object) ? is_new(object) : PyObject_TypeCheck(object, partial_type()) != 0) {
      callable(object);
    } else if (is_object_with_attributes(object)) {
      object_with_attributes(object, /*certain=*/false);
    }
  }

  void item(PyObject* object, PyObject* name, bool certain) {
    switch (kind_of(object)) {
      case Kind::kOther:
        if (into_functions_ && PyFunction_Check(object)) {  // which the callable may call
          if (memo_ != nullptr) {
            memo_->leave({object, name, certain});
          } else if (is_new(object)) {
            function(object);
          }
        }
        return;
      case Kind::kGenerator:
        generator(object);
        return;
      case Kind::kTensor:
        tensor(object, name, nullptr, true, certain, false);
        return;
      case Kind::kModule:
        module(object, certain && has_forward_of_its_own(object));
        return;
      case Kind::kScript:
        if (memo_ != nullptr) {
          memo_->leave({object, name, certain});
        } else {
          script_module(object, certain);
        }
        return;
    }
  }

  // By torch's Python interface; what cannot be read counts as absent.
  void script_module(PyObject* object, bool certain) {
    if (!is_new(object)) {
      return;
    }
    const Ref held = Ref::borrow(object);
    const Names& names = Names::get();
    visit(PyObject_CallMethod(object, "modules", nullptr), [&](PyObject* module) {
      const Ref mode = or_nothing(PyObject_GetAttr(module, names.training));
      const bool training = mode && mode.get() != Py_False;
      if (mode) {
        reach_.modules.push_back({Ref::borrow(module), training, 0});
      }
      for (PyObject* group : {names.parameters, names.buffers}) {
        const Ref tensors = or_nothing(PyObject_GetAttr(module, group));
        if (!tensors) {
          continue;
        }
        visit(PyObject_CallMethod(tensors.get(), "items", nullptr), [&](PyObject* item) {
          PyObject *name = nullptr, *entry = nullptr;
          if (PyTuple_Check(item) && PyArg_ParseTuple(item, "OO", &name, &entry) != 0 &&
              kind_of(entry) == Kind::kTensor) {
            reach_.kept.push_back(Ref::borrow(entry));
            Py_INCREF(name);
            PyUnicode_InternInPlace(&name);
            tensor(entry, name, module, training, certain, group == names.buffers);
            Py_DECREF(name);
          }
        });
      }
    });
  }

  static Ref or_nothing(PyObject* found) {
    if (found == nullptr) {
      drop_error();
    }
    return Ref::steal(found);
  }

  // Of what an iterable has; takes it over. Null: nothing.
  template <typename Visit>
  static void visit(PyObject* iterable, const Visit& each) {
    const Ref owned = or_nothing(iterable);
    const Ref iterator = owned ? or_nothing(PyObject_GetIter(owned.get())) : Ref();
    while (iterator) {
      const Ref item = or_nothing(PyIter_Next(iterator.get()));
      if (!item) {
        break;
      }
      each(item.get());
    }
  }

  void generator(PyObject* object) {
    reach_.generators.push_back(*as_generator(object));
    if (memo_ != nullptr) {
      memo_->add_generator(object);
    }
  }

  // ModuleList and ModuleDict are containers too.
  static bool has_forward_of_its_own(PyObject* module) {
    return std::strcmp(Py_TYPE(module)->tp_name, "ModuleList") != 0 &&
           std::strcmp(Py_TYPE(module)->tp_name, "ModuleDict") != 0;
  }

  void tensor(PyObject* object, PyObject* name, PyObject* owner, bool training, bool certain,
              bool is_buffer) {
    // A lazy module's, which gets its memory in the first forward.
    if (std::strncmp(Py_TYPE(object)->tp_name, "Uninitialized", 13) == 0) {
      return;
    }
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (sought_ != nullptr && tensor.unsafeGetTensorImpl() == sought_ && found_.empty()) {
      describe(name, owner);
    }
    Reached reached{&tensor, Reached::Role::kFixed, true, true, false};
    const bool requires_grad = tensor.requires_grad();
    if (!requires_grad) {
      const Names& names = Names::get();
      const bool running = is_buffer && (name == names.running_mean || name == names.running_var);
      reached = {&tensor, running ? Reached::Role::kRunning : Reached::Role::kState, certain,
                 training, is_buffer};
    }
    if (!is_buffer && owner != nullptr && name == Names::get().weight) {
      const Ref attributes = dict_of(owner);
      if (attributes && scales_weight(owner, attributes.get())) {
        reached = {&tensor, Reached::Role::kScaled, true, training, false};
      }
    }
    const bool counts = !requires_grad || certain;
    if (counts) {
      reach_.tensors.push_back(reached);
    }
    if (memo_ != nullptr) {
      memo_->add_tensor(object, reached, requires_grad, counts);
    }
  }

  void describe(PyObject* name, PyObject* owner) {
    const char* text = name != nullptr ? PyUnicode_AsUTF8(name) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
    }
    found_ = text != nullptr ? std::string("'") + text + "'" : "a tensor";
    if (owner != nullptr) {
      found_ += std::string(" of a ") + Py_TYPE(owner)->tp_name;
    } else {
      found_ += ", which the function reaches by its name";
    }
  }

  void function(PyObject* object) {
    // Names are borrowed from the code, and some of what is searched is asked by Python code.
    const Ref held = Ref::borrow(object);
    const Ref code = Ref::borrow(PyFunction_GET_CODE(object));
    PyObject* closure = PyFunction_GET_CLOSURE(object);
    const NamesInCode names(object);
    if (closure != nullptr) {
      Ref free_names;  // CPython makes a new tuple each time it is asked
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(closure); ++i) {
        PyObject* content = PyCell_GET(PyTuple_GET_ITEM(closure, i));
        if (content == nullptr) {
          continue;
        }
        PyObject* name = nullptr;
        if (kind_of(content) == Kind::kModule || sought_ != nullptr) {
          if (!free_names) {
            free_names = Ref::steal(PyObject_GetAttrString(code.get(), "co_freevars"));
          }
          name = free_names ? PyTuple_GET_ITEM(free_names.get(), i) : nullptr;
        }
        if (kind_of(content) == Kind::kModule && name == Names::get().self) {
          named_attributes(content, names);
          continue;
        }
        used(content, name);
      }
    }
    for (PyObject* defaults :
         {PyFunction_GET_DEFAULTS(object), PyFunction_GET_KW_DEFAULTS(object)}) {
      if (defaults != nullptr) {
        value(defaults, nullptr, false);
      }
    }
    // Functions among the globals lead into every library that is imported by name.
    const bool outer = std::exchange(into_functions_, false);
    PyObject* globals = PyFunction_GET_GLOBALS(object);
    for (size_t i = 0; i < names.size(); ++i) {
      if (PyObject* global = entry_of(globals, names[i])) {
        value(global, names[i], certain_);
      }
    }
    into_functions_ = outer;
  }

  static bool is_object_with_attributes(PyObject* object) {
    return !PyType_Check(object) && !PyFunction_Check(object) && !PyModule_Check(object);
  }

  // True the first time an object is met.
  bool is_new(PyObject* object) {
    if (known_ != nullptr && known_->has_seen(object)) {
      return false;
    }
    if (!many_seen_.empty()) {
      return many_seen_.insert(object).second;
    }
    if (std::find(seen_.begin(), seen_.end(), object) != seen_.end()) {
      return false;
    }
    seen_.push_back(object);
    if (seen_.size() == kFew) {
      many_seen_.insert(seen_.begin(), seen_.end());
    }
    return true;
  }

  // The dict of an object; null if it has none.
  static Ref dict_of(PyObject* object) {
    PyObject** dict = _PyObject_GetDictPtr(object);
    if (dict != nullptr && *dict != nullptr) {
      return Ref::borrow(*dict);
    }
    // Since 3.11 a dict may not exist before it is asked for.
    if (dict == nullptr && Py_TYPE(object)->tp_dictoffset == 0) {
      return Ref();
    }
    Ref made = Ref::steal(PyObject_GenericGetDict(object, nullptr));
    if (!made || !PyDict_Check(made.get())) {
      PyErr_Clear();
      return Ref();
    }
    return made;
  }

  void object_with_attributes(PyObject* object, bool certain) {
    const Kind kind = kind_of(object);
    if (kind == Kind::kModule) {
      module(object, certain);
      return;
    }
    if (kind == Kind::kScript) {
      item(object, nullptr, certain);
      return;
    }
    const Ref dict = dict_of(object);
    if (!dict || !is_new(object)) {
      return;
    }
    watch(object, dict.get());
    PyObject *key = nullptr, *entry = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(dict.get(), &position, &key, &entry) != 0;) {
      value(entry, key, certain);
    }
  }

  void watch(PyObject* owner, PyObject* dict) {
    if (memo_ != nullptr) {
      memo_->watch(owner, dict);
    }
  }

  // A module, from what is known of it. Of the first that is met alone: what is known of
  // another one may be of modules that were met before.
  void module(PyObject* object, bool certain) {
    const bool is_first = seen_.empty() && many_seen_.empty() && known_ == nullptr;
    if (!ModuleMemo::is_possible() || sought_ != nullptr || memos_in_use_ || !is_first) {
      search_module(object, certain);
      return;
    }
    memos_in_use_ = true;
    ModuleMemo& memo = ModuleMemo::of(object);
    known_ = &memo;
    const ModuleMemo::How how{certain, into_functions_};
    if (memo.still_holds(how)) {
      reach_.tensors.reserve(reach_.tensors.size() + memo.most_tensors());
      reach_.modules.reserve(reach_.modules.size() + memo.modules().size());
      reach_.buffers.reserve(reach_.buffers.size() + memo.buffers().size());
      memo.visit_tensors([this](const Reached& reached) { reach_.tensors.push_back(reached); });
      for (const auto& [module, training, version] : memo.modules()) {
        reach_.modules.push_back({Ref::borrow(module), training, version});
      }
      for (const auto& [dict, name, value, is_stand_in] : memo.buffers()) {
        reach_.buffers.push_back(
            {{Ref::borrow(dict), Ref::borrow(name), Ref::borrow(value), Ref()}, is_stand_in});
      }
      for (PyObject* found : memo.generators()) {
        generator(found);
      }
    } else if (memo.is_of_use()) {
      memo.begin(how);
      memo_ = &memo;
      search_module(object, certain);
      memo_ = nullptr;
      std::vector<PyObject*> seen(many_seen_.begin(), many_seen_.end());
      if (seen.empty()) {
        seen.assign(seen_.begin(), seen_.end());
      }
      memo.end(std::move(seen));
    } else {
      memo.forget();
      search_module(object, certain);
    }
    for (const auto& [left, name, left_certain] : memo.unversioned()) {
      value(left, name, left_certain);
    }
  }

  // The attributes of a module, and its submodules.
  void search_module(PyObject* object, bool certain) {
    const Ref dict = dict_of(object);
    if (!dict || !is_new(object)) {
      return;
    }
    watch(object, dict.get());
    const Names& names = Names::get();
    PyObject* mode = entry_of(dict.get(), names.training);
    const bool training = mode != Py_False;
    if (mode != nullptr) {
      reach_.modules.push_back({Ref::borrow(object), training, dict_version(dict.get())});
      if (memo_ != nullptr) {
        memo_->add_module(object, dict.get(), training);
      }
    }
    if (scales_weight(object, dict.get())) {  // not again in a replay: it may change the last bits
      add_buffer(dict.get(), names.max_norm, Py_None, true);
    }
    PyObject *key = nullptr, *entry = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(dict.get(), &position, &key, &entry) != 0;) {
      if (!PyDict_CheckExact(entry)) {
        value(entry, key, certain);
        continue;
      }
      watch(nullptr, entry);
      if (key == names.parameters || key == names.buffers) {
        tensors_of(entry, object, training, certain, key == names.buffers, nullptr);
      } else if (key == names.modules) {
        PyObject *name = nullptr, *submodule = nullptr;
        for (Py_ssize_t i = 0; PyDict_Next(entry, &i, &name, &submodule) != 0;) {
          if (submodule != Py_None) {
            object_with_attributes(submodule, certain);
          }
        }
      } else if (PyDict_GET_SIZE(entry) > 0) {  // a module has some ten of them, for hooks
        value(entry, key, certain);
      }
    }
  }

  // Is it a torch.nn.Embedding or EmbeddingBag whose forward, which is torch's, scales the rows
  // that it looks up?
  static bool scales_weight(PyObject* module, PyObject* dict) {
    PyObject* max_norm = entry_of(dict, Names::get().max_norm);
    if (max_norm == nullptr || max_norm == Py_None) {
      return false;
    }
    PyObject* const forward = Names::get().forward;
    static const auto* const forwards = [forward] {
      const Ref nn = checked(PyImport_ImportModule("torch.nn"));
      auto* found = new std::vector<Ref>;
      for (const char* name : {"Embedding", "EmbeddingBag"}) {
        const Ref type = checked(PyObject_GetAttrString(nn.get(), name));
        found->push_back(checked(PyObject_GetAttr(type.get(), forward)));
      }
      return found;
    }();
    PyObject* own = entry_of(dict, forward);
    if (own == nullptr) {
      own = _PyType_Lookup(Py_TYPE(module), forward);
    }
    return std::any_of(forwards->begin(), forwards->end(),
                       [own](const Ref& known) { return known.get() == own; });
  }

  void add_buffer(PyObject* dict, PyObject* name, PyObject* value, bool is_stand_in) {
    reach_.buffers.push_back(
        {{Ref::borrow(dict), Ref::borrow(name), Ref::borrow(value), Ref()}, is_stand_in});
    if (memo_ != nullptr) {
      memo_->add_buffer(dict, name, value, is_stand_in);
    }
  }

  void tensors_of(PyObject* dict, PyObject* owner, bool training, bool certain, bool are_buffers,
                  const NamesInCode* only) {
    PyObject *name = nullptr, *entry = nullptr;
    for (Py_ssize_t i = 0; PyDict_Next(dict, &i, &name, &entry) != 0;) {
      if (only != nullptr && !only->has(name)) {
        continue;
      }
      // Subclasses among parameters (of sharding libraries) are exchanged on purpose.
      const bool is_stand_in =
          !are_buffers && Py_TYPE(entry) == reinterpret_cast<PyTypeObject*>(THPVariableClass);
      if (are_buffers || is_stand_in) {
        add_buffer(dict, name, entry, is_stand_in);
      }
      if (kind_of(entry) == Kind::kTensor) {
        tensor(entry, name, owner, training, certain, are_buffers);
      }
    }
  }

  // The attributes of a module that a function's code names; all of them if it names a
  // method, which may use any.
  void named_attributes(PyObject* object, const NamesInCode& names_in_code) {
    const Ref dict = dict_of(object);
    if (!dict) {
      return;
    }
    for (size_t i = 0; i < names_in_code.size(); ++i) {
      PyObject* in_type = _PyType_Lookup(Py_TYPE(object), names_in_code[i]);
      if (in_type != nullptr) {
        module(object, false);
        return;
      }
    }
    const Names& names = Names::get();
    PyObject* mode = entry_of(dict.get(), names.training);
    const bool training = mode != Py_False;
    if (mode != nullptr && is_new(object)) {
      reach_.modules.push_back({Ref::borrow(object), training, dict_version(dict.get())});
    }
    for (PyObject* group : {names.parameters, names.buffers}) {
      PyObject* tensors = entry_of(dict.get(), group);
      if (tensors != nullptr && PyDict_CheckExact(tensors)) {
        tensors_of(tensors, object, training, certain_, group == names.buffers, &names_in_code);
      }
    }
    PyObject* submodules = entry_of(dict.get(), names.modules);
    for (size_t i = 0; i < names_in_code.size(); ++i) {
      PyObject* name = names_in_code[i];
      PyObject* entry = entry_of(dict.get(), name);
      if (entry == nullptr && submodules != nullptr && PyDict_CheckExact(submodules)) {
        entry = entry_of(submodules, name);
      }
      if (entry != nullptr) {
        value(entry, name, certain_);
      }
    }
  }

  Reach& reach_;
  const c10::TensorImpl* sought_;
  std::string found_;
  bool into_functions_ = true;
  bool certain_ = true;  // of what functions reach: see value()
  // Functions in the closures of functions, and so on: each is a few frames on the stack.
  static constexpr int kDeepest = 500;
  int depth_ = 0;
  ModuleMemo* memo_ = nullptr;         // is being written
  const ModuleMemo* known_ = nullptr;  // what it has seen has been met
  // By a search of any thread: finalizers of what the collector finds may begin another
  // one. Guarded by the interpreter lock.
  inline static bool memos_in_use_ = false;
  // A block has tens of modules, which a list is best for; a whole model has thousands.
  static constexpr size_t kFew = 32;
  c10::SmallVector<PyObject*, kFew> seen_;
  std::unordered_set<PyObject*> many_seen_;  // in its place from the 32nd on
};

}  // namespace

const at::Generator* as_generator(PyObject* object) noexcept {
  return kind_of(object) == Kind::kGenerator ? &reinterpret_cast<THPGenerator*>(object)->cdata
                                             : nullptr;
}

namespace {

// Stands for the history that a kept tensor has lost. Only the reentrant form asks it.
struct LostHistory final : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&&) override {
    throw_checkpoint_error(
        "torch_reprise: backward needs the history of a tensor that a checkpointed function "
        "reached by a name (or a buffer), and that was given something else since. With "
        "use_reentrant=True only arguments have an edge in the graph: pass the tensor as an "
        "argument, or pass use_reentrant=False.");
  }
  std::string name() const override { return "LostHistory"; }
};

// The object of a weak reference, or null.
Ref target_of(const Ref& weak) {
  Ref target = weak ? Ref::steal(PyObject_CallNoArgs(weak.get())) : Ref();
  return target && target.get() != Py_None ? std::move(target) : Ref();
}

}  // namespace

bool Binding::holds() const {
  PyObject* const stands = now();
  return stands == value.get() || (original && stands == target_of(original).get());
}

void Binding::restore() const {
  if (holds()) {
    return;
  }
  const Ref there = target_of(original);
  PyObject* const wanted = there ? there.get() : value.get();
  if (!name) {
    PyCell_Set(scope.get(), wanted);
  } else if (wanted != nullptr) {
    PyDict_SetItem(scope.get(), name.get(), wanted);
  } else {
    PyDict_DelItem(scope.get(), name.get());
  }
}

Ref without_history(PyObject* object) {
  if (object == nullptr || !is_tensor(object)) {
    return Ref();
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.requires_grad() || tensor.is_leaf() || tensor.is_inference()) {
    return Ref();
  }
  at::Tensor values = tensor.detach();
  torch::autograd::set_history(values, c10::make_intrusive<LostHistory>());
  return checked(THPVariable_Wrap(std::move(values)));
}

void Binding::let_go_of_history() {
  if (Ref values = original ? Ref() : without_history(value.get())) {
    original = checked(PyWeakref_NewRef(value.get(), nullptr));
    value = std::move(values);
  }
}

std::vector<Binding> bindings_of(PyObject* callable) {
  std::vector<Binding> found;
  PyObject* function = function_of(callable);
  if (function == nullptr) {
    return found;
  }
  if (PyObject* closure = PyFunction_GET_CLOSURE(function)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(closure); ++i) {
      PyObject* cell = PyTuple_GET_ITEM(closure, i);
      if (PyObject* content = PyCell_GET(cell)) {
        found.push_back({Ref::borrow(cell), Ref(), Ref::borrow(content), Ref()});
      }
    }
  }
  PyObject* globals = PyFunction_GET_GLOBALS(function);
  const NamesInCode names(function);
  for (size_t i = 0; i < names.size(); ++i) {
    PyObject* global = entry_of(globals, names[i]);
    if (global != nullptr && !PyModule_Check(global) && !PyType_Check(global)) {
      found.push_back({Ref::borrow(globals), Ref::borrow(names[i]), Ref::borrow(global), Ref()});
    }
  }
  return found;
}

void look_around(PyObject* callable, std::vector<PyObject*>& arguments, Reach& reach) {
  Search search(reach, nullptr);
  search.callable(callable);
  std::erase_if(arguments, [&search](PyObject* argument) { return search.argument(argument); });
}

std::string where_reached(PyObject* callable, const std::vector<PyObject*>& arguments,
                          const c10::TensorImpl* tensor) {
  Reach reach;
  Search search(reach, tensor);
  search.callable(callable);
  for (PyObject* argument : arguments) {
    search.argument(argument);
  }
  return search.found();
}

}  // namespace reprise::bindings
