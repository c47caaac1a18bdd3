#include "rng/rng_scope.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

#include "host.h"

namespace reprise {
namespace {

using Entry = RngSnapshot::Entry;

// Does a generator of the stash not stand at `now` as it should after the replay?
// Stopped early, it may stand before that, not beyond.
bool diverges(const Entry& entry, const GeneratorMark& now, bool stopped_early) {
  if (!entry.end.has_value()) {  // the forward is not over: nothing to compare with
    return false;
  }
  // A forward that sets its generator may be anywhere when it is stopped.
  return stopped_early ? entry.end->only_drawn_since(entry.state) && now.is_beyond(*entry.end)
                       : !(now == *entry.end);
}

std::string divergence(const Entry& entry, const GeneratorMark& now) {
  std::string text = c10::str("generator ", generator_name(entry.generator),
                              "\n    began at:      ", entry.state.describe(),
                              "\n    forward ended: ", entry.end->describe(),
                              "\n    replay ended:  ", now.describe());
  const auto expected = entry.state.draws_until(*entry.end);
  const auto found = entry.state.draws_until(now);
  if (expected.has_value() && found.has_value()) {
    text += c10::str("\n    that is ", *expected, " numbers in the forward and ", *found,
                     " in the replay");
  }
  return text;
}

}  // namespace

RngScope::RngScope(RngSnapshot stash, bool enabled, bool checked)
    : stash_(std::move(stash)), enabled_(enabled) {
  if (!enabled_) {
    return;
  }
  if (stash_.empty()) {
    turns_ = Lease::turns();
    if (checked && !Lease::held_by_others(Lease::Kind::kGenerator)) {
      all_ = RngSnapshot::capture_defaults();
    }
    return;
  }
  Lease::Keys keys;
  for (const Entry& entry : stash_.entries()) {
    keys.push_back(entry.generator.unsafeGetGeneratorImpl());
  }
  // Before they are noted: see Note [Turns].
  lease_.emplace(Lease::Kind::kGenerator, keys, [this](size_t index) {
    return "the random generator " + generator_name(stash_.generator(index));
  });
  turns_ = lease_->turn();
  if (checked && !lease_->others_held()) {
    note_others();
  }
  try {
    rewind();
  } catch (...) {
    put_back();
    throw;
  }
}

void RngScope::note_others() {
  visit_default_generators([this](const at::Generator& generator) {
    if (!stash_.contains(generator)) {
      others_.emplace_back(generator, GeneratorState::capture(generator));
    }
  });
}

void RngScope::rewind() {
  const auto& stash = stash_.entries();
  outer_.reserve(stash.size());
  for (const Entry& entry : stash) {
    outer_.push_back(GeneratorState::capture(entry.generator));
  }
  for (size_t i = 0; i < stash.size(); ++i) {
    const Entry& entry = stash[i];
    if (entry.state == outer_[i] || entry.state.apply(entry.generator)) {
      continue;
    }
    if (entry.moved || !entry.end.has_value()) {
      throw OutOfReach(out_of_reach(entry.generator, entry.state));
    }
    left_alone_.push_back(i);
  }
}

bool RngScope::is_left_alone(size_t index) const {
  return std::find(left_alone_.begin(), left_alone_.end(), index) != left_alone_.end();
}

bool RngScope::moved_by_us() const { return Lease::turns() == turns_ && host().is_alone(); }

template <typename Visit>
void RngScope::visit_others(const Visit& visit) const {
  for (const auto& [generator, state] : others_) {
    visit(generator, state);
  }
  for (const Entry& entry : all_.entries()) {
    visit(entry.generator, entry.state);
  }
}

bool RngScope::put_back_one(size_t index, Compare compare, std::string& differs) {
  const Entry& entry = stash_.entries()[index];
  const bool is_compared = compare != Compare::kNothing && differs.empty() && !is_left_alone(index);
  GeneratorMark now;
  bool differs_here = false;
  bool stands_at_begin = false;
  bool moved = false;
  bool is_in_reach = true;
  {
    HeldGenerator held(entry.generator);  // nothing else is asked meanwhile
    now = GeneratorMark::of(held);
    differs_here = is_compared && diverges(entry, now, compare == Compare::kNotBeyond);
    stands_at_begin = differs_here && entry.state.is_state_of(held);
    moved = !outer_[index].is_state_of(held, now);
    is_in_reach = !moved || outer_[index].apply(held);
  }
  // Left where it began: another thread may have drawn during the forward.
  if (differs_here && !(stands_at_begin && !host().is_alone())) {
    differs = divergence(entry, now);
  }
  if (!is_in_reach) {
    throw OutOfReach(out_of_reach(entry.generator, outer_[index]));
  }
  return moved;
}

std::string RngScope::finish(Compare compare) {
  if (!enabled_) {
    return {};
  }
  std::string differs;  // of the first that does
  GeneratorList unexpected;
  Attempts attempt;
  for (size_t i = 0; i < outer_.size(); ++i) {
    attempt([&] {
      if (put_back_one(i, compare, differs) && is_left_alone(i) && host().is_alone()) {
        unexpected.push_back(stash_.generator(i));
      }
    });
  }
  bool others_moved = false;
  visit_others([&](const at::Generator& generator, const GeneratorState& state) {
    attempt([&] { others_moved = others_moved || !state.is_state_of(generator); });
  });
  if (others_moved && moved_by_us()) {
    visit_others([&](const at::Generator& generator, const GeneratorState& state) {
      attempt([&] {
        if (reprise::put_back(generator, state)) {
          unexpected.push_back(generator);
        }
      });
    });
  }
  attempt.rethrow();
  enabled_ = false;
  lease_.reset();
  for (const auto& generator : unexpected) {
    differs += (differs.empty() ? "generator " : "\n  generator ") + generator_name(generator) +
               "\n    the forward did not draw from it, the replay did";
  }
  return differs;
}

void RngScope::put_back() noexcept {
  if (!enabled_) {
    return;
  }
  try {
    finish(Compare::kNothing);
  } catch (...) {  // NOLINT: an error is on its way already, and tells more than this one
  }
  enabled_ = false;
}

}  // namespace reprise
