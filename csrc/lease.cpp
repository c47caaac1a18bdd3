#include "lease.h"

#include <c10/util/StringUtil.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "host.h"
#include "own_numbers.h"
#include "torch_compat.h"

namespace reprise {
namespace {

struct State {
  std::mutex mutex;
  std::condition_variable given_back;
  struct Held {
    const void* key;
    uint64_t token;  // of its chain
    Lease::Kind kind;
  };
  std::vector<Held> held;
  std::vector<std::thread::id> waiting;
};

std::atomic<int64_t> g_wait_limit_ms{300'000};
// Read without the lock by every replay; changed with it.
std::atomic<uint64_t> g_turns{0};
std::atomic<size_t> g_held{0};
struct OfKind {
  std::atomic<size_t> held{0};
  std::atomic<uint64_t> changes{0};
};
std::array<OfKind, Lease::kKinds> g_of_kinds;
State* g_state = nullptr;  // never destroyed: threads may outlive static teardown

State& state() {
  static const bool made = [] {
    g_state = new State;
    // A child has one thread, and none of the others gives anything back there.
    pthread_atfork(nullptr, nullptr, [] {
      g_state = new State;
      g_held.store(0);
      for (auto& of_kind : g_of_kinds) {
        of_kind.held.store(0);
      }
    });
    return true;
  }();
  (void)made;
  return *g_state;
}

bool held_by_other(const State& s, const void* key, uint64_t token, uint64_t also) {
  return std::any_of(s.held.begin(), s.held.end(), [&](const auto& held) {
    return held.key == key && held.token != token && held.token != also;
  });
}

bool held_by_other_than(const State& s, Lease::Kind kind, uint64_t token) {
  return std::any_of(s.held.begin(), s.held.end(),
                     [&](const auto& held) { return held.kind == kind && held.token != token; });
}

OfKind& of_kind(Lease::Kind kind) { return g_of_kinds[static_cast<size_t>(kind)]; }

// With the lock: `held` of a kind are held now. The change comes first: who finds that nobody holds
// any more has not missed it. The fences go with those of the readers.
void note_held(Lease::Kind kind, size_t held) {
  constexpr auto kRelaxed = std::memory_order_relaxed;
  OfKind& of = of_kind(kind);
  std::atomic_thread_fence(std::memory_order_release);
  of.changes.store(of.changes.load(kRelaxed) + 1, kRelaxed);
  g_held.store(g_held.load(kRelaxed) + held - of.held.load(kRelaxed), kRelaxed);
  of.held.store(held, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_release);
}

}  // namespace

bool Lease::try_take(uint64_t token, uint64_t also, const Keys& keys) {
  State& s = state();
  for (const void* key : keys) {
    if (held_by_other(s, key, token, also)) {
      return false;
    }
  }
  // A key that is named twice is held twice, and given back as often.
  const size_t before = s.held.size();
  for (const void* key : keys) {
    const auto end = s.held.begin() + before;
    if (std::none_of(s.held.begin(), end, [key](const auto& held) { return held.key == key; })) {
      s.held.push_back({key, token, kind_});
      taken_.push_back(key);
    }
  }
  note_held(kind_, of_kind(kind_).held + taken_.size());
  others_held_ = held_by_other_than(s, kind_, token);
  // Last: whoever counts this turn as one of the past sees that it is held.
  if (kind_ == Kind::kGenerator) {
    turn_ = g_turns.load(std::memory_order_relaxed) + 1;
    g_turns.store(turn_, std::memory_order_release);
  }
  return true;
}

Lease::Lease(Kind kind, const Keys& keys, const std::function<std::string(size_t index)>& name)
    : kind_(kind) {
  // While a chain has a token it holds a lease.
  uint64_t token = g_held.load() == 0 ? 0 : compat::chain_token();
  if (token == 0) {
    begins_chain_ = true;
    token = own_number<Lease>();
  }
  State& s = state();
  bool taken = false;
  size_t contended = 0;
  {
    // Uncontended, which is nearly always, the interpreter lock is not touched.
    std::lock_guard<std::mutex> lock(s.mutex);
    taken = try_take(token, token, keys);
  }
  if (!taken) {
    // Of a node of another backward, which this thread runs while it waits for one of its own.
    const uint64_t carried = compat::carried_chain_token();
    const uint64_t also = carried != 0 ? carried : token;
    const InterpreterReleased released;
    const auto self = std::this_thread::get_id();
    std::unique_lock<std::mutex> lock(s.mutex);
    s.waiting.push_back(self);
    taken = s.given_back.wait_for(lock, wait_limit(), [&] { return try_take(token, also, keys); });
    s.waiting.erase(std::find(s.waiting.begin(), s.waiting.end(), self));
    while (!taken && contended + 1 < keys.size() &&
           !held_by_other(s, keys[contended], token, also)) {
      ++contended;
    }
  }
  if (!taken) {
    throw_checkpoint_error(c10::str(
        "torch_reprise: a replay waited ", wait_limit().count() / 1000.0, " s for ",
        name(contended),
        ", which the replay of another thread has set as it was in its forward and not put "
        "back. Does its function wait for this thread (a barrier, a collective, join)? "
        "Replays that change the same thing take turns: give each thread ",
        kind == Kind::kGenerator
            ? "a generator or device of its own, or pass preserve_rng_state=False."
            : "modules and objects of its own, and settings that stay the same."));
  }
  if (begins_chain_) {
    compat::set_chain_token(token);
  }
}

Lease::~Lease() {
  if (begins_chain_) {
    compat::set_chain_token(0);
  }
  State& s = state();
  bool anybody_waits = false;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    anybody_waits = !s.waiting.empty();
    const size_t before = s.held.size();
    if (before == taken_.size()) {  // nobody else holds any, as nearly always
      s.held.clear();
    } else {
      s.held.erase(std::remove_if(s.held.begin(), s.held.end(),
                                  [this](const auto& held) {
                                    return std::find(taken_.begin(), taken_.end(), held.key) !=
                                           taken_.end();
                                  }),
                   s.held.end());
    }
    note_held(kind_, of_kind(kind_).held - (before - s.held.size()));
  }
  if (anybody_waits) {
    s.given_back.notify_all();
  }
}

bool Lease::held_by_this_chain() {
  if (g_held.load() == 0) {
    return false;
  }
  const uint64_t token = compat::chain_token();
  if (token == 0) {
    return false;
  }
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return std::any_of(s.held.begin(), s.held.end(),
                     [token](const auto& held) { return held.token == token; });
}

bool Lease::held_by_others(Kind kind) {
  std::atomic_thread_fence(std::memory_order_acquire);
  if (of_kind(kind).held.load(std::memory_order_acquire) == 0) {
    return false;
  }
  const uint64_t token = compat::chain_token();
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return held_by_other_than(s, kind, token);
}

uint64_t Lease::changes(Kind kind) {
  std::atomic_thread_fence(std::memory_order_acquire);
  return of_kind(kind).changes.load(std::memory_order_acquire);
}

uint64_t Lease::turns() {
  // Behind what was seen before: whoever moved a generator had taken his turn by then.
  std::atomic_thread_fence(std::memory_order_acquire);
  return g_turns.load(std::memory_order_acquire);
}

bool Lease::is_waiting(std::thread::id thread) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return std::find(s.waiting.begin(), s.waiting.end(), thread) != s.waiting.end();
}

std::chrono::milliseconds Lease::wait_limit() {
  return std::chrono::milliseconds(g_wait_limit_ms.load(std::memory_order_relaxed));
}

void Lease::set_wait_limit(std::chrono::milliseconds limit) {
  g_wait_limit_ms.store(limit.count(), std::memory_order_relaxed);
}

}  // namespace reprise
