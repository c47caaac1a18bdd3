// Finding the torch.Generator objects that a checkpointed function can reach.
//
// Looked at, each time a segment begins (what a name or an attribute holds may
// change between two calls):
//   - the arguments, and lists, tuples and dicts in them (arguments.h);
//   - a function: its closure, defaults, and the globals that its code names;
//   - a module or another object, also as the self of a bound method: its
//     attributes, and those of its submodules;
//   - functools.partial: the function and the arguments it carries.
// Not looked at: what the functions that fn calls reach by themselves. Those
// generators can be named: Checkpointer(generators=...).
//
// Costs a few nanoseconds per object, so that a block of fifteen submodules pays
// about a microsecond.
#pragma once

#include <ATen/core/Generator.h>
#include <Python.h>

#include <vector>

namespace reprise::bindings {

// The generator of a Python object, or null.
const at::Generator* as_generator(PyObject* object) noexcept;

// Appends what `function` can reach. Needs the interpreter lock. Never raises:
// an attribute that cannot be read holds nothing.
void find_generators(PyObject* function, std::vector<at::Generator>& found);

}  // namespace reprise::bindings
