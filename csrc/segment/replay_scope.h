// What is as in the forward while a replay runs fn, in both forms: generators,
// ambient state, gradients on. Everything outside is put back at the end, also
// after an error.
#pragma once

#include <c10/core/GradMode.h>

#include <string>

#include "ambient/ambient_state.h"
#include "host.h"
#include "rng/rng_scope.h"
#include "segment/replay.h"
#include "segment/segment.h"
#include "torch_compat.h"

namespace reprise {

class ReplayScope {
 public:
  explicit ReplayScope(Segment& segment)
      : segment_(segment), generators_(rewind(segment)), ambient_(segment.ambient()) {}
  ReplayScope(const ReplayScope&) = delete;
  ReplayScope& operator=(const ReplayScope&) = delete;

  // fn has ended, early or not. Puts the generators back, and says what is wrong
  // with where fn left them; empty if nothing is.
  std::string check_generators(bool stopped_early) {
    if (!segment_.options().check_rng) {
      return {};
    }
    const std::string differs = generators_.put_back_and_compare(stopped_early);
    return differs.empty() ? differs
                           : "the replay of " + segment_.name() +
                                 " draws other random numbers than its forward did.\n  " + differs;
  }

 private:
  static RngScope rewind(Segment& segment) {
    try {
      return RngScope(segment.stash(), segment.options().preserve_rng_state);
    } catch (const OutOfReach& error) {
      host().throw_checkpoint_error("torch_reprise: the replay of " + segment.name() +
                                    " cannot draw the random numbers of its forward again.\n  " +
                                    error.what());
      throw;  // not reached; the compiler does not believe a virtual's noreturn
    }
  }

  Segment& segment_;
  // In the order in which they are put in force.
  ReplayMark replaying_;
  compat::NoInferenceMode no_inference_;
  compat::WantedLeaves own_calls_{nullptr};  // backward calls inside of fn ask for their own
  RngScope generators_;
  AmbientScope ambient_;
  c10::AutoGradMode gradients_{true};
};

}  // namespace reprise
