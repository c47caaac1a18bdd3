#include "rng/generator_lease.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "host.h"
#include "torch_compat.h"

namespace reprise {
namespace {

struct State {
  std::mutex mutex;
  std::condition_variable free;
  uint64_t holder = 0;  // the token of the chain that holds the lease; 0: nobody
  uint64_t turns = 0;   // the last token given out
  std::vector<std::thread::id> waiting;
};

State& state() {
  static State* state = new State;  // never destroyed: threads may outlive static teardown
  return *state;
}

}  // namespace

GeneratorLease::GeneratorLease() : nested_(held_by_this_chain()) {
  if (nested_) {
    return;
  }
  State& s = state();
  uint64_t token = 0;
  {
    // Uncontended, which is nearly always, the interpreter lock is not touched.
    std::unique_lock<std::mutex> lock(s.mutex);
    if (s.holder == 0) {
      token = s.holder = ++s.turns;
    }
  }
  if (token == 0) {
    const InterpreterReleased released;
    const auto self = std::this_thread::get_id();
    std::unique_lock<std::mutex> lock(s.mutex);
    s.waiting.push_back(self);
    s.free.wait(lock, [&s] { return s.holder == 0; });
    s.waiting.erase(std::find(s.waiting.begin(), s.waiting.end(), self));
    token = s.holder = ++s.turns;
  }
  compat::set_chain_token(token);
}

GeneratorLease::~GeneratorLease() {
  if (nested_) {
    return;
  }
  compat::set_chain_token(0);
  State& s = state();
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.holder = 0;
  }
  s.free.notify_one();
}

bool GeneratorLease::held_by_this_chain() {
  const uint64_t token = compat::chain_token();
  if (token == 0) {
    return false;
  }
  std::lock_guard<std::mutex> lock(state().mutex);
  return state().holder == token;
}

bool GeneratorLease::is_waiting(std::thread::id thread) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return std::find(s.waiting.begin(), s.waiting.end(), thread) != s.waiting.end();
}

bool GeneratorLease::undisturbed_since(uint64_t turns) {
  const uint64_t token = compat::chain_token();
  std::lock_guard<std::mutex> lock(state().mutex);
  return state().turns == turns && (state().holder == 0 || state().holder == token);
}

uint64_t GeneratorLease::turns() {
  std::lock_guard<std::mutex> lock(state().mutex);
  return state().turns;
}

}  // namespace reprise
