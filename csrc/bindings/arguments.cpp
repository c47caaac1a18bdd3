#include "bindings/arguments.h"

#include <torch/csrc/autograd/python_variable.h>

namespace reprise::bindings {
namespace {

// collections.OrderedDict and collections.defaultdict; borrowed for ever.
PyObject* collection(const char* name) {
  Ref module = checked(PyImport_ImportModule("collections"));
  return checked(PyObject_GetAttrString(module.get(), name)).release();
}

bool is_exactly(PyObject* value, PyObject* type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(value)) == type;
}

PyObject* ordered_dict() {
  static PyObject* type = collection("OrderedDict");
  return type;
}

PyObject* default_dict() {
  static PyObject* type = collection("defaultdict");
  return type;
}

// A dict that can be made again from its items.
bool is_known_dict(PyObject* value) {
  return PyDict_CheckExact(value) || (PyDict_Check(value) && (is_exactly(value, ordered_dict()) ||
                                                              is_exactly(value, default_dict())));
}

// Keeps CPython's recursion count right also when an exception passes.
class RecursionGuard {
 public:
  RecursionGuard() {
    if (Py_EnterRecursiveCall(" while taking checkpointed arguments apart") != 0) {
      throw_python_error();
    }
  }
  ~RecursionGuard() { Py_LeaveRecursiveCall(); }
  RecursionGuard(const RecursionGuard&) = delete;
  RecursionGuard& operator=(const RecursionGuard&) = delete;
};

// What collections.namedtuple makes, and torch's results of several tensors. One with
// attributes besides its items could not be made again.
bool is_named_tuple(PyObject* value) {
  if (!PyTuple_Check(value) || PyTuple_CheckExact(value)) {
    return false;
  }
  PyObject** dict = _PyObject_GetDictPtr(value);
  if (dict != nullptr && *dict != nullptr && PyDict_GET_SIZE(*dict) > 0) {
    return false;
  }
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
  return (PyObject_HasAttrString(type, "_fields") && PyObject_HasAttrString(type, "_make")) ||
         PyObject_HasAttrString(type, "n_sequence_fields");
}

// A list of names and values, of a mapping, a list or a dataclass; null for other objects.
// `references`: see take_apart().
Ref fields_of(PyObject* value, Py_ssize_t references) {
  if (PyList_CheckExact(value)) {
    return checked(PySequence_List(
        checked(PyObject_CallOneArg(reinterpret_cast<PyObject*>(&PyEnum_Type), value)).get()));
  }
  if (!is_known_dict(value) && Py_REFCNT(value) > references) {
    return Ref();
  }
  if (PyDict_Check(value)) {
    Ref items = Ref::steal(PyMapping_Items(value));
    PyErr_Clear();
    return items;
  }
  const Ref names = Ref::steal(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__dataclass_fields__"));
  PyErr_Clear();
  if (!names || !PyDict_Check(names.get())) {
    return Ref();
  }
  Ref fields = checked(PyList_New(0));
  PyObject *name = nullptr, *field = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(names.get(), &position, &name, &field) != 0;) {
    const Ref content = Ref::steal(PyObject_GenericGetAttr(value, name));
    if (!content) {
      PyErr_Clear();
    } else if (PyList_Append(fields.get(), checked(PyTuple_Pack(2, name, content.get())).get()) !=
               0) {
      throw_python_error();
    }
  }
  return fields;
}

// Leaves what is there already, which may be frozen.
void set_field(PyObject* object, PyObject* name, PyObject* value) {
  const bool has_items = PyDict_Check(object) || PyList_Check(object);
  const Ref there = Ref::steal(has_items ? PyObject_GetItem(object, name)
                                         : PyObject_GenericGetAttr(object, name));
  if (there.get() == value) {
    return;
  }
  PyErr_Clear();
  if ((has_items ? PyObject_SetItem(object, name, value)
                 : PyObject_GenericSetAttr(object, name, value)) != 0) {
    throw_python_error();
  }
}

}  // namespace

Structure::Structure(PyObject* value, std::vector<at::Tensor>& tensors,
                     std::vector<PyObject*>* others, Of of) {
  Reading reading{tensors, others, of, {}};
  take_apart(value, reading);
}

namespace {

// Exactly one of the types that are most often met and neither a tensor nor a
// container: the general question, which asks a metaclass, costs more than all else.
bool is_simple(PyObject* value) {
  return value == Py_None || PyLong_CheckExact(value) || PyFloat_CheckExact(value) ||
         PyBool_Check(value) || PyUnicode_CheckExact(value);
}

bool is_plain_container(PyObject* value) {
  return PyTuple_CheckExact(value) || PyList_CheckExact(value) || PyDict_CheckExact(value);
}

}  // namespace

