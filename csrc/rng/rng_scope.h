// Rewinds the generators for a replay and puts them back, whatever happens.
//
// Every generator is looked at twice, once on each side of the replay: on a machine with
// eight devices looking is what costs.
#pragma once

#include <c10/util/SmallVector.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "lease.h"
#include "rng/rng_snapshot.h"
#include "rng/rng_stash.h"

namespace reprise {

class RngScope {
 public:
  // `stash` holds the states to rewind to; it must outlive this. Throws OutOfReach if one of a
  // generator that the forward moved belongs to another stream capture; others of that kind are
  // left alone. Not `enabled`: does nothing. Not `checked`: generators that the forward did not
  // draw from are not looked at, for who moves them may be somebody else.
  RngScope(const RngStash& stash, bool enabled, bool checked = true);
  RngScope(RngStash&&, bool, bool = true) = delete;
  ~RngScope() { put_back(); }
  RngScope(const RngScope&) = delete;
  RngScope& operator=(const RngScope&) = delete;

  // The replay has ended, early or not: compares where the generators are with
  // where the forward left them, puts them back, and tells what differs; empty if
  // nothing does.
  //
  // A generator that the forward did not use and that moved meanwhile was moved by
  // the replay if no other thread runs user code. Then it is put back and told.
  // Otherwise another thread may have drawn from it, as it may from any generator
  // that is its own, and neither is right.
  //
  // An error of one generator does not keep the others from being put back; the last
  // one is thrown at the end.
  std::string put_back_and_compare(bool stopped_early) {
    return finish(stopped_early ? Compare::kNotBeyond : Compare::kEnd);
  }

 private:
  enum class Compare { kNothing, kNotBeyond, kEnd };
  // A generator of the stash.
  struct Rewound {
    RngStash::View entry;
    size_t place;     // in outer_
    bool is_resting;  // the forward left it where it stood, and it still stood there
  };
  void note_outer(bool watched);
  void rewind();
  std::string finish(Compare compare);
  // Puts a generator of the stash back. What is wrong with it is told in `differs`, if
  // nothing is yet, or it is added to `unexpected`: the forward did not move it.
  void put_back_one(const Rewound& rewound, Compare compare, std::string& differs,
                    GeneratorList& unexpected);
  void put_back() noexcept;
  // Does a generator of the stash share its state with one before it?
  bool is_told_already(const Rewound& rewound) const;
  // Calls visit(generator, outer state) for the generators that are not in the stash.
  template <typename Visit>
  void visit_others(const Visit& visit) const;
  // Generators that are not in the stash have moved. Can only we have moved them?
  // Whether somebody took a turn is asked after that was seen: whoever moved one before
  // we looked had taken it by then, be it given back or not.
  bool moved_by_us() const;

  const RngStash& stash_;
  bool enabled_;
  uint64_t turns_ = 0;          // taken when this was made
  std::optional<Lease> lease_;  // given back last
  // Where the generators of the stash stood, and the other default ones, if no other thread
  // had rewound some of these when this was made.
  RngSnapshot outer_;
  c10::SmallVector<Rewound, 8> rewound_;
  bool is_rewound_ = false;  // while it was noted where they stood
};

}  // namespace reprise
