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

namespace reprise {

class RngScope {
 public:
  // `stash` holds the states to rewind to. Throws OutOfReach if one of a generator that
  // the forward moved belongs to another stream capture; others of that kind are left
  // alone. Not `enabled`: does nothing. Not `checked`: generators that the forward did not
  // draw from are not looked at, for who moves them may be somebody else.
  RngScope(RngSnapshot stash, bool enabled, bool checked = true);
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
  void rewind();
  std::string finish(Compare compare);
  // Puts a generator of the stash back; was it elsewhere? `differs`: told there, if
  // nothing is yet.
  bool put_back_one(size_t index, Compare compare, std::string& differs);
  void put_back() noexcept;
  bool is_left_alone(size_t index) const;
  void note_others();
  template <typename Visit>
  void visit_others(const Visit& visit) const;
  // Generators that are not in the stash have moved. Can only we have moved them?
  // Whether somebody took a turn is asked after that was seen: whoever moved one before
  // we looked had taken it by then, be it given back or not.
  bool moved_by_us() const;

  const RngSnapshot stash_;
  bool enabled_;
  uint64_t turns_ = 0;                         // taken when this was made
  std::optional<Lease> lease_;                 // given back last
  c10::SmallVector<GeneratorState, 1> outer_;  // where the stash's generators stood
  c10::SmallVector<size_t, 1> left_alone_;     // of the stash: not rewound
  // The other default generators and where they stood; none if another thread had rewound
  // some of them when this was made.
  c10::SmallVector<std::pair<at::Generator, GeneratorState>, 1> others_;
  RngSnapshot all_;  // the same where the stash is empty, as nearly always: not a copy
};

}  // namespace reprise
