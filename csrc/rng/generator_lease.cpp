#include "rng/generator_lease.h"

#include <c10/util/StringUtil.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "host.h"
#include "rng/rng_snapshot.h"
#include "torch_compat.h"

namespace reprise {
namespace {

struct State {
  std::mutex mutex;
  std::condition_variable given_back;
  std::vector<std::pair<const void*, uint64_t>> held;  // generator, token of its chain
  std::vector<std::thread::id> waiting;
};

std::atomic<int64_t> g_wait_limit_ms{300'000};
std::atomic<uint64_t> g_last_token{0};
// Read without the lock by every replay; changed with it.
std::atomic<uint64_t> g_turns{0};
std::atomic<size_t> g_held{0};
State* g_state = nullptr;  // never destroyed: threads may outlive static teardown

State& state() {
  static const bool made = [] {
    g_state = new State;
    // A child has one thread, and none of the others gives anything back there.
    pthread_atfork(nullptr, nullptr, [] {
      g_state = new State;
      g_held.store(0);
    });
    return true;
  }();
  (void)made;
  return *g_state;
}

bool held_by_other(const State& s, const void* generator, uint64_t token) {
  return std::any_of(s.held.begin(), s.held.end(), [&](const auto& held) {
    return held.first == generator && held.second != token;
  });
}

bool held_by_other_than(const State& s, uint64_t token) {
  return std::any_of(s.held.begin(), s.held.end(),
                     [token](const auto& held) { return held.second != token; });
}

}  // namespace

bool GeneratorLease::try_take(uint64_t token, const RngSnapshot& stash) {
  State& s = state();
  for (size_t i = 0; i < stash.size(); ++i) {
    if (held_by_other(s, stash.generator(i).unsafeGetGeneratorImpl(), token)) {
      return false;
    }
  }
  const size_t before = s.held.size();  // no generator is in a stash twice
  for (size_t i = 0; i < stash.size(); ++i) {
    const std::pair<const void*, uint64_t> mine(stash.generator(i).unsafeGetGeneratorImpl(), token);
    const auto end = s.held.begin() + static_cast<std::ptrdiff_t>(before);
    if (std::find(s.held.begin(), end, mine) == end) {
      s.held.push_back(mine);
      taken_.push_back(mine.first);
    }
  }
  g_held.store(s.held.size());
  others_held_ = held_by_other_than(s, token);
  // Last: whoever counts this turn as one of the past sees that it is held.
  turn_ = g_turns.fetch_add(1) + 1;
  return true;
}

GeneratorLease::GeneratorLease(const RngSnapshot& stash) {
  // While a chain has a token it holds a lease.
  uint64_t token = g_held.load() == 0 ? 0 : compat::chain_token();
  if (token == 0) {
    begins_chain_ = true;
    token = ++g_last_token;
  }
  State& s = state();
  bool taken = false;
  {
    // Uncontended, which is nearly always, the interpreter lock is not touched.
    std::lock_guard<std::mutex> lock(s.mutex);
    taken = try_take(token, stash);
  }
  if (!taken) {
    const InterpreterReleased released;
    const auto self = std::this_thread::get_id();
    std::unique_lock<std::mutex> lock(s.mutex);
    s.waiting.push_back(self);
    taken = s.given_back.wait_for(lock, wait_limit(), [&] { return try_take(token, stash); });
    s.waiting.erase(std::find(s.waiting.begin(), s.waiting.end(), self));
  }
  if (!taken) {
    host().throw_checkpoint_error(c10::str(
        "torch_reprise: a replay waited ", wait_limit().count() / 1000.0,
        " s for the random generator ", generator_name(stash.generator(0)),
        ", which the replay of another thread has rewound and not put back. Does its function "
        "wait for this thread (a barrier, a collective, join)? Replays that draw from one "
        "generator take turns: give each thread a generator or device of its own, or pass "
        "preserve_rng_state=False."));
  }
  if (begins_chain_) {
    compat::set_chain_token(token);
  }
}

GeneratorLease::~GeneratorLease() {
  if (begins_chain_) {
    compat::set_chain_token(0);
  }
  State& s = state();
  bool anybody_waits = false;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    anybody_waits = !s.waiting.empty();
    s.held.erase(std::remove_if(s.held.begin(), s.held.end(),
                                [this](const auto& held) {
                                  return std::find(taken_.begin(), taken_.end(), held.first) !=
                                         taken_.end();
                                }),
                 s.held.end());
    g_held.store(s.held.size());
  }
  if (anybody_waits) {
    s.given_back.notify_all();
  }
}

bool GeneratorLease::held_by_this_chain() {
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
                     [token](const auto& held) { return held.second == token; });
}

bool GeneratorLease::held_by_others() {
  if (g_held.load() == 0) {
    return false;
  }
  const uint64_t token = compat::chain_token();
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return held_by_other_than(s, token);
}

uint64_t GeneratorLease::turns() { return g_turns.load(); }

bool GeneratorLease::is_waiting(std::thread::id thread) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return std::find(s.waiting.begin(), s.waiting.end(), thread) != s.waiting.end();
}

std::chrono::milliseconds GeneratorLease::wait_limit() {
  return std::chrono::milliseconds(g_wait_limit_ms.load(std::memory_order_relaxed));
}

void GeneratorLease::set_wait_limit(std::chrono::milliseconds limit) {
  g_wait_limit_ms.store(limit.count(), std::memory_order_relaxed);
}

}  // namespace reprise
