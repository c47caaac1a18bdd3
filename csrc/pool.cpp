#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <utility>

namespace reprise {

// Another thread may be in a pool while the process forks: the fork waits for it.
struct AllPools {
  static AllPools& get() {
    static AllPools* all = [] {
      pthread_atfork([] { get().lock(); }, [] { get().unlock(); }, [] { get().unlock(); });
      return new AllPools;  // never destroyed, as the pools
    }();
    return *all;
  }

  // Without a lock: whoever makes a pool must not wait for a fork, after which it would not be
  // there to end that.
  void add(Pool& pool) {
    pool.next_ = newest.load();
    while (!newest.compare_exchange_weak(pool.next_, &pool)) {
    }
  }

  void lock() {
    locked = newest.load();
    for (Pool* pool = locked; pool != nullptr; pool = pool->next_) {
      pool->mutex_.lock();
    }
  }
  void unlock() {
    for (Pool* pool = locked; pool != nullptr; pool = pool->next_) {
      pool->mutex_.unlock();
    }
  }

  std::atomic<Pool*> newest{nullptr};
  Pool* locked = nullptr;  // that one and older ones, during a fork
};

namespace {

constexpr size_t kSlabBytes = 1 << 16;  // and their alignment
constexpr size_t kMostEmpty = 256;

struct FreePlace {
  FreePlace* next;
};

}  // namespace

// The head of its own memory.
struct Pool::Slab {
  Slab* previous = nullptr;  // of the open ones
  Slab* next = nullptr;
  FreePlace* free = nullptr;
  char* fresh = nullptr;  // from here on nothing was ever taken
  char* end = nullptr;
  size_t taken = 0;

  bool is_full() const { return free == nullptr && fresh == end; }

  void* take(size_t stride) {
    ++taken;
    if (free != nullptr) {
      return std::exchange(free, free->next);
    }
    return std::exchange(fresh, fresh + stride);
  }

  static Slab* of(void* place) {
    return reinterpret_cast<Slab*>(reinterpret_cast<uintptr_t>(place) & ~(kSlabBytes - 1));
  }
};

Pool::Pool(size_t object_bytes)
    : stride_((object_bytes + alignof(std::max_align_t) - 1) & ~(alignof(std::max_align_t) - 1)) {
  AllPools::get().add(*this);
}

void Pool::prepare_for_forks() { AllPools::get(); }

Pool::Slab* Pool::slab_with_a_place() {
  if (open_ == nullptr) {
    void* memory = std::aligned_alloc(kSlabBytes, kSlabBytes);
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    auto* slab = new (memory) Slab;
    constexpr size_t kHead = (sizeof(Slab) + 63) / 64 * 64;
    slab->fresh = static_cast<char*>(memory) + kHead;
    slab->end = slab->fresh + (kSlabBytes - kHead) / stride_ * stride_;
    open_ = slab;
    ++slabs_;
    ++empty_;
  }
  return open_;
}

void Pool::take(void** first, size_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = count; i-- > 0;) {  // the last one is used first
    Slab* slab = nullptr;
    try {
      slab = slab_with_a_place();
    } catch (...) {
      put_back(first + i + 1, count - i - 1);
      throw;
    }
    empty_ -= slab->taken == 0 ? 1 : 0;
    first[i] = slab->take(stride_);
    if (slab->is_full()) {
      open_ = slab->next;
      if (open_ != nullptr) {
        open_->previous = nullptr;
      }
      slab->next = nullptr;
    }
  }
}

void Pool::give_back(void* const* first, size_t count) noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  put_back(first, count);
}

void Pool::put_back(void* const* first, size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    Slab* slab = Slab::of(first[i]);
    if (slab->is_full()) {
      slab->next = open_;
      if (open_ != nullptr) {
        open_->previous = slab;
      }
      open_ = slab;
    }
    slab->free = new (first[i]) FreePlace{slab->free};
    if (--slab->taken > 0) {
      continue;
    }
    if (++empty_ > kMostEmpty) {
      (slab->previous != nullptr ? slab->previous->next : open_) = slab->next;
      if (slab->next != nullptr) {
        slab->next->previous = slab->previous;
      }
      --slabs_;
      --empty_;
      std::free(slab);
    }
  }
}

size_t Pool::slabs() {
  std::lock_guard<std::mutex> lock(mutex_);
  return slabs_;
}

}  // namespace reprise
