// What is dropped when a backward call ends, after success and after an error.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <vector>

#include "per_thread.h"
#include "torch_compat.h"

namespace reprise {

// A graph task destroys its callbacks at its end: then T::forget(key) is called for all objects
// that a thread has added. One of these for each thread, task and class.
template <typename T>
class EndOfGraphTask {
 public:
  // Of the task that this thread works for.
  static std::shared_ptr<EndOfGraphTask> of(const compat::ReplayKey& key) {
    // The task may run its end on another thread, but not while a thread of it is
    // here: the list needs no lock.
    auto& newest = per_thread<std::weak_ptr<EndOfGraphTask>>();
    auto end = newest.lock();
    if (!end || !(end->key_ == key)) {
      end = std::make_shared<EndOfGraphTask>(key);
      newest = end;
      compat::at_end_of_graph_task([end] {});
    }
    return end;
  }

  explicit EndOfGraphTask(const compat::ReplayKey& key) : key_(key) {}
  ~EndOfGraphTask() {
    for (const auto& weak : objects_) {
      if (const auto object = weak.lock()) {
        object->forget(key_);
      }
    }
  }
  EndOfGraphTask(const EndOfGraphTask&) = delete;
  EndOfGraphTask& operator=(const EndOfGraphTask&) = delete;

  void add(T& object) { objects_.push_back(c10::weak_intrusive_ptr<T>::reclaim_copy(&object)); }

 private:
  const compat::ReplayKey key_;
  std::vector<c10::weak_intrusive_ptr<T>> objects_;
};

}  // namespace reprise
