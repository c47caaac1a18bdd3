// Rewinds the generators for a replay and puts them back, whatever happens.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "rng/generator_lease.h"
#include "rng/rng_snapshot.h"

namespace reprise {

class RngScope {
 public:
  // `stash` holds the states to rewind to: the generators that the forward
  // moved. Every default generator is noted, not only those, since a replay
  // that draws where the forward did not must not move the program's numbers.
  RngScope(RngSnapshot& stash, bool enabled) : stash_(stash), enabled_(enabled) {
    if (!enabled_) {
      return;
    }
    if (!stash.empty()) {
      lease_.emplace();  // before anything is noted: see Note [Turns]
    }
    turns_ = GeneratorLease::turns();
    outer_ = RngSnapshot::capture_defaults(stash.generators());
    stash.apply();
  }
  ~RngScope() { put_back(); }
  RngScope(const RngScope&) = delete;
  RngScope& operator=(const RngScope&) = delete;

  // Compares where the generators are with where the forward left them, puts
  // them back, and tells what differs; empty if nothing does. The replay has
  // ended, early or not.
  std::string put_back_and_compare(bool stopped_early) {
    if (!enabled_) {
      return {};
    }
    std::string text = stash_.divergence(stopped_early);
    for (const auto& name : put_back()) {
      text += (text.empty() ? "generator " : "\n  generator ") + name +
              "\n    the forward did not draw from it, the replay did";
    }
    return text;
  }

 private:
  std::vector<std::string> put_back() {
    std::vector<std::string> unexpected;
    if (enabled_ && (lease_.has_value() || GeneratorLease::undisturbed_since(turns_))) {
      unexpected = outer_.restore_moved(&stash_);
    }
    enabled_ = false;
    lease_.reset();
    return unexpected;
  }

  RngSnapshot& stash_;
  bool enabled_;
  std::optional<GeneratorLease> lease_;
  uint64_t turns_ = 0;
  RngSnapshot outer_;
};

}  // namespace reprise
