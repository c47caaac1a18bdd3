// What is as in the forward while a replay runs fn, in both forms: generators,
// ambient state, gradients on. Everything outside is put back at the end, also
// after an error.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string>
#include <utility>

#include "ambient/ambient_state.h"
#include "host.h"
#include "rng/rng_scope.h"
#include "segment/replay.h"
#include "segment/segment.h"
#include "torch_compat.h"

namespace reprise {

// What profilers show of a replay: a range of the name that tools for torch's own look
// for, and inside of it one that says what is replayed.
class ProfilerRanges {
 public:
  explicit ProfilerRanges(const Segment& segment) {
    if (auto callbacks = at::getStepCallbacksUnlessEmpty(kScope)) {
      recompute_.emplace(std::move(*callbacks));
      recompute_->before("recompute_fn");
      name_.emplace(kScope);
      name_->before("torch_reprise.checkpoint: " + segment.name());
    }
  }

 private:
  static constexpr auto kScope = at::RecordScope::USER_SCOPE;
  std::optional<at::RecordFunction> recompute_;
  std::optional<at::RecordFunction> name_;
};

class ReplayScope {
 public:
  // `inside_fn`: for a backward inside of fn, whose forward is still running.
  ReplayScope(Segment& segment, bool inside_fn)
      : segment_(checked(segment)),
        stash_of_forward_(inside_fn ? std::optional(segment.stash()) : std::nullopt),
        generators_(rewind(segment, inside_fn ? *stash_of_forward_ : segment.stash())),
        ambient_(segment.ambient(), inside_fn),
        state_(segment.reached()) {}
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
  // Throws CheckpointError if a replay could not be the forward again.
  static Segment& checked(Segment& segment) {
    const ReachedState& reached = segment.reached();
    for (size_t next = 0;;) {
      const auto problem = reached.first_problem(&next);
      if (problem.tensor == nullptr) {
        break;
      }
      // Another tensor may be in its place by now (parameters that are sharded and
      // gathered): then it is no matter of ours.
      const std::string where = segment.program().where_reached(problem.tensor);
      if (where.empty()) {
        continue;
      }
      throw_checkpoint_error(
          problem.lost
              ? "torch_reprise: " + segment.name() + " changed " + where +
                    " in place for the first time, so that no copy of what it was before is at "
                    "hand for the replay. It will be from the next call on. If that cannot wait, "
                    "call the function once without gradients, or without checkpointing."
          : problem.by_fn
              ? "torch_reprise: " + segment.name() + " changes " + where +
                    " in place in its forward, of which no copy is kept (as of all that requires "
                    "grad, or is no plain dense tensor). A replay would begin with the changed "
                    "value. Change it outside of the "
                    "checkpointed function; where doing it twice changes nothing (a clamp), "
                    "Checkpointer(preserve_state=False) replays with what is there."
              : "torch_reprise: " + where + " was modified by an inplace operation after " +
                    segment.name() +
                    " used it in its forward and before its replay: it was at "
                    "version " +
                    std::to_string(problem.then) + " and is at version " +
                    std::to_string(problem.now) +
                    ". A replay would compute with the new value. Change it after backward, or "
                    "give the function a copy.");
    }
    if (segment.options().ambient == AmbientPolicy::kCheck) {
      if (const std::string diff = segment.ambient()->settings_diff(); !diff.empty()) {
        throw_checkpoint_error("torch_reprise: " + segment.name() +
                               " is replayed under other settings than its forward ran under:\n" +
                               diff);
      }
    }
    return segment;
  }

  static RngScope rewind(Segment& segment, const RngStash& stash) {
    try {
      const auto& options = segment.options();
      return RngScope(stash, options.preserve_rng_state, options.check_rng);
    } catch (const OutOfReach& error) {
      throw_checkpoint_error("torch_reprise: the replay of " + segment.name() +
                             " cannot draw the random numbers of its forward again.\n  " +
                             error.what());
    }
  }

  Segment& segment_;
  // In the order in which they are put in force.
  ProfilerRanges ranges_{segment_};
  ReplayMark replaying_{segment_.holder()};
  compat::NoInferenceMode no_inference_;
  // Batched gradients (is_grads_batched) are no business of fn's, which could not draw there.
  c10::impl::ExcludeDispatchKeyGuard no_batch_{c10::DispatchKey::VmapMode};
  compat::WantedLeaves own_calls_{nullptr};   // backward calls inside of fn ask for their own
  std::optional<RngStash> stash_of_forward_;  // that is running, and will keep another one
  RngScope generators_;
  AmbientScope ambient_;
  StateScope state_;
  c10::AutoGradMode gradients_{true};
};

}  // namespace reprise
