// What a Python callable reaches without being given it: generators, modules and their
// buffers and parameters, other tensors.
//
// Looked at: the function's closure, defaults and the globals that its code names (lambdas,
// comprehensions and inner functions of it included); the attributes of objects among the
// arguments; the attributes of the module or object that it belongs to, of modules in any of these
// places, and of their submodules; functions in the closure and in
// attributes; functools.partial and bound methods are seen through.
// Containers (list, tuple, dict) are looked into one level deep. What only functions
// called by it can reach is not found.
//
// Of a closed-over `self`, or a method other than forward, only the attributes that the
// code names are looked at, where it names nothing else: a method of a large model that
// runs one of its layers must not be charged for all of them.
#pragma once

#include <ATen/core/Generator.h>
#include <Python.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/python_object.h"
#include "effects/reached_state.h"

namespace reprise::bindings {

// What a name stood for: one that a function closes over, a global, an entry of a module's dict.
struct Binding {
  Ref scope;  // the cell or the dict
  Ref name;   // null for a cell
  Ref value;

  // Borrowed; null: unbound.
  PyObject* now() const {
    return name ? entry_of(scope.get(), name.get()) : PyCell_GET(scope.get());
  }
  // The same with what it stands for now.
  Binding as_it_is() const {
    return {Ref::borrow(scope.get()), Ref::borrow(name.get()), Ref::borrow(now()), Ref()};
  }
  bool holds() const;
  // Makes it hold; a null value unbinds. An error is left set.
  void restore() const;
  // Note [History]
  //
  //   for x in data:
  //       y, h = checkpoint(lambda x: cell(x, h.detach()), x)
  //
  // What the name stood for is the last step's output. Kept as it is, it keeps the graph of all
  // steps before. So a tensor with a history is kept by its values alone; where the name still
  // stands for the tensor itself, or the tensor is still there, that is the one.
  void let_go_of_history();

  Ref original;  // a weak reference to what `value` has the values of; null: `value` is it
};

struct Reach {
  struct Module {
    Ref module;
    bool training;
    uint64_t version;  // of its dict then, see dict_version(); 0: not known
  };
  // Of a module's dict of buffers, of parameters, or of its attributes: a tensor or None.
  struct Buffer : Binding {
    // Put there and taken away again in every replay, whatever is there: a plain tensor among
    // parameters (torch.func.functional_call), or that an embedding has no max_norm.
    bool is_stand_in;
  };
  std::vector<at::Generator> generators;
  // Small programs reach few of them.
  using Modules = c10::SmallVector<Module, 4>;
  Modules modules;
  std::vector<Buffer> buffers;
  c10::SmallVector<Reached, 8> tensors;  // valid while the interpreter lock is held, and `kept` is
  std::vector<Ref> kept;                 // objects that nobody else need have
};

// A tensor of the same values that requires grad, without the history of this one: see
// Note [History]. Null for tensors that have none, and other objects.
Ref without_history(PyObject* object);

// The generator in a torch.Generator, or null for any other object. Borrowed.
const at::Generator* as_generator(PyObject* object) noexcept;

// Of the function that `callable` is, or is a method or partial of; modules and classes left
// out. With the interpreter lock.
std::vector<Binding> bindings_of(PyObject* callable);

// Adds to `reach` what `callable` reaches, and the generators and modules among `arguments`;
// the other ones of these are left in it. An attribute that cannot be read counts as
// absent. With the interpreter lock.
void look_around(PyObject* callable, std::vector<PyObject*>& arguments, Reach& reach);

// Where `callable` reaches this tensor: "running_mean of BatchNorm1d", "the closed-over
// counter"; empty if it does not. For error messages.
std::string where_reached(PyObject* callable, const std::vector<PyObject*>& arguments,
                          const c10::TensorImpl* tensor);

}  // namespace reprise::bindings
