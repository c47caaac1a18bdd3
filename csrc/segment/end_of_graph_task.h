// What is dropped when a backward call ends, after success and after an error.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <vector>

#include "per_thread.h"
#include "torch_compat.h"

namespace reprise {

// A graph task destroys its callbacks at its end: then T::forget(key) is called for all objects
// that a thread has added and that are still there. One of these for each thread, task and class.
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
    for (const auto& added : objects_) {
      if (const auto object = added.weak.lock()) {
        object->forget(key_);
      }
    }
  }
  EndOfGraphTask(const EndOfGraphTask&) = delete;
  EndOfGraphTask& operator=(const EndOfGraphTask&) = delete;

  // Where an object was added last, for take_out().
  struct Place {
    const EndOfGraphTask* list = nullptr;  // only compared
    size_t index = 0;
  };
  Place add(T& object) {
    objects_.push_back({&object, c10::weak_intrusive_ptr<T>::reclaim_copy(&object)});
    return {this, objects_.size() - 1};
  }
  // The object is not needed any more. On a thread of the task, where nearly all go, its memory is
  // let go now: of a long chain of segments it would have left the caches by the end.
  static void take_out(const T& object, const Place& place) noexcept {
    if (place.list == nullptr) {
      return;
    }
    const auto end = per_thread<std::weak_ptr<EndOfGraphTask>>().lock();
    if (end.get() != place.list) {
      return;
    }
    auto& objects = end->objects_;
    if (place.index < objects.size() && objects[place.index].object == &object) {
      objects[place.index] = {};
      while (!objects.empty() && objects.back().object == nullptr) {
        objects.pop_back();
      }
    }
  }

 private:
  const compat::ReplayKey key_;
  struct Added {
    const T* object = nullptr;  // only compared
    c10::weak_intrusive_ptr<T> weak{c10::intrusive_ptr<T>()};
  };
  std::vector<Added> objects_;
};

}  // namespace reprise
