// What a search through a module and its submodules found, kept for the next one.
//
// A block has some ten modules with five dicts each, and a checkpointed block is searched
// at every call. So dicts have versions, another one after every change and none used twice,
// and a search is over when the versions of the dicts that the last one read are what they
// were. CPython keeps such a number in each dict up to 3.12. In 3.13 an attribute that is
// set leaves it as it is; there a watcher, which CPython calls before every change of a dict
// that it was set on, keeps versions of its own (not in 3.13.0, which forgets some). What has no
// version (lists, functions with their closures) is looked at each time.
//
// No references are held: an unchanged dict keeps what the memo points to. Dicts are
// compared in the order in which they were met, a dict before what lies in it, so that
// nothing is read that may be gone. All with the interpreter lock.
#pragma once

#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "effects/reached_state.h"

namespace reprise::bindings {

// Another number after every change of a dict, where CPython itself keeps one (up to 3.12); 0
// elsewhere.
uint64_t dict_version(PyObject* dict);

class ModuleMemo {
 public:
  ModuleMemo() = default;
  // Can changes of a dict be seen in this version of CPython?
  static bool is_possible();

  // Of this module; one that holds nothing if there is none yet. Valid until the next call.
  static ModuleMemo& of(PyObject* module);

  // What a search depends on besides dicts.
  struct How {
    bool certain;         // see Reached::checked
    bool into_functions;  // whether it looks into functions that it meets
    bool operator==(const How&) const = default;
  };

  void forget() { *this = ModuleMemo(misses_); }

  // --- while a search writes it down ---
  void begin(How how);
  // The search reads a dict; `owner`: whose attributes it is, or null.
  void watch(PyObject* owner, PyObject* dict);
  // Not `found`: it would be if it did not require grad.
  void add_tensor(PyObject* tensor, const Reached& reached, bool requires_grad, bool found);
  struct Module {
    PyObject* module;
    bool training;
    uint64_t version;  // of its dict, see dict_version()
  };
  void add_module(PyObject* module, PyObject* dict, bool training) {
    modules_.push_back({module, training, dict_version(dict)});
  }
  struct Buffer {
    PyObject* dict;
    PyObject* name;
    PyObject* value;
    bool is_stand_in;
  };
  void add_buffer(PyObject* dict, PyObject* name, PyObject* value, bool is_stand_in) {
    buffers_.push_back({dict, name, value, is_stand_in});
  }
  void add_generator(PyObject* generator) { generators_.push_back(generator); }
  struct Unversioned {
    PyObject* object;
    PyObject* name;  // may be null
    bool certain;
  };
  void leave(Unversioned object) { unversioned_.push_back(object); }
  void end(std::vector<PyObject*> seen);

  // --- later ---
  // Would a search find the same again? Counts how often not.
  bool still_holds(How how);
  // Is it worth while to write down what a search finds?
  bool is_of_use() const { return misses_ < kMostMisses; }
  size_t most_tensors() const { return tensors_.size(); }
  template <typename Visit>
  void visit_tensors(const Visit& visit) const {
    for (const auto& tensor : tensors_) {
      if (tensor.found) {
        Reached reached = tensor.reached;
        reached.tensor = &THPVariable_Unpack(tensor.object);
        visit(reached);
      }
    }
  }
  const std::vector<Module>& modules() const { return modules_; }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  const std::vector<PyObject*>& generators() const { return generators_; }
  const std::vector<Unversioned>& unversioned() const { return unversioned_; }
  bool has_seen(PyObject* object) const;

 private:
  struct Watched {
    PyObject* owner;
    PyTypeObject* type;  // of the owner
    PyObject* dict;
    uint64_t version;
  };
  struct Tensor {
    PyObject* object;
    Reached reached;  // without the tensor
    bool requires_grad;
    bool found;
  };
  // In a row, of a module whose forward sets attributes.
  static constexpr int kMostMisses = 8;

  explicit ModuleMemo(int misses) : misses_(misses) {}
  bool holds(How how) const;

  bool complete_ = false;
  How how_{};
  int misses_ = 0;
  std::vector<Watched> watched_;
  std::vector<Tensor> tensors_;
  std::vector<Module> modules_;
  std::vector<Buffer> buffers_;
  std::vector<PyObject*> generators_;
  std::vector<Unversioned> unversioned_;
  std::vector<PyObject*> seen_;  // sorted
};

}  // namespace reprise::bindings
