// Rewinds the generators for a replay and puts them back, whatever happens.
#pragma once

#include "rng/rng_snapshot.h"

namespace reprise {

class RngScope {
 public:
  // `stash` holds the states to rewind to: the generators that the forward
  // moved. Every default generator is noted, not only those, since a replay
  // that draws where the forward did not must not move the program's numbers.
  RngScope(RngSnapshot& stash, bool enabled) : enabled_(enabled) {
    if (enabled_) {
      outer_ = RngSnapshot::capture_defaults();
      stash.apply();
    }
  }
  ~RngScope() {
    if (enabled_) {
      outer_.restore_moved();
    }
  }
  RngScope(const RngScope&) = delete;
  RngScope& operator=(const RngScope&) = delete;

 private:
  bool enabled_;
  RngSnapshot outer_;
};

}  // namespace reprise
