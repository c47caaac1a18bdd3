// Rewinds the generators for a replay and puts them back, whatever happens.
#pragma once

#include <optional>

#include "rng/generator_lease.h"
#include "rng/rng_snapshot.h"

namespace reprise {

class RngScope {
 public:
  // `stash` holds the states to rewind to: the generators that the forward
  // moved. Every default generator is noted, not only those, since a replay
  // that draws where the forward did not must not move the program's numbers.
  RngScope(RngSnapshot& stash, bool enabled) : enabled_(enabled) {
    if (!enabled_) {
      return;
    }
    if (!stash.empty()) {
      lease_.emplace();  // before anything is noted: see Note [Turns]
    }
    turns_ = GeneratorLease::turns();
    outer_ = RngSnapshot::capture_defaults();
    stash.apply();
  }
  ~RngScope() {
    if (enabled_ && (lease_.has_value() || GeneratorLease::undisturbed_since(turns_))) {
      outer_.restore_moved();
    }
  }
  RngScope(const RngScope&) = delete;
  RngScope& operator=(const RngScope&) = delete;

 private:
  bool enabled_;
  std::optional<GeneratorLease> lease_;  // given back last
  uint64_t turns_ = 0;
  RngSnapshot outer_;
};

}  // namespace reprise
