#include "rng/rng_snapshot.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <c10/core/DeviceType.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>

#include "per_thread.h"
#include "rng/stream_capture.h"
#include "torch_compat.h"

namespace reprise {
namespace {

std::atomic<InitialisedQuery> g_initialised_query{nullptr};

// Once yes, always yes in this process, so that a segment pays one load.
std::array<std::atomic<bool>, c10::COMPILE_TIME_MAX_DEVICE_TYPES> g_initialised{};

// torch refuses a device in the child of a process that has initialised it.
[[maybe_unused]] const int g_forgets_in_children = pthread_atfork(nullptr, nullptr, [] {
  for (auto& yes : g_initialised) {
    yes.store(false, std::memory_order_relaxed);
  }
});

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

bool has_context(c10::DeviceType type) {
  const auto& hooks = at::globalContext().getAcceleratorHooksInterface(type);
  for (c10::DeviceIndex index = 0, n = hooks.deviceCount(); index < n; ++index) {
    if (hooks.hasPrimaryContext(index)) {
      return true;
    }
  }
  return false;
}

// Of these torch's core has a flag, and their Python module another.
bool is_lazy(c10::DeviceType type) {
  using c10::DeviceType;
  return type == DeviceType::CUDA || type == DeviceType::XPU || type == DeviceType::MTIA;
}

bool asked_if_initialised(c10::DeviceType type) {
  const auto query = g_initialised_query.load(std::memory_order_relaxed);
  return query != nullptr && is_lazy(type) ? query(type) : has_context(type);
}

bool is_initialised(c10::DeviceType type) {
  auto& yes = g_initialised[static_cast<size_t>(type)];
  if (yes.load(std::memory_order_relaxed)) {
    return true;
  }
  // A program on the CPU with a CUDA build of torch asks several times per segment.
  if (is_lazy(type) && !compat::is_initialised_in_core(type)) {
    return false;
  }
  const bool now = asked_if_initialised(type);
  if (now) {
    yes.store(true, std::memory_order_relaxed);
  }
  return now;
}

// Calls `visit` with the default generators of an initialised type.
template <typename Visit>
void visit_generators(c10::DeviceType type, const Visit& visit) {
  const auto& hooks = at::globalContext().getAcceleratorHooksInterface(type);
  for (c10::DeviceIndex index = 0, n = hooks.deviceCount(); index < n; ++index) {
    visit(hooks.getDefaultGenerator(index));
  }
}

// The same, but torch makes them once and keeps them, so that they are asked for
// once; what a PrivateUse1 backend does is not known.
const GeneratorList& generators_of(c10::DeviceType type) {
  static std::array<std::atomic<const GeneratorList*>, c10::COMPILE_TIME_MAX_DEVICE_TYPES> known{};
  auto& slot = known[static_cast<size_t>(type)];
  if (const auto* list = slot.load(std::memory_order_acquire)) {
    return *list;
  }
  auto list = std::make_unique<GeneratorList>();
  visit_generators(type, [&list](const at::Generator& generator) { list->push_back(generator); });
  const GeneratorList* made = nullptr;
  if (slot.compare_exchange_strong(made, list.get(), std::memory_order_acq_rel)) {
    made = list.release();  // never freed: generators live as long as the process
  }
  return *made;
}

// Calls `visit` with each default generator that exists now, CPU first.
template <typename Visit>
void visit_defaults(const Visit& visit) {
  visit(at::detail::getDefaultCPUGenerator());
  for (auto type : built_accelerators()) {
    if (is_initialised(type)) {
      for (const auto& generator : generators_of(type)) {
        visit(generator);
      }
    }
  }
  constexpr auto kOther = c10::DeviceType::PrivateUse1;
  if (at::isPrivateUse1HooksRegistered() && is_initialised(kOther)) {
    visit_generators(kOther, visit);
  }
}

}  // namespace

void set_initialised_query(InitialisedQuery query) { g_initialised_query.store(query); }

std::optional<c10::Device> current_accelerator_device() {
  for (auto type : built_accelerators()) {
    const auto* guard = guard_of(type);
    if (guard != nullptr && is_initialised(type)) {
      return guard->getDevice();
    }
  }
  return std::nullopt;
}

const at::Generator* default_generator(c10::Device device) {
  if (device.is_cpu()) {
    return &at::detail::getDefaultCPUGenerator();
  }
  if (!device.is_cuda() || !is_initialised(device.type())) {
    return nullptr;
  }
  const GeneratorList& all = generators_of(device.type());
  const auto index = static_cast<size_t>(device.index());
  return index < all.size() ? &all[index] : nullptr;
}

GeneratorList default_generators() {
  GeneratorList generators;
  visit_defaults([&generators](const at::Generator& g) { generators.push_back(g); });
  return generators;
}

void visit_default_generators(c10::function_ref<void(const at::Generator&)> visit) {
  visit_defaults(visit);
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

const RngSnapshot::Entries& RngSnapshot::none() {
  static const auto& none = *new Entries;
  return none;
}

const RngSnapshot& RngSnapshot::of_defaults(const GeneratorState* rewind_cpu_to) {
  RngSnapshot& last = per_thread<RngSnapshot>();
  // Nobody has it but us, which is so where each segment draws: its memory is used again.
  // The fence: whoever had it, on whatever thread, has read it.
  bool own = last.entries_.use_count() == 1;
  std::atomic_thread_fence(std::memory_order_acquire);
  size_t next = 0;
  bool is_rewound = false;
  const auto rewind_cpu = [&](HeldGenerator& cpu) {
    if (!(last.entries()[0].state == *rewind_cpu_to)) {
      rewind_cpu_to->apply(cpu);
      is_rewound = true;
    }
  };
  const auto look_at = [&](const at::Generator& generator) {
    const size_t i = next++;
    const Entries& known = last.entries();
    const bool is_known = i < known.size() && known[i].generator == generator;
    const bool rewinds = i == 0 && rewind_cpu_to != nullptr;
    const auto is_still_there = [&] { return is_known && known[i].state.is_still_of(generator); };
    if (!rewinds && is_still_there()) {
      return;
    }
    HeldGenerator held(generator);
    const bool is_same = rewinds && is_still_there();
    if (is_known && (own || is_same)) {
      if (!is_same) {
        (*last.entries_)[i].state.look_again(held);
      }
    } else {
      auto state = GeneratorState::glance(held);
      if (!is_known || !state.is_same_glance(known[i].state)) {
        if (!own) {
          last = RngSnapshot(std::make_shared<Entries>(known));
          own = true;
        }
        Entries& entries = *last.entries_;
        if (is_known) {
          entries[i].state = std::move(state);
        } else {  // they have become more, or others, which is rare
          entries.resize(i);
          entries.push_back({generator, std::move(state)});
        }
      }
    }
    if (rewinds) {
      rewind_cpu(held);
    }
  };
  try {
    visit_defaults(look_at);
    if (next < last.size()) {  // some are not there any more
      last = RngSnapshot(std::make_shared<Entries>(last.entries()));
      last.entries_->resize(next);
    }
  } catch (...) {
    if (is_rewound) {
      put_back(last.generator(0), last.state(0));
    }
    throw;
  }
  return last;
}

RngSnapshot RngSnapshot::glance(Generators others) {
  const RngSnapshot& defaults = of_defaults(nullptr);
  if (others.empty()) {
    return defaults;
  }
  auto entries = std::make_shared<Entries>(defaults.entries());
  for (const auto& generator : others) {
    capture_one(entries, generator);
  }
  return RngSnapshot(std::move(entries));
}

RngSnapshot RngSnapshot::glance_and_rewind_cpu(const GeneratorState& to) {
  return of_defaults(&to);
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
    made(entries).push_back({std::move(generator), std::move(state)});
  }
  return RngSnapshot(std::move(entries));
}

void RngSnapshot::capture_one(NewEntries& entries, const at::Generator& generator) {
  Entries& all = made(entries);
  const bool is_there = std::any_of(
      all.begin(), all.end(), [&](const Entry& entry) { return entry.generator == generator; });
  if (!is_there) {
    all.push_back({generator, GeneratorState::capture(generator)});
  }
}

std::optional<size_t> RngSnapshot::place_of(const at::Generator& generator) const {
  const Entries& all = entries();
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].generator == generator) {
      return i;
    }
  }
  return std::nullopt;
}

GeneratorList RngSnapshot::restore_moved() const {
  GeneratorList moved;
  Attempts attempt;
  for (const auto& entry : entries()) {
    attempt([&] {
      if (put_back(entry.generator, entry.state, /*new_to_rnns=*/true)) {
        moved.push_back(entry.generator);
      }
    });
  }
  attempt.rethrow();
  return moved;
}

bool put_back(const at::Generator& generator, const GeneratorState& state, bool new_to_rnns) {
  {
    HeldGenerator held(generator);
    if (state.is_state_of(held)) {
      return false;
    }
    if (state.apply(held, new_to_rnns)) {
      return true;
    }
  }
  throw OutOfReach(out_of_reach(generator, state));
}

std::string out_of_reach(const at::Generator& generator, const GeneratorState& state) {
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
