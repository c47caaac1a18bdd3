// Turns between replays that rewind generators.
//
// Note [Turns]
//
//   thread 1: loss_a.backward()      # replays a segment with dropout
//   thread 2: loss_b.backward()      # so does this one
//
// Both replays rewind the one CPU generator of the process, draw, and put it
// back. Interleaved, each draws the other's numbers and puts back what the other
// had rewound. So a replay that rewinds anything holds the lease from before it
// notes the generators until it has put them back; others wait for it without
// the interpreter lock.
//
// The holder is a chain, not a thread: a replay inside of a replay (a nested
// segment, a backward inside of fn) belongs to the chain of the outer one, and
// autograd may run that inner backward on another thread (a device thread, or a
// pool thread once backward calls are nested deeply). Each chain has a token in
// torch's thread-local state for Python objects, which torch carries to the
// threads of a backward.
//
// A replay of a segment that drew nothing rewinds nothing and takes no turn. It
// puts generators back only if no turn was taken meanwhile.
//
// What no lease can promise: a thread outside of any replay that draws from the
// shared CPU generator while a replay is running takes numbers from the rewound
// state, and moves the replay's. Give such threads generators of their own.
#pragma once

#include <cstdint>
#include <memory>
#include <thread>

namespace reprise {

class GeneratorLease {
 public:
  // Waits until no other chain holds the lease. Within a chain that holds it
  // this is nothing.
  GeneratorLease();
  ~GeneratorLease();
  GeneratorLease(const GeneratorLease&) = delete;
  GeneratorLease& operator=(const GeneratorLease&) = delete;

  // Does the chain that this thread works for hold the lease?
  static bool held_by_this_chain();
  // Is that thread waiting for the lease?
  static bool is_waiting(std::thread::id thread);
  // Turns begun so far, or none if one is being taken by another chain now.
  static bool undisturbed_since(uint64_t turns);
  static uint64_t turns();

 private:
  bool nested_;
};

}  // namespace reprise
