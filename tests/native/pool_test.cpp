// Pools: places that nobody else has, that come back from whatever thread, and slabs that go.
#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "check.h"

using reprise::Pool;
using reprise::Pooled;

namespace {

std::vector<void*> take(Pool& pool, size_t count) {
  std::vector<void*> places(count);
  pool.take(places.data(), count);
  return places;
}

TEST(places_do_not_overlap) {
  constexpr size_t kBytes = 200;
  auto& pool = *new Pool(kBytes);
  const auto places = take(pool, 5000);
  for (size_t i = 0; i < places.size(); ++i) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(places[i]) % alignof(std::max_align_t), 0U);
    std::memset(places[i], static_cast<int>(i % 251), kBytes);
  }
  bool is_whole = true;
  for (size_t i = 0; i < places.size(); ++i) {
    const auto* bytes = static_cast<const unsigned char*>(places[i]);
    is_whole &= std::all_of(bytes, bytes + kBytes, [&](auto byte) { return byte == i % 251; });
  }
  EXPECT(is_whole);
  pool.give_back(places.data(), places.size());
}

TEST(places_are_used_again) {
  auto& pool = *new Pool(48);
  auto first = take(pool, 3000);
  const size_t slabs = pool.slabs();
  EXPECT(slabs >= 3000 * 48 / 65536);
  // In whatever order they come back.
  std::reverse(first.begin() + 1000, first.end());
  pool.give_back(first.data(), first.size());
  const auto second = take(pool, 3000);
  EXPECT_EQ(pool.slabs(), slabs);
  EXPECT(std::set(first.begin(), first.end()) == std::set(second.begin(), second.end()));
  pool.give_back(second.data(), second.size());
}

TEST(what_is_taken_next_is_what_lies_next) {
  // A forward fills memory in order, which the processor sees coming.
  auto& pool = *new Pool(64);
  const auto places = take(pool, 8);
  EXPECT(std::is_sorted(places.rbegin(), places.rend()));  // the last one is used first
  pool.give_back(places.data(), places.size());
}

TEST(slabs_without_objects_are_freed_but_for_16_mib) {
  auto& pool = *new Pool(60'000);  // one in each slab
  const auto places = take(pool, 1000);
  EXPECT_EQ(pool.slabs(), 1000U);
  pool.give_back(places.data() + 1, 999);
  EXPECT_EQ(pool.slabs(), 257U);
  const auto more = take(pool, 300);
  EXPECT_EQ(pool.slabs(), 301U);
  pool.give_back(more.data(), 300);
  pool.give_back(places.data(), 1);
  EXPECT_EQ(pool.slabs(), 256U);
}

struct Counted : Pooled<Counted> {
  explicit Counted(int value = 7) : value(value) { ++alive; }
  ~Counted() { --alive; }
  int value;
  std::array<char, 100> rest = {};
  static inline std::atomic<int> alive{0};
};

TEST(objects_made_on_one_thread_and_destroyed_on_another_do_not_pile_up) {
  for (int round = 0; round < 200; ++round) {
    std::vector<std::unique_ptr<Counted>> made;
    for (int i = 0; i < 500; ++i) {
      made.push_back(std::make_unique<Counted>(i));
    }
    std::thread([&] { made.clear(); }).join();
  }
  EXPECT_EQ(Counted::alive.load(), 0);
  EXPECT(Counted::pool().slabs() <= 4);  // 500 objects, and what two threads keep
}

TEST(a_thread_may_destroy_objects_at_its_very_end) {
  struct AtEnd {
    std::unique_ptr<Counted> object;
    ~AtEnd() {
      object.reset();
      object = std::make_unique<Counted>(3);
      EXPECT_EQ(object->value, 3);
    }
  };
  std::thread([] {
    static thread_local AtEnd at_end;  // older than what the thread has of the pool
    at_end.object = std::make_unique<Counted>();
  }).join();
  EXPECT_EQ(Counted::alive.load(), 0);
}

TEST(many_threads_at_once) {
  std::atomic<bool> is_right{true};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, &is_right] {
      std::vector<std::unique_ptr<Counted>> mine;
      for (int i = 0; i < 20'000; ++i) {
        mine.push_back(std::make_unique<Counted>(t * 100'000 + i));
        if (i % 3 == 0) {
          std::swap(mine.front(), mine.back());
          mine.pop_back();
        }
      }
      for (const auto& object : mine) {
        is_right = is_right && object->value / 100'000 == t;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  EXPECT(is_right);
  EXPECT_EQ(Counted::alive.load(), 0);
}

TEST(a_child_of_fork_can_use_a_pool_that_another_thread_was_in) {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) {
      const auto places = take(Counted::pool(), 64);
      Counted::pool().give_back(places.data(), places.size());
    }
  });
  for (int i = 0; i < 50; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // instead of waiting for ever
      const auto places = take(Counted::pool(), 64);
      Counted::pool().give_back(places.data(), places.size());
      _exit(0);
    }
    int status = -1;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
  }
  stop = true;
  busy.join();
}

}  // namespace

TEST_MAIN()
