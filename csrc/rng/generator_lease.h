// Turns between replays that rewind the same generator.
//
// Note [Turns]
//
//   thread 1: loss_a.backward()      # replays a segment with dropout
//   thread 2: loss_b.backward()      # so does this one
//
// Both replays rewind the one CPU generator of the process, draw, and put it
// back. Interleaved, each draws the other's numbers and puts back what the other
// had rewound. So a replay holds a lease on every generator that it rewinds, from
// before it notes where they stand until it has put them back; others wait for it
// without the interpreter lock. Replays on different devices do not meet.
//
// The holder is a chain, not a thread: a replay inside of a replay (a nested
// segment, a backward inside of fn) belongs to the chain of the outer one, and
// autograd may run that inner backward on another thread (a device thread, or a
// pool thread once backward calls are nested deeply). Each chain has a token in
// torch's thread-local state for Python objects, which torch carries to the
// threads of a backward. All generators of a replay are taken at once, so that
// two chains cannot hold one each and wait for the other's; nested replays that
// need more can, as can a function that waits for another thread (a barrier)
// whose replay needs the same generator. Nobody waits for ever: after
// wait_limit() the replay fails with an error that says so.
//
// What no lease can promise: a thread outside of any replay that draws from a
// generator while it is rewound takes numbers from the rewound state, and moves
// the replay's. Give such threads generators of their own.
#pragma once

#include <c10/util/SmallVector.h>

#include <chrono>
#include <cstdint>
#include <thread>

namespace reprise {

class RngSnapshot;

class GeneratorLease {
 public:
  // Waits until no other chain holds any of the generators of `stash`. What this chain
  // holds already is not waited for. Throws CheckpointError after wait_limit().
  explicit GeneratorLease(const RngSnapshot& stash);
  ~GeneratorLease();
  GeneratorLease(const GeneratorLease&) = delete;
  GeneratorLease& operator=(const GeneratorLease&) = delete;

  // How many turns there were when this one was taken, itself included.
  uint64_t turn() const { return turn_; }
  // Did another chain hold any generator then?
  bool others_held() const { return others_held_; }

  // Does the chain that this thread works for hold a lease?
  static bool held_by_this_chain();
  // Does another chain hold any? Then some generators are not where the program is.
  static bool held_by_others();
  // How many were taken so far, by anybody.
  static uint64_t turns();
  // Is that thread waiting for one?
  static bool is_waiting(std::thread::id thread);

  // Five minutes, unless set.
  static std::chrono::milliseconds wait_limit();
  static void set_wait_limit(std::chrono::milliseconds limit);

 private:
  bool try_take(uint64_t token, const RngSnapshot& stash);

  bool begins_chain_ = false;
  bool others_held_ = false;
  uint64_t turn_ = 0;
  c10::SmallVector<const void*, 2> taken_;  // by this object, to be given back by it
};

}  // namespace reprise
