// Numbers that no two askers get.
#pragma once

#include <atomic>
#include <cstdint>

#include "per_thread.h"

namespace reprise {

// Another one for each call with this `Tag`, on whatever thread; never a multiple of 16, so never
// 0. A thread takes fifteen at once, so that threads rarely meet.
template <typename Tag>
uint64_t own_number() {
  struct Last {
    uint64_t number = 15;
  };
  static std::atomic<uint64_t> taken{0};
  uint64_t& last = per_thread<Last>().number;
  if (last % 16 == 15) {
    last = taken.fetch_add(16, std::memory_order_relaxed);
  }
  return ++last;
}

}  // namespace reprise
