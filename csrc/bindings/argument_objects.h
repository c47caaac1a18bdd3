// Objects among the arguments that are neither tensors nor containers (a cache, a state
// object) and that fn may change: their attributes, and the lists and dicts in these.
//
// Noted when a segment begins, by one shallow copy of each; kept only if the forward
// changed something. A replay finds the attributes that the forward changed as they were
// then, and the object has what it has now again when the replay is over; others are left
// alone, for another thread or a signal may set them meanwhile. Deeper changes (a list in
// a list, an object in an attribute) are not seen.
#pragma once

#include <Python.h>

#include <vector>

#include "bindings/python_object.h"
#include "lease.h"

namespace reprise::bindings {

// With the interpreter lock, the destructor too.
class ArgumentObjects {
 public:
  // Objects that have no dict of their own count as unchangeable.
  void note(const std::vector<PyObject*>& objects);
  // The forward is over: forgets those that are as they were.
  void settle();
  // Appends what a scope changes: the address of each dict.
  void add_to(Lease::Keys& keys) const;

 private:
  friend class ArgumentObjectsScope;
  struct Noted {
    Ref dict;   // the object's own
    Ref begin;  // a copy of it, with copies of the lists and dicts in it
    Ref keys;   // a set, of what the forward changed; null while it runs: all
  };
  std::vector<Noted> noted_;
};

class ArgumentObjectsScope {
 public:
  explicit ArgumentObjectsScope(const ArgumentObjects& objects);
  ~ArgumentObjectsScope() { put_back(); }
  ArgumentObjectsScope(const ArgumentObjectsScope&) = delete;
  ArgumentObjectsScope& operator=(const ArgumentObjectsScope&) = delete;

 private:
  struct Replaced {
    Ref dict;
    Ref now;   // a copy of it
    Ref keys;  // an iterable of those that are put back
  };
  void put_back();
  std::vector<Replaced> replaced_;
};

}  // namespace reprise::bindings
