// Turns between replays that change the same thing for a while.
//
// Note [Turns]
//
//   thread 1: loss_a.backward()      # replays a segment with dropout
//   thread 2: loss_b.backward()      # so does this one
//
// Both replays rewind the one CPU generator of the process, draw, and put it
// back. Interleaved, each draws the other's numbers and puts back what the other
// had rewound. The same goes for everything that belongs to more than one thread
// and that a replay sets as it was in its forward: settings of the process, the
// memory of buffers, attributes of objects. So a replay holds a lease on all of
// that, from before it notes what is there until it has put it back; others wait
// for it without the interpreter lock. Replays of different generators (as on different
// devices) do not meet. Nor do those that find all else as they need it: they change
// nothing, and see what others put in force while they run.
//
// The holder is a chain, not a thread: a replay inside of a replay (a nested
// segment, a backward inside of fn) belongs to the chain of the outer one, and
// autograd may run that inner backward on another thread (a device thread, or a
// pool thread once backward calls are nested deeply). Each chain has a token that
// goes with it: Note [Chain token] in torch_compat.cpp. All generators of a replay
// are taken at once, then the settings, then all buffers, all objects, the host's
// generators, so that two chains cannot hold one each and wait for the other's;
// nested replays that need more can, as can a function that waits for another thread
// (a barrier) whose replay needs the same. Nobody waits for ever: after wait_limit()
// the replay fails with an error that says so.
//
// What no lease can promise: a thread outside of any replay that draws from a
// generator while it is rewound takes numbers from the rewound state, and moves
// the replay's; one that reads a setting or a buffer sees the forward's. Give such
// threads generators and modules of their own.
#pragma once

#include <c10/util/SmallVector.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>

namespace reprise {

class Lease {
 public:
  enum class Kind : uint8_t { kGenerator, kHostGenerators, kSettings, kBuffer, kObject };
  static constexpr size_t kKinds = static_cast<size_t>(Kind::kObject) + 1;
  // Addresses of what is taken; only compared.
  using Keys = c10::SmallVector<const void*, 8>;

  // Waits until no other chain holds any of `keys`. What this chain holds already is
  // not waited for. Throws CheckpointError after wait_limit(); `name` says what the
  // first that another one holds is called.
  Lease(Kind kind, const Keys& keys, const std::function<std::string(size_t index)>& name);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  // Of a lease of generators: how many of these there were when this one was taken,
  // itself included.
  uint64_t turn() const { return turn_; }
  // Did another chain hold anything of this kind then?
  bool others_held() const { return others_held_; }

  // Does the chain that this thread works for hold a lease?
  static bool held_by_this_chain();
  // Does another chain hold anything of this kind? Then some of it is not what the
  // program has made of it.
  static bool held_by_others(Kind kind);
  // How often leases of this kind were taken or given back. What was read between two calls
  // that say the same, while no other chain held any, is what the program has made of it.
  static uint64_t changes(Kind kind);
  // How many leases of generators were taken so far, by anybody.
  static uint64_t turns();
  // Is that thread waiting for one?
  static bool is_waiting(std::thread::id thread);

  // Five minutes, unless set.
  static std::chrono::milliseconds wait_limit();
  static void set_wait_limit(std::chrono::milliseconds limit);

 private:
  // `also`: another chain whose keys are not waited for.
  bool try_take(uint64_t token, uint64_t also, const Keys& keys);

  const Kind kind_;
  bool begins_chain_ = false;
  bool others_held_ = false;
  uint64_t turn_ = 0;
  Keys taken_;  // by this object, to be given back by it
};

}  // namespace reprise
