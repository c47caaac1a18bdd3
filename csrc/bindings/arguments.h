// Taking a call's arguments apart and putting them together again.
//
// Tensors inside of tuples, lists and dicts are arguments like any other: they
// are saved, version-checked and seen by the user's hooks. So the structure is
// remembered without its tensors, and each replay gets containers of its own,
// as they were when the segment began, whatever fn did to the ones it was given.
//
// Containers: exact tuple, list and dict, named tuples, OrderedDict and
// defaultdict, to any depth, shared and cyclic ones included. Every other object
// is passed through as it is.
//
// Results are taken apart as well where their tensors come out of a graph of ours. There,
// dataclasses and subclasses of dict are containers too if nobody else refers to them (others,
// as caches, may be there before and hold what other calls made), and what can be changed in
// place stays the object that it is.
//
// Every member needs the interpreter lock, the destructor too.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "bindings/python_object.h"

namespace reprise::bindings {

class Structure {
 public:
  enum class Of : uint8_t { kArguments, kResult };

  // Takes `value` apart; its tensors are appended to `tensors`.
  // Throws the Python error that a broken container raises.
  // Everything else that a function could draw from or change is appended to `others`
  // (borrowed), if it is given.
  Structure(PyObject* value, std::vector<at::Tensor>& tensors,
            std::vector<PyObject*>* others = nullptr, Of of = Of::kArguments);

  // How to get from the value to its tensor number `index`: "[2]['mask']"; empty if it
  // has fewer, which are then taken off `index`. Steps through shared containers are those
  // of the first way.
  std::string path_of(size_t& index) const;

  // Appends the objects that the constructor's `others` got (borrowed), and more.
  void objects(std::vector<PyObject*>& found) const;

  // The same value with `tensors` (all that this structure found, from `*next`
  // on, which is advanced) in their places.
  Ref build(const std::vector<at::Tensor>& tensors, size_t* next) const;
  // The same with objects in the places of the tensors.
  Ref build(const std::vector<Ref>& objects, size_t* next) const;

 private:
  enum class Kind : uint8_t {
    kTensor,      // object: its subclass, if it is of one
    kObject,      // object: the value
    kTuple,       // count items follow
    kNamedTuple,  // object: the type
    kList,        // may be shared: gets a number
    kDict,        // count times key object, value
    kOrderedDict,
    kDefaultDict,  // object: the factory
    kFields,       // object: what has them, count times key object, value
    kShared,       // count: the number of a mutable container met before
  };
  struct Node {
    Kind kind;
    uint32_t count = 0;
    Ref object;
  };
  // What the constructor was given, and the numbers of mutable containers that it has met.
  struct Reading {
    std::vector<at::Tensor>& tensors;
    std::vector<PyObject*>* others;
    Of of;
    std::unordered_map<PyObject*, uint32_t> numbers;
  };

  // True if the value must be rebuilt: a tensor or a mutable container is in it. `references`: how
  // many there are to a value that nobody else refers to.
  bool take_apart(PyObject* value, Reading& reading, Py_ssize_t references = 1);
  void take_items_apart(PyObject* items, Reading& reading);

  template <typename Leaf>
  Ref put_together(size_t& node, std::vector<Ref>& shared, Leaf&& leaf) const;

  // Advances `node` over one value; true if the tensor was found, with its `path`.
  bool find(size_t& node, size_t& index, std::string& path) const;

  c10::SmallVector<Node, 4> nodes_;  // preorder
};

}  // namespace reprise::bindings
