// Rewinds the generators for a replay and puts them back, whatever happens.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "host.h"
#include "rng/generator_lease.h"
#include "rng/rng_snapshot.h"

namespace reprise {

class RngScope {
 public:
  // `stash` holds the states to rewind to. Throws OutOfReach if one belongs to
  // another stream capture.
  RngScope(RngSnapshot stash, bool enabled) : stash_(std::move(stash)), enabled_(enabled) {
    if (!enabled_) {
      return;
    }
    if (stash_.empty()) {
      turns_ = GeneratorLease::turns();
      if (!GeneratorLease::held_by_others()) {
        others_ = RngSnapshot::capture_defaults();
      }
      return;
    }
    lease_.emplace(stash_);  // before they are noted: see Note [Turns]
    turns_ = lease_->turn();
    if (!lease_->others_held()) {
      others_ = RngSnapshot::capture_defaults_except(stash_);
    }
    outer_ = stash_.states();
    try {
      left_alone_ = stash_.apply(outer_);
    } catch (...) {
      put_back();
      throw;
    }
  }
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
  std::string put_back_and_compare(bool stopped_early) {
    if (!enabled_) {
      return {};
    }
    const auto marks = stash_.marks();
    std::string text = stash_.divergence(stopped_early, left_alone_, marks);
    const auto add = [&text](const at::Generator& generator) {
      text += (text.empty() ? "generator " : "\n  generator ") + generator_name(generator) +
              "\n    the forward did not draw from it, the replay did";
    };
    for (const size_t i : left_alone_) {
      if (!outer_[i].is_state_of(stash_.generator(i), marks[i]) && host().is_alone()) {
        add(stash_.generator(i));
      }
    }
    if (was_moved_by_us()) {
      for (const auto& generator : others_.restore_moved()) {
        add(generator);
      }
    }
    stash_.put_back(outer_, &marks);
    enabled_ = false;
    lease_.reset();
    return text;
  }

 private:
  // Were generators that are not in the stash moved, and can only we have done it?
  // Whether somebody took a turn is asked last: whoever moved one before we looked
  // had taken it by then, be it given back or not.
  bool was_moved_by_us() const {
    return others_.any_moved() && GeneratorLease::turns() == turns_ && host().is_alone();
  }

  void put_back() noexcept {
    if (!enabled_) {
      return;
    }
    try {
      stash_.put_back(outer_);
      if (was_moved_by_us()) {
        others_.restore_moved();
      }
    } catch (...) {  // NOLINT: an error is on its way already, and tells more than this one
    }
    enabled_ = false;
  }

  const RngSnapshot stash_;
  bool enabled_;
  uint64_t turns_ = 0;                   // taken when this was made
  std::optional<GeneratorLease> lease_;  // given back last
  RngSnapshot::States outer_;            // of the stash's generators; none if it is empty
  RngSnapshot::Indices left_alone_;      // of the stash: not rewound, see apply()
  // Of the other default generators; empty if some of them were rewound by another
  // thread when this was made.
  RngSnapshot others_;
};

}  // namespace reprise
