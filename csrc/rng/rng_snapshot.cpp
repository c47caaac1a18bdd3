#include "rng/rng_snapshot.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <c10/core/DeviceType.h>

#include <algorithm>

namespace reprise {
namespace {

InitialisedQuery& initialised_query() {
  static InitialisedQuery query;
  return query;
}

// Device types that can have generators of their own and that this torch was
// built with or was given; looked up once, for a backend cannot vanish.
// A PrivateUse1 backend may be registered late, so that one is asked each time.
const c10::SmallVector<c10::DeviceType, 4>& built_accelerators() {
  static const auto types = [] {
    c10::SmallVector<c10::DeviceType, 4> found;
    for (auto type : {c10::DeviceType::CUDA, c10::DeviceType::XPU, c10::DeviceType::MPS,
                      c10::DeviceType::MTIA, c10::DeviceType::HPU}) {
      if (at::globalContext().getAcceleratorHooksInterface(type).isBuilt()) {
        found.push_back(type);
      }
    }
    return found;
  }();
  return types;
}

bool is_initialised(c10::DeviceType type) {
  return initialised_query() ? initialised_query()(type) : accelerator_has_context(type);
}

void append_generators(c10::DeviceType type, c10::SmallVector<at::Generator, 2>& out) {
  if (!is_initialised(type)) {
    return;
  }
  const auto& hooks = at::globalContext().getAcceleratorHooksInterface(type);
  const auto count = hooks.deviceCount();
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    out.push_back(hooks.getDefaultGenerator(index));
  }
}

}  // namespace

bool accelerator_has_context(c10::DeviceType type) {
  const auto& hooks = at::globalContext().getAcceleratorHooksInterface(type);
  return hooks.deviceCount() > 0 && hooks.hasPrimaryContext(0);
}

void set_initialised_query(InitialisedQuery query) { initialised_query() = std::move(query); }

c10::SmallVector<at::Generator, 2> default_generators() {
  c10::SmallVector<at::Generator, 2> generators;
  generators.push_back(at::detail::getDefaultCPUGenerator());
  for (auto type : built_accelerators()) {
    append_generators(type, generators);
  }
  if (at::isPrivateUse1HooksRegistered()) {
    append_generators(c10::DeviceType::PrivateUse1, generators);
  }
  return generators;
}

std::string generator_name(const at::Generator& generator) {
  const auto device = generator.device();
  const std::string name = device.is_cpu() ? "cpu" : device.str();
  for (const auto& known : default_generators()) {
    if (known == generator) {
      return name;
    }
  }
  return "explicit " + name;
}

RngSnapshot RngSnapshot::capture_defaults(Generators others) {
  RngSnapshot snapshot;
  for (auto& generator : default_generators()) {
    auto state = GeneratorState::capture(generator);
    snapshot.entries_.push_back({std::move(generator), std::move(state), std::nullopt});
  }
  for (const auto& generator : others) {
    if (!snapshot.contains(generator)) {
      snapshot.entries_.push_back({generator, GeneratorState::capture(generator), std::nullopt});
    }
  }
  return snapshot;
}

RngSnapshot RngSnapshot::capture(Generators generators) {
  RngSnapshot snapshot;
  for (const auto& generator : generators) {
    if (!snapshot.contains(generator)) {
      snapshot.entries_.push_back({generator, GeneratorState::capture(generator), std::nullopt});
    }
  }
  return snapshot;
}

void RngSnapshot::add(at::Generator generator, GeneratorState state) {
  entries_.push_back({std::move(generator), std::move(state), std::nullopt});
}

bool RngSnapshot::contains(const at::Generator& generator) const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [&](const Entry& entry) { return entry.generator == generator; });
}

void RngSnapshot::keep_only_moved() {
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(),
                                [](const Entry& e) { return e.state.is_state_of(e.generator); }),
                 entries_.end());
  for (auto& entry : entries_) {
    entry.end = GeneratorMark::of(entry.generator);
  }
}

std::vector<std::string> RngSnapshot::add_newcomers(
    const c10::SmallVectorImpl<at::Generator>& known_before) {
  std::vector<std::string> unknown;
  for (auto& generator : default_generators()) {
    if (std::find(known_before.begin(), known_before.end(), generator) != known_before.end()) {
      continue;
    }
    if (GeneratorState::kind_of(generator) != GeneratorState::Kind::kPhilox) {
      unknown.push_back(generator_name(generator));
      continue;
    }
    auto state = GeneratorState::philox(generator.current_seed(), 0);
    if (!state.is_state_of(generator)) {
      auto end = GeneratorMark::of(generator);
      entries_.push_back({std::move(generator), std::move(state), end});
    }
  }
  return unknown;
}

std::string RngSnapshot::divergence(bool stopped_early) const {
  for (const auto& entry : entries_) {
    if (!entry.end.has_value()) {
      continue;  // the forward is not over: nothing to compare with
    }
    const auto now = GeneratorMark::of(entry.generator);
    if (stopped_early ? !now.is_beyond(*entry.end) : now == *entry.end) {
      continue;
    }
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
  return {};
}

std::vector<std::string> RngSnapshot::restore_moved(const RngSnapshot* expected) {
  std::vector<std::string> unexpected;
  for (auto& entry : entries_) {
    if (!entry.state.is_state_of(entry.generator)) {
      entry.state.apply(entry.generator);
      if (expected != nullptr && !expected->contains(entry.generator)) {
        unexpected.push_back(generator_name(entry.generator));
      }
    }
  }
  return unexpected;
}

void RngSnapshot::apply() {
  for (auto& entry : entries_) {
    entry.state.apply(entry.generator);
  }
}

size_t RngSnapshot::nbytes(std::unordered_set<const void*>& seen) const {
  size_t total = 0;
  for (const auto& entry : entries_) {
    if (seen.insert(entry.state.address()).second) {
      total += entry.state.nbytes();
    }
  }
  return total;
}

std::vector<std::string> RngSnapshot::names() const {
  std::vector<std::string> names;
  names.reserve(entries_.size());
  for (const auto& entry : entries_) {
    names.push_back(generator_name(entry.generator));
  }
  return names;
}

c10::SmallVector<at::Generator, 2> RngSnapshot::generators() const {
  c10::SmallVector<at::Generator, 2> generators;
  for (const auto& entry : entries_) {
    generators.push_back(entry.generator);
  }
  return generators;
}

}  // namespace reprise
