// Generator states of the three kinds, without a device: a philox generator and
// an opaque one that exist only here stand in for the backends'.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_set>

#include "check.h"
#include "rng/generator_state.h"
#include "rng/rng_scope.h"
#include "rng/rng_snapshot.h"
#include "rng/rng_stash.h"
#include "test_host.h"
#include "torch_compat.h"

using reprise::GeneratorState;
using reprise::RngStash;

namespace {

// Both count what a device generator would count; neither draws anything.
class CountingGenerator : public c10::GeneratorImpl {
 public:
  CountingGenerator(c10::DeviceType type, c10::DispatchKey key)
      : GeneratorImpl(c10::Device(type, 0), c10::DispatchKeySet(key)) {}
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    offset_ = 0;
    ++seeds_set;
  }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_; }
  void set_state(const c10::TensorImpl&) override {
    throw std::logic_error("no tensors for philox");
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    throw std::logic_error("no tensors for philox");
  }
  int seeds_set = 0;

 protected:
  CountingGenerator* clone_impl() const override { return nullptr; }
  uint64_t seed_ = 7;
  uint64_t offset_ = 0;
};

class OpaqueGenerator final : public CountingGenerator {
 public:
  OpaqueGenerator()
      : CountingGenerator(c10::DeviceType::PrivateUse1, c10::DispatchKey::PrivateUse1) {}
  uint64_t get_offset() const override { throw std::logic_error("this backend has no offset"); }
  void set_state(const c10::TensorImpl& state) override {
    offset_ = static_cast<const uint8_t*>(state.data())[0];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    if (broken) {
      throw std::runtime_error("the device is lost");
    }
    auto state = at::full({3}, static_cast<int64_t>(offset_), at::kByte);
    return state.getIntrusivePtr();
  }

  static inline bool broken = false;
};

// Devices of a type that has captures, and no CUDA to tell which one is which.
struct CapturingGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::XPU; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {type(), 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, stream);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(getDevice()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool isStreamCapturing(const c10::Stream&) const override {
    ++asked;
    return captured;
  }

  static inline c10::StreamId stream = 0;
  static inline bool captured = false;
  static inline int asked = 0;
};
C10_REGISTER_GUARD_IMPL(XPU, CapturingGuard)

const c10::SmallVector<c10::Device, 2> kNoDevices;

template <typename Impl, typename... Args>
at::Generator make(Args... args) {
  return at::Generator(c10::make_intrusive<Impl>(args...));
}

}  // namespace

TEST(the_cpu_state_comes_back_whole) {
  auto generator = at::detail::createCPUGenerator(3);
  at::randn({3}, generator, at::kDouble);  // an odd number: one normal sample is cached
  const auto captured = GeneratorState::capture(generator);
  EXPECT(captured.kind() == GeneratorState::Kind::kMt19937);
  const auto tensor = generator.get_state();
  const auto expected = at::randn({1001}, generator, at::kDouble);
  EXPECT(!captured.is_state_of(generator));
  captured.apply(generator);
  EXPECT(captured.is_state_of(generator));
  EXPECT(at::equal(generator.get_state(), tensor));
  EXPECT(at::equal(at::randn({1001}, generator, at::kDouble), expected));
}

TEST(a_whole_turn_of_the_engine_is_a_move) {
  auto generator = at::detail::createCPUGenerator(3);
  auto* cpu = generator.get<at::CPUGeneratorImpl>();
  cpu->random();
  const auto captured = GeneratorState::capture(generator);
  for (int i = 0; i < 624; ++i) {
    cpu->random();
  }
  EXPECT(!captured.is_state_of(generator));  // left and next are the same again
}

TEST(unmoved_states_share_their_memory) {
  auto generator = at::detail::createCPUGenerator(3);
  const auto first = GeneratorState::capture(generator);
  const auto second = GeneratorState::capture(generator);
  EXPECT(first.address() == second.address());
  generator.get<at::CPUGeneratorImpl>()->random();
  const auto third = GeneratorState::capture(generator);
  EXPECT(third.address() != first.address());
  EXPECT(first == second);
  EXPECT(!(first == third));
}