bool Structure::take_apart(PyObject* value, Reading& reading, Py_ssize_t references) {
  if (is_simple(value)) {
    nodes_.push_back({Kind::kObject, 0, Ref::borrow(value)});
    return false;
  }
  if (!is_plain_container(value) && is_tensor(value)) {
    reading.tensors.push_back(THPVariable_Unpack(value));
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    nodes_.push_back({Kind::kTensor, 0, type == THPVariableClass ? Ref() : Ref::borrow(type)});
    return true;
  }
  const bool named = is_named_tuple(value);
  if (PyTuple_CheckExact(value) || named) {
    const size_t here = nodes_.size();
    const auto count = static_cast<uint32_t>(PyTuple_GET_SIZE(value));
    nodes_.push_back({named ? Kind::kNamedTuple : Kind::kTuple, count,
                      named ? Ref::borrow(reinterpret_cast<PyObject*>(Py_TYPE(value))) : Ref()});
    const RecursionGuard guard;
    bool rebuild = false;
    for (uint32_t i = 0; i < count; ++i) {
      rebuild |= take_apart(PyTuple_GET_ITEM(value, i), reading);
    }
    if (!rebuild) {
      // Nothing in it can change, so the tuple itself will do.
      nodes_.erase(nodes_.begin() + static_cast<std::ptrdiff_t>(here), nodes_.end());
      nodes_.push_back({Kind::kObject, 0, Ref::borrow(value)});
    }
    return rebuild;
  }
  if (const Ref fields = reading.of == Of::kResult ? fields_of(value, references) : Ref()) {
    const auto number = static_cast<uint32_t>(reading.numbers.size());
    const auto [it, fresh] = reading.numbers.emplace(value, number);
    nodes_.push_back({fresh ? Kind::kFields : Kind::kShared,
                      fresh ? static_cast<uint32_t>(PyList_GET_SIZE(fields.get())) : it->second,
                      fresh ? Ref::borrow(value) : Ref()});
    if (fresh) {
      const RecursionGuard guard;
      take_items_apart(fields.get(), reading);
    }
    return true;
  }
  const bool is_list = PyList_CheckExact(value);
  if (!is_list && !is_known_dict(value)) {
    if (reading.others != nullptr) {
      reading.others->push_back(value);
    }
    nodes_.push_back({Kind::kObject, 0, Ref::borrow(value)});
    return false;
  }
  const auto number = static_cast<uint32_t>(reading.numbers.size());
  if (auto [it, fresh] = reading.numbers.emplace(value, number); !fresh) {
    nodes_.push_back({Kind::kShared, it->second, Ref()});
    return true;
  }
  const RecursionGuard guard;
  if (is_list) {
    const size_t here = nodes_.size();
    nodes_.push_back({Kind::kList, 0, Ref()});
    // To ask an item what it is may run code of its class, which may change the list.
    uint32_t count = 0;
    for (; count < static_cast<size_t>(PyList_GET_SIZE(value)); ++count) {
      const Ref item = Ref::borrow(PyList_GET_ITEM(value, count));
      take_apart(item.get(), reading);
    }
    nodes_[here].count = count;
  } else {
    const auto count = static_cast<uint32_t>(PyDict_GET_SIZE(value));
    if (PyDict_CheckExact(value)) {
      nodes_.push_back({Kind::kDict, count, Ref()});
    } else if (is_exactly(value, ordered_dict())) {
      nodes_.push_back({Kind::kOrderedDict, count, Ref()});
    } else {
      Ref factory = checked(PyObject_GetAttrString(value, "default_factory"));
      nodes_.push_back({Kind::kDefaultDict, count, std::move(factory)});
    }
    // A list of its items: OrderedDict has an order of its own.
    take_items_apart(checked(PyMapping_Items(value)).get(), reading);
  }
  return true;
}

void Structure::take_items_apart(PyObject* items, Reading& reading) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(items); ++i) {
    PyObject* item = PyList_GET_ITEM(items, i);
    nodes_.push_back({Kind::kObject, 0, Ref::borrow(PyTuple_GET_ITEM(item, 0))});
    take_apart(PyTuple_GET_ITEM(item, 1), reading, /*references=*/2);  // the other: the item's
  }
}

namespace {

// Does C++ know of the subclass? What its operators return is its own business.
bool has_torch_dispatch(PyObject* type) {
  constexpr const char* kName = "__torch_dispatch__";
  const Ref own = Ref::steal(PyObject_GetAttrString(type, kName));
  const Ref tensors = Ref::steal(PyObject_GetAttrString(THPVariableClass, kName));
  PyErr_Clear();
  return own.get() != tensors.get();
}

// A tensor that has lost its Python subclass on its way through C++ (detach, hooks) gets it again.
Ref of_type(Ref tensor, PyObject* type) {
  if (type == nullptr || !is_exactly(tensor.get(), THPVariableClass) || has_torch_dispatch(type)) {
    return tensor;
  }
  if (Py_REFCNT(tensor.get()) == 1 &&
      PyObject_SetAttrString(tensor.get(), "__class__", type) == 0) {
    return tensor;
  }
  PyErr_Clear();
  Ref other = Ref::steal(PyObject_CallMethod(tensor.get(), "as_subclass", "O", type));
  if (!other) {
    PyErr_Clear();
  }
  return other ? std::move(other) : std::move(tensor);
}

}  // namespace

