// Memory for objects of one class, of which a graph has thousands.
//
// In a backward over a long chain of segments each one goes away soon after its replay. malloc
// joins what it gets back with the chunks on both sides, whose headers have left the caches long
// ago, and tidies up all small chunks on the way. Here an object's place is put on a list, and
// the next object gets it.
//
//   class Segment final : public Recorder, public Pooled<Segment> { ... };
//
// Places come in slabs of 64 KiB. A thread keeps some dozens for itself, so that the lock of the
// pool is taken rarely; slabs whose places are all back are freed, but for 16 MiB of them. With
// AddressSanitizer nothing is pooled: it must see each object go.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define REPRISE_POOLS 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define REPRISE_POOLS 0
#endif
#endif
#ifndef REPRISE_POOLS
#define REPRISE_POOLS 1
#endif

namespace reprise {

class Pool {
 public:
  // Never destroyed: objects may outlive static teardown.
  explicit Pool(size_t object_bytes);
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Fills `places` from `first` on.
  void take(void** first, size_t count);
  void give_back(void* const* first, size_t count) noexcept;

  // Whoever takes locks around a fork under which pools are used calls this before it says so to
  // the system: the last one to say so locks first.
  static void prepare_for_forks();

  // Slabs that it has now, for tests.
  size_t slabs();

 private:
  struct Slab;
  // With the lock.
  Slab* slab_with_a_place();
  void put_back(void* const* first, size_t count) noexcept;

  const size_t stride_;
  std::mutex mutex_;
  Slab* open_ = nullptr;  // those with a free place, newest first
  size_t slabs_ = 0;
  size_t empty_ = 0;      // of these
  Pool* next_ = nullptr;  // of all pools
  friend struct AllPools;
};

// A thread's own places of one pool.
class PlacesOfThread {
 public:
  void* take(Pool& pool) {
    if (count_ == 0) {
      pool.take(places_.data(), kAtOnce);
      count_ = kAtOnce;
    }
    return places_[--count_];
  }
  void give_back(Pool& pool, void* place) noexcept {
    if (count_ == places_.size()) {
      pool.give_back(places_.data(), kAtOnce);  // the coldest
      count_ -= kAtOnce;
      for (size_t i = 0; i < count_; ++i) {
        places_[i] = places_[i + kAtOnce];
      }
    }
    places_[count_++] = place;
  }
  void give_all_back(Pool& pool) noexcept {
    pool.give_back(places_.data(), count_);
    count_ = 0;
  }

 private:
  static constexpr size_t kAtOnce = 32;
  size_t count_ = 0;
  std::array<void*, 2 * kAtOnce> places_;
};

// `T` is the class that derives from it, and has no subclasses.
template <typename T>
class Pooled {
 public:
#if REPRISE_POOLS
  static void* operator new(size_t) {
    if (PlacesOfThread* own = places()) [[likely]] {
      return own->take(pool());
    }
    void* place = nullptr;
    pool().take(&place, 1);
    return place;
  }
  static void operator delete(void* place) noexcept {
    if (PlacesOfThread* own = places()) [[likely]] {
      own->give_back(pool(), place);
    } else {
      pool().give_back(&place, 1);
    }
  }
#endif

  static Pool& pool() {
    static auto& pool = *new Pool(sizeof(T));
    return pool;
  }

 private:
  // Null at the end of the thread: objects may outlive what it has of its own.
  static PlacesOfThread* places() noexcept {
    struct Owner {
      PlacesOfThread places;
      ~Owner() {
        t_places = nullptr;
        t_is_over = true;
        places.give_all_back(pool());
      }
    };
    if (t_places == nullptr && !t_is_over) [[unlikely]] {
      static thread_local Owner owner;
      t_places = &owner.places;
    }
    return t_places;
  }
  static inline thread_local constinit PlacesOfThread* t_places = nullptr;
  static inline thread_local constinit bool t_is_over = false;
};

}  // namespace reprise
