// One object for all equal values of which a program meets few: kept by a pointer, compared by it,
// never destroyed (segments may outlive static teardown).
#pragma once

#include <pthread.h>

#include <list>
#include <mutex>
#include <new>

namespace reprise {

// Made of the first such value, which it is equal to.
template <typename T, typename Value>
const T* the_one_equal_to(const Value& value) {
  static std::mutex mutex;
  static auto& all = *[] {
    // A thread that held the lock when the process forked is not in the child.
    pthread_atfork(nullptr, nullptr, [] { new (&mutex) std::mutex; });
    return new std::list<T>;
  }();
  std::lock_guard<std::mutex> lock(mutex);
  for (const T& known : all) {
    if (known == value) {
      return &known;
    }
  }
  return &all.emplace_back(value);
}

}  // namespace reprise
