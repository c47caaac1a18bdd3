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

template <typename Visit>
void visit_generators(c10::DeviceType type, const Visit& visit) {
  if (!is_initialised(type)) {
    return;
  }
  const auto& hooks = at::globalContext().getAcceleratorHooksInterface(type);
  const auto count = hooks.deviceCount();
  for (c10::DeviceIndex index = 0; index < count; ++index) {
    visit(hooks.getDefaultGenerator(index));
  }
}

// Calls `visit` with each default generator that exists now, CPU first.
template <typename Visit>
void visit_defaults(const Visit& visit) {
  visit(at::detail::getDefaultCPUGenerator());
  for (auto type : built_accelerators()) {
    visit_generators(type, visit);
  }
  if (at::isPrivateUse1HooksRegistered()) {
    visit_generators(c10::DeviceType::PrivateUse1, visit);
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

GeneratorList default_generators() {
  GeneratorList generators;
  visit_defaults([&generators](const at::Generator& g) { generators.push_back(g); });
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

RngSnapshot::Entries& RngSnapshot::made(NewEntries& entries) {
  if (!entries) {
    entries = std::make_shared<Entries>();
  }
  return *entries;
}

const RngSnapshot::Entries& RngSnapshot::entries() const {
  static const auto& none = *new Entries;
  return entries_ ? *entries_ : none;
}

const RngSnapshot& RngSnapshot::of_defaults() {
  thread_local RngSnapshot last;
  const Entries& known = last.entries();
  size_t next = 0;
  bool same = true;
  visit_defaults([&](const at::Generator& generator) {
    same = same && next < known.size() && known[next].generator == generator &&
           known[next].state.is_still_of(generator);
    ++next;
  });
  if (!same || next != known.size()) {
    NewEntries entries;
    visit_defaults([&entries](const at::Generator& generator) { capture_one(entries, generator); });
    last = RngSnapshot(std::move(entries));
  }
  return last;
}

RngSnapshot RngSnapshot::capture_defaults(Generators others) {
  if (others.empty()) {
    return of_defaults();
  }
  auto entries = std::make_shared<Entries>(of_defaults().entries());
  for (const auto& generator : others) {
    capture_one(entries, generator);
  }
  return RngSnapshot(std::move(entries));
}

RngSnapshot RngSnapshot::capture_defaults_except(const RngSnapshot& known) {
  NewEntries entries;
  visit_defaults([&](const at::Generator& generator) {
    if (!known.contains(generator)) {
      capture_one(entries, generator);
    }
  });
  return RngSnapshot(std::move(entries));
}

RngSnapshot RngSnapshot::capture(Generators generators) {
  NewEntries entries;
  for (const auto& generator : generators) {
    capture_one(entries, generator);
  }
  return RngSnapshot(std::move(entries));
}

RngSnapshot RngSnapshot::of(std::vector<std::pair<at::Generator, GeneratorState>> states) {
  NewEntries entries;
  for (auto& [generator, state] : states) {
    made(entries).push_back({std::move(generator), std::move(state), std::nullopt, false});
  }
  return RngSnapshot(std::move(entries));
}

void RngSnapshot::capture_one(NewEntries& entries, const at::Generator& generator) {
  Entries& all = made(entries);
  if (!contains(all, generator)) {
    all.push_back({generator, GeneratorState::capture(generator), std::nullopt, false});
  }
}

bool RngSnapshot::contains(const Entries& entries, const at::Generator& generator) {
  return std::any_of(entries.begin(), entries.end(),
                     [&](const Entry& entry) { return entry.generator == generator; });
}

bool RngSnapshot::contains(const at::Generator& generator) const {
  return contains(entries(), generator);
}

RngSnapshot RngSnapshot::needed_by_a_replay(
    const c10::SmallVectorImpl<c10::Device>& devices) const {
  NewEntries needed;
  for (const auto& e : entries()) {
    if (e.state.is_untouched_since(e.generator)) {
      continue;
    }
    // One look at a CUDA generator asks the driver twice: not more of them than needed.
    const auto end = GeneratorMark::of(e.generator);
    const bool moved = !e.state.is_state_of(e.generator, end);
    if (moved || e.state.kind() == GeneratorState::Kind::kMt19937 ||
        std::find(devices.begin(), devices.end(), e.generator.device()) != devices.end()) {
      made(needed).push_back({e.generator, e.state, end, moved});
    }
  }
  return RngSnapshot(std::move(needed));
}

std::vector<std::string> RngSnapshot::names_of_moved() const {
  std::vector<std::string> names;
  for (const auto& entry : entries()) {
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
  NewEntries newcomers;
  visit_defaults([&](const at::Generator& generator) {
    if (before.contains(generator)) {
      return;
    }
    if (GeneratorState::kind_of(generator) != GeneratorState::Kind::kPhilox) {
      if (!is_fresh(generator)) {
        unknown.push_back(generator_name(generator));
      }
      return;
    }
    auto state = GeneratorState::philox(generator.current_seed(), 0);
    if (!state.is_state_of(generator)) {
      made(newcomers).push_back({generator, std::move(state), GeneratorMark::of(generator), true});
    }
  });
  if (newcomers) {
    auto all = std::make_shared<Entries>(entries());
    all->append(newcomers->begin(), newcomers->end());
    *this = RngSnapshot(std::move(all));
  }
  return unknown;
}

RngSnapshot::Marks RngSnapshot::marks() const {
  Marks marks;
  for (const auto& entry : entries()) {
    marks.push_back(GeneratorMark::of(entry.generator));
  }
  return marks;
}

std::string RngSnapshot::divergence(bool stopped_early, const Indices& left_alone,
                                    const Marks& marks) const {
  for (size_t i = 0; i < size(); ++i) {
    const Entry& entry = entries()[i];
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
  return std::any_of(entries().begin(), entries().end(),
                     [](const Entry& e) { return !e.state.is_state_of(e.generator); });
}

RngSnapshot::States RngSnapshot::states() const {
  States states;
  for (const auto& entry : entries()) {
    states.push_back(GeneratorState::capture(entry.generator));
  }
  return states;
}

bool RngSnapshot::put_back_one(const at::Generator& generator, const GeneratorState& state,
                               const GeneratorMark* mark) {
  if (mark != nullptr ? state.is_state_of(generator, *mark) : state.is_state_of(generator)) {
    return false;
  }
  if (!state.apply(generator)) {
    throw OutOfReach(out_of_reach(generator, state));
  }
  return true;
}

namespace {

// Calls `visit` with 0 to `n` - 1, all of them; then throws the last error.
template <typename Visit>
void visit_all(size_t n, const Visit& visit) {
  std::exception_ptr error;
  for (size_t i = 0; i < n; ++i) {
    try {
      visit(i);
    } catch (...) {
      error = std::current_exception();
    }
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

}  // namespace

GeneratorList RngSnapshot::restore_moved() const {
  GeneratorList moved;
  visit_all(size(), [&](size_t i) {
    if (put_back_one(generator(i), state(i), nullptr)) {
      moved.push_back(generator(i));
    }
  });
  return moved;
}

void RngSnapshot::put_back(const States& states, const Marks* marks) const {
  visit_all(states.size(), [&](size_t i) {
    put_back_one(generator(i), states[i], marks != nullptr ? &(*marks)[i] : nullptr);
  });
}

RngSnapshot::Indices RngSnapshot::apply(const States& now) const {
  Indices left_alone;
  for (size_t i = 0; i < size(); ++i) {
    const Entry& entry = entries()[i];
    if (entry.state == now[i] || entry.state.apply(entry.generator)) {
      continue;
    }
    if (entry.moved || !entry.end.has_value()) {
      throw OutOfReach(out_of_reach(entry.generator, entry.state));
    }
    left_alone.push_back(i);
  }
  return left_alone;
}

std::string RngSnapshot::out_of_reach(const at::Generator& generator, const GeneratorState& state) {
  return c10::str(
      "generator ", generator_name(generator), " cannot be put back to where it stood\n",
      "    then: ", state.describe(), "\n    now:  ", GeneratorState::capture(generator).describe(),
      "\n  While a stream is captured, offsets count from where the generator will stand when the "
      "graph is launched, which is not known yet. So a state of one capture means nothing in "
      "another, or outside of one. Put forward and backward into one capture (one "
      "torch.cuda.graph block), or leave both outside of any; if other random numbers will do, "
      "pass preserve_rng_state=False.");
}

size_t RngSnapshot::nbytes(std::unordered_set<const void*>& seen) const {
  size_t total = 0;
  for (const auto& entry : entries()) {
    if (seen.insert(entry.state.address()).second) {
      total += entry.state.nbytes();
    }
  }
  return total;
}

std::vector<std::string> RngSnapshot::names() const {
  std::vector<std::string> names;
  names.reserve(size());
  for (const auto& entry : entries()) {
    names.push_back(generator_name(entry.generator));
  }
  return names;
}

GeneratorList RngSnapshot::generators() const {
  GeneratorList generators;
  for (const auto& entry : entries()) {
    generators.push_back(entry.generator);
  }
  return generators;
}

}  // namespace reprise