TEST(philox_is_seed_and_offset) {
  auto generator = make<CountingGenerator>(c10::DeviceType::CUDA, c10::DispatchKey::CUDA);
  auto* impl = generator.get<CountingGenerator>();
  impl->set_current_seed(11);
  impl->set_offset(16);
  const auto captured = GeneratorState::capture(generator);
  EXPECT(captured.kind() == GeneratorState::Kind::kPhilox);
  EXPECT_EQ(captured.nbytes(), 16u);
  EXPECT_EQ(captured.describe(), std::string("philox seed 11, offset 16"));
  impl->set_offset(64);
  EXPECT(!captured.is_state_of(generator));
  const int seeds_set = impl->seeds_set;
  captured.apply(generator);
  EXPECT_EQ(impl->get_offset(), 16u);
  EXPECT_EQ(impl->seeds_set, seeds_set);  // the seed is the same: not allowed in a stream capture
  impl->set_current_seed(12);
  captured.apply(generator);
  EXPECT_EQ(impl->current_seed(), 11u);
  EXPECT_EQ(impl->get_offset(), 16u);
}

TEST(default_streams_are_not_asked_whether_they_are_captured) {
  auto generator = make<CountingGenerator>(c10::DeviceType::XPU, c10::DispatchKey::XPU);
  const auto captured = GeneratorState::capture(generator);
  EXPECT(captured.is_state_of(generator) && captured.apply(generator));
  EXPECT_EQ(CapturingGuard::asked, 0);
  CapturingGuard::stream = 1;
  EXPECT(captured.is_state_of(generator));
  EXPECT_EQ(CapturingGuard::asked, 1);
  CapturingGuard::stream = 0;
}

TEST(a_capture_that_cannot_be_told_from_another_is_an_error) {
  auto generator = make<CountingGenerator>(c10::DeviceType::XPU, c10::DispatchKey::XPU);
  CapturingGuard::stream = 1;
  CapturingGuard::captured = true;
  std::string message;
  try {
    GeneratorState::capture(generator);
  } catch (const c10::Error& error) {
    message = error.what();
  }
  CapturingGuard::captured = false;
  CapturingGuard::stream = 0;
  EXPECT(message.find("a stream of xpu:0 is being captured") != std::string::npos);
  EXPECT(message.find("pass preserve_rng_state=False") != std::string::npos);
}

TEST(an_unknown_backend_is_opaque) {
  auto generator = make<OpaqueGenerator>();
  generator.set_offset(5);
  const auto captured = GeneratorState::capture(generator);
  EXPECT(captured.kind() == GeneratorState::Kind::kOpaque);
  EXPECT_EQ(captured.nbytes(), 3u);
  generator.set_offset(6);
  EXPECT(!captured.is_state_of(generator));
  captured.apply(generator);
  EXPECT(captured.is_state_of(generator));
}

TEST(a_scope_rewinds_and_puts_back) {
  TestHost::install();
  at::manual_seed(1);
  const auto begin = reprise::RngSnapshot::glance();
  const auto drawn = at::rand({5});
  const auto stash = RngStash::needed_by_a_replay(begin, kNoDevices);
  EXPECT_EQ(stash.size(), 1u);
  EXPECT(stash.names_of_moved() == std::vector<std::string>{"cpu"});
  const auto after = at::globalContext().defaultGenerator(at::kCPU).get_state();
  {
    const reprise::RngScope scope(stash, true);
    EXPECT(at::equal(at::rand({5}), drawn));
    at::rand({3});
  }
  EXPECT(at::equal(at::globalContext().defaultGenerator(at::kCPU).get_state(), after));
}

TEST(a_scope_with_nothing_to_rewind_still_puts_back) {
  TestHost::install();
  at::manual_seed(1);
  const auto begin = reprise::RngSnapshot::glance();
  const auto stash = RngStash::needed_by_a_replay(begin, kNoDevices);
  EXPECT(stash.empty());
  const auto before = at::globalContext().defaultGenerator(at::kCPU).get_state();
  {
    const reprise::RngScope scope(stash, true);
    at::rand({3});  // the forward drew nothing; the replay must not move the program
  }
  EXPECT(at::equal(at::globalContext().defaultGenerator(at::kCPU).get_state(), before));
  std::unordered_set<const void*> seen;
  EXPECT_EQ(stash.nbytes(seen), 0u);
}

