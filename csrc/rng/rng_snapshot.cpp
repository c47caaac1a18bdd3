#include "rng/rng_snapshot.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <c10/core/DeviceType.h>

#include <algorithm>
#include <exception>

#include "host.h"

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
  for (c10::DeviceIndex index = 0, n = hooks.deviceCount(); index < n; ++index) {
    if (hooks.hasPrimaryContext(index)) {
      return true;
    }
  }
  return false;
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
  auto generators = default_generators();
  generators.append(others.begin(), others.end());
  return capture(generators);
}

RngSnapshot RngSnapshot::capture_defaults_except(const RngSnapshot& known) {
  auto generators = default_generators();
  generators.erase(std::remove_if(generators.begin(), generators.end(),
                                  [&known](const auto& g) { return known.contains(g); }),
                   generators.end());
  return capture(generators);
}

RngSnapshot RngSnapshot::capture(Generators generators) {
  RngSnapshot snapshot;
  for (const auto& generator : generators) {
    if (!snapshot.contains(generator)) {
      snapshot.add(generator, GeneratorState::capture(generator));
    }
  }
  return snapshot;
}

void RngSnapshot::add(at::Generator generator, GeneratorState state) {
  entries_.push_back({std::move(generator), std::move(state), std::nullopt, false});
}

bool RngSnapshot::contains(const at::Generator& generator) const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [&](const Entry& entry) { return entry.generator == generator; });
}

RngSnapshot RngSnapshot::needed_by_a_replay(
    const c10::SmallVectorImpl<c10::Device>& devices) const {
  RngSnapshot needed;
  for (const auto& e : entries_) {
    if (e.state.is_untouched_since(e.generator)) {
      continue;
    }
    // One look at a CUDA generator asks the driver twice: not more of them than needed.
    const auto end = GeneratorMark::of(e.generator);
    const bool moved = !e.state.is_state_of(e.generator, end);
    if (moved || e.state.kind() == GeneratorState::Kind::kMt19937 ||
        std::find(devices.begin(), devices.end(), e.generator.device()) != devices.end()) {
      needed.entries_.push_back({e.generator, e.state, end, moved});
    }
  }
  return needed;
}

std::vector<std::string> RngSnapshot::names_of_moved() const {
  std::vector<std::string> names;
  for (const auto& entry : entries_) {
    if (entry.moved) {
      names.push_back(generator_name(entry.generator));
    }
  }
  return names;
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

std::vector<std::string> RngSnapshot::add_newcomers(const RngSnapshot& before) {
  std::vector<std::string> unknown;
  for (auto& generator : default_generators()) {
    if (before.contains(generator)) {
      continue;
    }
    if (GeneratorState::kind_of(generator) != GeneratorState::Kind::kPhilox) {
      if (!is_fresh(generator)) {
        unknown.push_back(generator_name(generator));
      }
      continue;
    }
    auto state = GeneratorState::philox(generator.current_seed(), 0);
    if (!state.is_state_of(generator)) {
      auto end = GeneratorMark::of(generator);
      entries_.push_back({std::move(generator), std::move(state), end, true});
    }
  }
  return unknown;
}

RngSnapshot::Marks RngSnapshot::marks() const {
  Marks marks;
  for (const auto& entry : entries_) {
    marks.push_back(GeneratorMark::of(entry.generator));
  }
  return marks;
}

std::string RngSnapshot::divergence(bool stopped_early, const Indices& left_alone,
                                    const Marks& marks) const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (!entry.end.has_value() ||  // the forward is not over: nothing to compare with
        std::find(left_alone.begin(), left_alone.end(), i) != left_alone.end()) {
      continue;
    }
    const GeneratorMark& now = marks[i];
    // A forward that sets its generator may be anywhere when it is stopped.
    if (stopped_early ? !entry.end->only_drawn_since(entry.state) || !now.is_beyond(*entry.end)
                      : now == *entry.end) {
      continue;
    }
    // Left where it began: another thread may have drawn during the forward.
    if (entry.state.is_state_of(entry.generator) && !host().is_alone()) {
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

bool RngSnapshot::any_moved() const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [](const Entry& e) { return !e.state.is_state_of(e.generator); });
}

c10::SmallVector<at::Generator, 2> RngSnapshot::restore_moved(const Marks* marks) {
  c10::SmallVector<at::Generator, 2> moved;
  std::exception_ptr error;
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    try {
      if (marks != nullptr ? !entry.state.is_state_of(entry.generator, (*marks)[i])
                           : !entry.state.is_state_of(entry.generator)) {
        if (!entry.state.apply(entry.generator)) {
          throw OutOfReach(out_of_reach(entry));
        }
        moved.push_back(entry.generator);
      }
    } catch (...) {
      error = std::current_exception();
    }
  }
  if (error) {
    std::rethrow_exception(error);
  }
  return moved;
}

RngSnapshot::Indices RngSnapshot::apply(const RngSnapshot& now) {
  Indices left_alone;
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (entry.state == now.entries_[i].state || entry.state.apply(entry.generator)) {
      continue;
    }
    if (entry.moved || !entry.end.has_value()) {
      throw OutOfReach(out_of_reach(entry));
    }
    left_alone.push_back(i);
  }
  return left_alone;
}

std::string RngSnapshot::out_of_reach(const Entry& entry) {
  return c10::str(
      "generator ", generator_name(entry.generator), " cannot be put back to where it stood\n",
      "    then: ", entry.state.describe(),
      "\n    now:  ", GeneratorState::capture(entry.generator).describe(),
      "\n  While a stream is captured, offsets count from where the generator will stand when the "
      "graph is launched, which is not known yet. So a state of one capture means nothing in "
      "another, or outside of one. Put forward and backward into one capture (one "
      "torch.cuda.graph block), or leave both outside of any; if other random numbers will do, "
      "pass preserve_rng_state=False.");
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
