#include "generator.h"

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "runtime.h"

namespace testdev {
namespace {

std::atomic<uint64_t> g_read = 0;
std::atomic<uint64_t> g_set = 0;

// The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
// number generators", 2014): every bit of the result depends on every bit of x.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

template <size_t N>
c10::intrusive_ptr<c10::TensorImpl> to_bytes(const std::array<uint64_t, N>& words) {
  ++g_read;
  at::Tensor state = at::empty({sizeof(words)}, at::device(at::kCPU).dtype(at::kByte));
  std::memcpy(state.mutable_data_ptr(), words.data(), sizeof(words));
  return state.getIntrusivePtr();
}

template <size_t N>
std::array<uint64_t, N> from_bytes(const c10::TensorImpl& state, c10::Device device) {
  ++g_set;
  at::detail::check_rng_state(state);
  std::array<uint64_t, N> words;
  TORCH_CHECK(state.numel() == sizeof(words), "a state of a generator of ", device, " has ",
              sizeof(words), " bytes, got ", state.numel());
  std::memcpy(words.data(), state.data(), sizeof(words));
  return words;
}

class OpaqueGenerator final : public TestGenerator {
 public:
  using TestGenerator::TestGenerator;

  Draw draw(uint64_t count) override {
    const uint64_t key = mix(seed_ ^ mix(counter_ ^ mix(salt_)));
    ++counter_;
    salt_ = mix(salt_ ^ count);
    return Draw(key);
  }
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    counter_ = 0;
    salt_ = mix(~seed);
  }
  void set_offset(uint64_t) override { no_offset("set_offset"); }
  uint64_t get_offset() const override { no_offset("get_offset"); }
  void set_state(const c10::TensorImpl& state) override {
    const auto words = from_bytes<3>(state, device());
    seed_ = words[0];
    counter_ = words[1];
    salt_ = words[2];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return to_bytes<3>({seed_, counter_, salt_});
  }

 private:
  [[noreturn]] void no_offset(const char* what) const {
    TORCH_CHECK(false, what, ": the state of a generator of ", device(), " is opaque");
  }
  OpaqueGenerator* clone_impl() const override {
    auto* copy = new OpaqueGenerator(device().index());
    copy->seed_ = seed_;
    copy->counter_ = counter_;
    copy->salt_ = salt_;
    return copy;
  }

  uint64_t counter_ = 0;
  uint64_t salt_ = mix(~c10::default_rng_seed_val);
};

class PhiloxGenerator final : public TestGenerator {
 public:
  using TestGenerator::TestGenerator;

  Draw draw(uint64_t count) override {
    const uint64_t key = mix(seed_ ^ mix(offset_));
    offset_ += (count + 3) / 4 * 4;
    return Draw(key);
  }
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    offset_ = 0;
  }
  void set_offset(uint64_t offset) override {
    ++g_set;
    offset_ = offset;
  }
  uint64_t get_offset() const override {
    ++g_read;
    return offset_;
  }
  void set_state(const c10::TensorImpl& state) override {
    const auto words = from_bytes<2>(state, device());
    seed_ = words[0];
    offset_ = words[1];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return to_bytes<2>({seed_, offset_});
  }

 private:
  PhiloxGenerator* clone_impl() const override {
    auto* copy = new PhiloxGenerator(device().index());
    copy->seed_ = seed_;
    copy->offset_ = offset_;
    return copy;
  }

  uint64_t offset_ = 0;
};

}  // namespace

uint64_t Draw::bits(uint64_t i) const { return mix(key_ ^ mix(i)); }

double Draw::unit(uint64_t i) const { return static_cast<double>(bits(i) >> 11) * 0x1p-53; }

TestGenerator::TestGenerator(c10::DeviceIndex index)
    : GeneratorImpl(c10::Device(kType, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {
}

uint64_t TestGenerator::seed() {
  set_current_seed(c10::detail::getNonDeterministicRandom());
  return seed_;
}

uint64_t TestGenerator::states_read() { return g_read; }
uint64_t TestGenerator::states_set() { return g_set; }

at::Generator make_generator(c10::DeviceIndex index) {
  const char* setting = std::getenv("REPRISE_TEST_GENERATOR");
  const std::string_view kind = setting == nullptr ? "opaque" : setting;
  if (kind == "opaque") {
    return at::make_generator<OpaqueGenerator>(index);
  }
  TORCH_CHECK(kind == "philox", "REPRISE_TEST_GENERATOR must be opaque or philox, got ", kind);
  return at::make_generator<PhiloxGenerator>(index);
}

}  // namespace testdev
