#include "rng/rng_scope.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

#include "host.h"

namespace reprise {
namespace {

using Entry = RngStash::View;

// Does a generator of the stash not stand at `now` as it should after the replay?
// Stopped early, it may stand before that, not beyond.
bool diverges(const Entry& entry, const GeneratorMark& now, bool stopped_early) {
  if (entry.end == nullptr) {  // the forward is not over: nothing to compare with
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

RngScope::RngScope(const RngStash& stash, bool enabled, bool checked)
    : stash_(stash), enabled_(enabled) {
  if (!enabled_) {
    return;
  }
  if (stash_.empty()) {
    turns_ = Lease::turns();
    note_outer(checked && !Lease::held_by_others(Lease::Kind::kGenerator));
    return;
  }
  Lease::Keys keys;
  for (size_t i = 0; i < stash_.size(); ++i) {
    keys.push_back(stash_[i].generator.unsafeGetGeneratorImpl());
  }
  // Before they are noted: see Note [Turns].
  lease_.emplace(Lease::Kind::kGenerator, keys, [this](size_t index) {
    return "the random generator " + generator_name(stash_[index].generator);
  });
  turns_ = lease_->turn();
  note_outer(checked && !lease_->others_held());
  try {
    rewind();
  } catch (...) {
    put_back();
    throw;
  }
}

void RngScope::note_outer(bool watched) {
  // Nearly all programs on the CPU: one look, with the generator's mutex held once.
  if (watched && stash_.size() == 1) {
    const Entry entry = stash_[0];
    if (entry.state.kind() == GeneratorKind::kMt19937 &&
        entry.generator == *default_generator(c10::Device(c10::DeviceType::CPU))) {
      outer_ = RngSnapshot::glance_and_rewind_cpu(entry.state);
      rewound_.push_back({entry, 0, false});
      is_rewound_ = true;
      return;
    }
  }
  outer_ = watched ? RngSnapshot::glance() : RngSnapshot::capture(stash_.generators());
  size_t next = 0;
  for (size_t i = 0; i < stash_.size(); ++i) {
    const Entry entry = stash_[i];
    auto place = outer_.place_of(entry.generator, next);
    if (!place.has_value()) {  // an explicit one
      outer_ = RngSnapshot::glance(stash_.generators());
      place = outer_.place_of(entry.generator, next);
    }
    const bool is_resting = !entry.moved && outer_.state(*place).is_glance_at(entry.state);
    rewound_.push_back({entry, *place, is_resting});
    next = *place + 1;
  }
}

void RngScope::rewind() {
  if (is_rewound_) {
    return;
  }
  for (const auto& [entry, place, is_resting] : rewound_) {
    if (is_resting) {
      continue;
    }
    const GeneratorState& outer = outer_.state(place);
    const bool is_exact = !outer.is_glance() && !entry.state.is_glance() &&
                          outer.keeps_rnn_state() == entry.state.keeps_rnn_state();
    const bool is_there = is_exact ? entry.state == outer || entry.state.apply(entry.generator)
                                   : entry.state.set(entry.generator);
    if (!is_there && (entry.moved || entry.end == nullptr)) {
      throw OutOfReach(out_of_reach(entry.generator, entry.state));
    }
  }
}

bool RngScope::moved_by_us() const { return Lease::turns() == turns_ && host().is_alone(); }

template <typename Visit>
void RngScope::visit_others(const Visit& visit) const {
  const auto& all = outer_.entries();
  size_t next = 0;  // of those of the stash, which are in order but for newcomers
  for (size_t i = 0; i < all.size(); ++i) {
    if (next < rewound_.size() && rewound_[next].place == i) {
      ++next;
    } else if (std::none_of(rewound_.begin(), rewound_.end(),
                            [i](const Rewound& rewound) { return rewound.place == i; })) {
      visit(all[i].generator, all[i].state);
    }
  }
}

bool RngScope::is_told_already(const Rewound& rewound) const {
  for (const Rewound& before : rewound_) {
    if (&before == &rewound) {
      break;
    }
    if (share_state(before.entry.generator, rewound.entry.generator)) {
      return true;
    }
  }
  return false;
}

void RngScope::put_back_one(const Rewound& rewound, Compare compare, std::string& differs,
                            GeneratorList& unexpected) {
  const Entry& entry = rewound.entry;
  const GeneratorState& outer = outer_.state(rewound.place);
  GeneratorMark now;
  bool is_left_alone = false;
  bool differs_here = false;
  bool stands_at_begin = false;
  bool moved = false;
  bool is_in_reach = true;
  {
    HeldGenerator held(entry.generator);  // nothing else is asked meanwhile
    now = GeneratorMark::of(held);
    is_left_alone = !entry.moved && entry.end != nullptr && now.is_elsewhere(*entry.end);
    differs_here = compare != Compare::kNothing && differs.empty() && !is_left_alone &&
                   diverges(entry, now, compare == Compare::kNotBeyond);
    stands_at_begin = differs_here && entry.state.is_state_of(held);
    moved = !outer.is_state_of(held, now);
    is_in_reach = !moved || outer.apply(held);
  }
  // Left where it began: another thread may have drawn during the forward.
  if (differs_here && !(stands_at_begin && !host().is_alone()) && !is_told_already(rewound)) {
    differs = divergence(entry, now);
  }
  if (!is_in_reach) {
    throw OutOfReach(out_of_reach(entry.generator, outer));
  }
  if (moved && is_left_alone && host().is_alone()) {
    unexpected.push_back(entry.generator);
  }
}

std::string RngScope::finish(Compare compare) {
  if (!enabled_) {
    return {};
  }
  std::string differs;  // of the first that does
  GeneratorList unexpected;
  Attempts attempt;
  for (const Rewound& rewound : rewound_) {
    if (!rewound.is_resting || !outer_.state(rewound.place).is_still_of(rewound.entry.generator)) {
      attempt([&] { put_back_one(rewound, compare, differs, unexpected); });
    }
  }
  bool others_moved = false;
  visit_others([&](const at::Generator& generator, const GeneratorState& state) {
    attempt([&] {
      others_moved =
          others_moved || !(state.is_still_of(generator) || state.is_state_of(generator));
    });
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
