#include "rng/rng_stash.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "per_thread.h"

namespace reprise {
namespace {

// Is a stream of the device of this type that is current being captured? The streams of the
// others are not asked.
bool is_captured_here(c10::DeviceType type) {
  return is_captured(c10::impl::getDeviceGuardImpl(type)->getDevice());
}

}  // namespace

RngStash RngStash::needed_by_a_replay(const RngSnapshot& begin,
                                      const c10::SmallVectorImpl<c10::Device>& devices) {
  // What the thread's last segment shares. It is ours too if it has what we would put there:
  // its first `same` entries are, as long as `unmoved` is null.
  Shared& last = per_thread<Shared>();
  const size_t size_of_last = size_of(last);
  size_t same = 0;
  std::shared_ptr<Entries> unmoved;
  c10::intrusive_ptr<Own> own;
  size_t hint = 0;  // devices are mostly in the order of generators
  const auto is_of_the_segment = [&](const at::Generator& generator) {
    const auto device = generator.device();
    if (hint >= devices.size() || devices[hint] != device) {
      const auto* found = std::find(devices.begin(), devices.end(), device);
      if (found == devices.end()) {
        return false;
      }
      hint = found - devices.begin();
    }
    ++hint;
    return true;
  };
  const auto begin_unmoved = [&] {
    unmoved = std::make_shared<Entries>();
    if (same > 0) {
      unmoved->append(last->begin(), last->begin() + same);
    }
  };
  const auto is_next_of_last = [&](const RngSnapshot::Entry& e) {
    return !unmoved && same < size_of_last && (*last)[same].generator == e.generator;
  };
  const auto add_unmoved = [&](const at::Generator& generator, const GeneratorState& state,
                               const GeneratorMark& mark) {
    if (!unmoved) {
      begin_unmoved();
    }
    unmoved->push_back({generator, state, mark, false});
  };
  std::optional<bool> captured;
  for (const auto& e : begin.entries()) {
    if (e.state.is_still_of(e.generator)) {
      if (!e.state.is_glance() || !is_of_the_segment(e.generator)) {
        continue;
      }
      if (!captured.has_value()) {
        captured = is_captured_here(e.generator.device().type());
      }
      if (!*captured) {
        if (is_next_of_last(e) && e.state.is_glance_at((*last)[same].state)) {
          ++same;
        } else {
          const auto mark = GeneratorMark::of(e.state);
          add_unmoved(e.generator, e.state.settled(mark), mark);
        }
        continue;
      }
    }
    HeldGenerator held(e.generator);
    const auto end = GeneratorMark::of(held);
    const bool moved = !e.state.is_state_of(held, end);
    auto state = e.state.settled(end);
    if (!moved && state.kind() == GeneratorKind::kPhilox) {
      if (!is_of_the_segment(e.generator)) {
        continue;
      }
      if (is_next_of_last(e) && state == (*last)[same].state &&
          state.keeps_rnn_state() == (*last)[same].state.keeps_rnn_state()) {
        ++same;
      } else {
        add_unmoved(e.generator, state, end);
      }
    } else if (moved || state.kind() == GeneratorKind::kMt19937 || is_of_the_segment(e.generator)) {
      if (!own) {
        own = c10::make_intrusive<Own>();
      }
      own->entries.push_back({e.generator, std::move(state), end, moved});
    }
  }
  RngStash needed;
  needed.own_ = std::move(own);
  if (same > 0 || unmoved) {
    if (!unmoved && same < size_of_last) {
      begin_unmoved();
    }
    if (unmoved) {
      last = std::move(unmoved);
    }
    needed.shared_ = last;
  }
  return needed;
}

namespace {

// Does a generator stand where a new one of its device would? Then nothing was
// drawn from it yet.
bool is_fresh(const at::Generator& generator) {
  try {
    const auto device = generator.device();
    const auto& hooks = at::globalContext().getAcceleratorHooksInterface(device.type());
    return GeneratorState::capture(hooks.getNewGenerator(device.index())).is_state_of(generator);
  } catch (const c10::Error&) {
    return false;  // the backend cannot make one
  }
}

}  // namespace

std::vector<std::string> RngStash::add_newcomers(const RngSnapshot& begin) {
  std::vector<std::string> unknown;
  c10::intrusive_ptr<Own> own;
  size_t next = 0;
  visit_default_generators([&](const at::Generator& generator) {
    if (begin.place_of(generator, next++).has_value()) {
      return;
    }
    if (kind_of(generator) != GeneratorKind::kPhilox) {
      if (!is_fresh(generator)) {
        unknown.push_back(generator_name(generator));
      }
      return;
    }
    auto state = GeneratorState::philox(generator.current_seed(), 0);
    const bool moved = !state.is_state_of(generator);
    if (!own) {
      own = c10::make_intrusive<Own>();
      if (own_) {
        own->entries = own_->entries;
      }
    }
    own->entries.push_back({generator, std::move(state), GeneratorMark::of(generator), moved});
  });
  if (own) {
    own_ = std::move(own);
  }
  return unknown;
}

RngStash::Clocks RngStash::clocks() const {
  Clocks clocks;
  for (size_t i = 0; i < size_of_own(); ++i) {  // none of the shared ones moved
    const Entry& entry = own_->entries[i];
    const auto device = entry.generator.device();
    const auto* known = entry.moved ? default_generator(device) : nullptr;
    if (known == nullptr || !(*known == entry.generator)) {
      continue;
    }
    if (const auto clock = entry.state.clock()) {
      clocks.emplace_back(device, *clock);
    }
  }
  return clocks;
}

GeneratorList RngStash::generators() const {
  GeneratorList generators;
  for (size_t i = 0; i < size(); ++i) {
    generators.push_back((*this)[i].generator);
  }
  return generators;
}

std::vector<std::string> RngStash::names_of_moved() const {
  std::vector<std::string> names;
  for (size_t i = 0; i < size(); ++i) {
    if (const View entry = (*this)[i]; entry.moved) {
      names.push_back(generator_name(entry.generator));
    }
  }
  return names;
}

size_t RngStash::nbytes(std::unordered_set<const void*>& seen) const {
  size_t total = 0;
  for (size_t i = 0; i < size(); ++i) {
    const GeneratorState& state = (*this)[i].state;
    if (seen.insert(state.address()).second) {
      total += state.nbytes();
    }
  }
  return total;
}

}  // namespace reprise