TEST(an_error_of_one_generator_keeps_no_other_from_being_put_back) {
  TestHost::install();
  auto cpu = at::globalContext().defaultGenerator(at::kCPU);
  for (const bool compared : {true, false}) {
    at::manual_seed(1);
    const RngStash stash(reprise::RngSnapshot::capture({make<OpaqueGenerator>(), cpu}));
    at::rand({3});
    const auto after = cpu.get_state();
    bool failed = false;
    {
      reprise::RngScope scope(stash, true);
      at::rand({5});
      OpaqueGenerator::broken = true;
      try {
        if (compared) {
          scope.put_back_and_compare(false);
        }
      } catch (const std::runtime_error&) {
        failed = true;
        EXPECT(at::equal(cpu.get_state(), after));
      }
    }
    OpaqueGenerator::broken = false;
    EXPECT_EQ(failed, compared);
    EXPECT(at::equal(cpu.get_state(), after));
  }
}

TEST(a_generator_that_was_drawn_from_and_put_back_is_kept) {
  at::manual_seed(1);
  const auto begin = reprise::RngSnapshot::glance();
  auto generator = at::globalContext().defaultGenerator(at::kCPU);
  const auto tensor = generator.get_state();
  at::rand({3});
  generator.set_state(tensor);
  const auto stash = RngStash::needed_by_a_replay(begin, kNoDevices);
  EXPECT_EQ(stash.size(), 1u);
  EXPECT(stash.names_of_moved().empty());
}

// torch does not initialise the padding of an engine that it seeds: it has what was on the
// stack there, which may be the same twice.
TEST(what_a_seed_leaves_in_the_padding_is_no_mark) {
  auto generator = at::globalContext().defaultGenerator(at::kCPU);
  const auto seed = [&generator] {
    generator.set_current_seed(6);
    auto& data = reprise::compat::mt19937_data(*generator.get<at::CPUGeneratorImpl>());
    std::memcpy(reinterpret_cast<char*>(&data) + offsetof(at::mt19937_data_pod, seeded_) + 1, "abc",
                3);
  };
  seed();
  const auto begin = reprise::RngSnapshot::glance();
  at::rand({3});
  seed();
  const auto stash = RngStash::needed_by_a_replay(begin, kNoDevices);
  EXPECT_EQ(stash.size(), 1u);
}

TEST(marks_go_with_a_seed_and_stay_with_draws) {
  auto generator = at::detail::createCPUGenerator(3);
  const auto before = generator.get_state();
  const auto captured = GeneratorState::capture(generator);
  EXPECT(at::equal(generator.get_state(), before));  // not to be seen
  EXPECT(captured.is_untouched_since(generator));
  generator.get<at::CPUGeneratorImpl>()->random();
  EXPECT(!captured.is_untouched_since(generator));
  captured.apply(generator);
  EXPECT(captured.is_state_of(generator));
  EXPECT(!captured.is_untouched_since(generator));  // put back is not untouched
  const auto again = GeneratorState::capture(generator);
  EXPECT(again.is_untouched_since(generator));
  EXPECT(!captured.is_untouched_since(generator));  // nor is it if others begin here
  EXPECT(captured == again);
  generator.set_current_seed(3);
  EXPECT(!again.is_untouched_since(generator));
}

TEST(states_of_the_same_position_in_different_turns_differ) {
  auto generator = at::detail::createCPUGenerator(3);
  auto* engine = generator.get<at::CPUGeneratorImpl>();
  engine->random();
  const auto captured = GeneratorState::capture(generator);
  const auto mark = reprise::GeneratorMark::of(generator);
  for (int i = 0; i < 624; ++i) {
    engine->random();
  }
  EXPECT(!captured.is_state_of(generator));
  EXPECT(!captured.is_untouched_since(generator));
  EXPECT(!(GeneratorState::capture(generator) == captured));
  EXPECT_EQ(captured.draws_until(reprise::GeneratorMark::of(generator)).value(), 624u);
  EXPECT(reprise::GeneratorMark::of(generator).only_drawn_since(captured));
  EXPECT(mark.only_drawn_since(captured));
  captured.apply(generator);
  EXPECT(!reprise::GeneratorMark::of(generator).only_drawn_since(captured));
}

TEST_MAIN()