template <typename Leaf>
Ref Structure::put_together(size_t& node, std::vector<Ref>& shared, Leaf&& leaf) const {
  const Node& n = nodes_[node++];
  switch (n.kind) {
    case Kind::kTensor:
      return of_type(leaf(), n.object.get());
    case Kind::kObject:
      return Ref::borrow(n.object.get());
    case Kind::kShared:
      return Ref::borrow(shared[n.count].get());
    case Kind::kTuple: {
      Ref tuple = checked(PyTuple_New(n.count));
      for (uint32_t i = 0; i < n.count; ++i) {
        PyTuple_SET_ITEM(tuple.get(), i, put_together(node, shared, leaf).release());
      }
      return tuple;
    }
    case Kind::kNamedTuple: {
      Ref items = checked(PyList_New(n.count));
      for (uint32_t i = 0; i < n.count; ++i) {
        PyList_SET_ITEM(items.get(), i, put_together(node, shared, leaf).release());
      }
      // torch.return_types have no _make: the type takes a sequence.
      return checked(PyObject_HasAttrString(n.object.get(), "_make")
                         ? PyObject_CallMethod(n.object.get(), "_make", "(O)", items.get())
                         : PyObject_CallOneArg(n.object.get(), items.get()));
    }
    case Kind::kList: {
      Ref list = checked(PyList_New(0));
      shared.push_back(Ref::borrow(list.get()));
      for (uint32_t i = 0; i < n.count; ++i) {
        Ref item = put_together(node, shared, leaf);
        if (PyList_Append(list.get(), item.get()) != 0) {
          throw_python_error();
        }
      }
      return list;
    }
    case Kind::kDict:
    case Kind::kOrderedDict:
    case Kind::kDefaultDict: {
      Ref dict = n.kind == Kind::kDict ? checked(PyDict_New())
                 : n.kind == Kind::kOrderedDict
                     ? checked(PyObject_CallNoArgs(ordered_dict()))
                     : checked(PyObject_CallOneArg(default_dict(), n.object.get()));
      shared.push_back(Ref::borrow(dict.get()));
      for (uint32_t i = 0; i < n.count; ++i) {
        PyObject* key = nodes_[node++].object.get();
        Ref value = put_together(node, shared, leaf);
        if (PyObject_SetItem(dict.get(), key, value.get()) != 0) {
          throw_python_error();
        }
      }
      return dict;
    }
    case Kind::kFields: {
      shared.push_back(Ref::borrow(n.object.get()));
      for (uint32_t i = 0; i < n.count; ++i) {
        PyObject* name = nodes_[node++].object.get();
        const bool is_of_tensors = nodes_[node].kind != Kind::kObject;
        const Ref value = put_together(node, shared, leaf);
        if (is_of_tensors) {  // what else there is may be read-only
          set_field(n.object.get(), name, value.get());
        }
      }
      return Ref::borrow(n.object.get());
    }
  }
  return Ref();
}

Ref Structure::build(const std::vector<at::Tensor>& tensors, size_t* next) const {
  size_t node = 0;
  std::vector<Ref> shared;
  return put_together(node, shared, [&] { return checked(THPVariable_Wrap(tensors[(*next)++])); });
}

Ref Structure::build(const std::vector<Ref>& objects, size_t* next) const {
  size_t node = 0;
  std::vector<Ref> shared;
  return put_together(node, shared, [&] { return Ref::borrow(objects[(*next)++].get()); });
}

bool Structure::find(size_t& node, size_t& index, std::string& path) const {
  const Node& n = nodes_[node++];
  switch (n.kind) {
    case Kind::kTensor:
      return index-- == 0;
    case Kind::kObject:
    case Kind::kShared:
      return false;
    case Kind::kTuple:
    case Kind::kNamedTuple:
    case Kind::kList:
      for (uint32_t i = 0; i < n.count; ++i) {
        if (find(node, index, path)) {
          path = "[" + std::to_string(i) + "]" + path;
          return true;
        }
      }
      return false;
    case Kind::kDict:
    case Kind::kOrderedDict:
    case Kind::kDefaultDict:
    case Kind::kFields:
      for (uint32_t i = 0; i < n.count; ++i) {
        PyObject* key = nodes_[node++].object.get();
        if (find(node, index, path)) {
          const Ref text = Ref::steal(PyObject_Repr(key));
          const char* utf8 = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
          PyErr_Clear();
          path = std::string("[") + (utf8 != nullptr ? utf8 : "...") + "]" + path;
          return true;
        }
      }
      return false;
  }
  return false;
}

void Structure::objects(std::vector<PyObject*>& found) const {
  for (const auto& node : nodes_) {
    if (node.kind == Kind::kObject) {
      found.push_back(node.object.get());
    }
  }
}

std::string Structure::path_of(size_t& index) const {
  std::string path;
  size_t node = 0;
  return find(node, index, path) ? path : "";
}

}  // namespace reprise::bindings
