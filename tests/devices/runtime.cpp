#include "runtime.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "generator.h"

namespace testdev {
namespace {

thread_local c10::DeviceIndex t_current = 0;

std::array<std::atomic<bool>, kDevices> g_has_context{};

void make_context(c10::DeviceIndex index) { g_has_context[static_cast<size_t>(index)] = true; }

struct HostMemory final : c10::Allocator {
  // Memory belongs to the current device; the kernels that allocate set it.
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kType, t_current);
    make_context(device.index());
    void* data = bytes == 0 ? nullptr : std::malloc(bytes);
    TORCH_CHECK(bytes == 0 || data != nullptr, device, ": no memory for ", bytes, " bytes");
    return {data, data, &std::free, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// One stream per device. Kernels have finished when they return, so that an
// event has nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, t_current}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.type() == kType, "testdev was asked to set ", device);
    t_current = checked(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    t_current = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Stream getStream(c10::Device device) const override { return stream_of(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream_of(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(stream.device());
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}

  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}

 private:
  static c10::Stream stream_of(c10::Device device) {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kType, checked(device.index())));
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override {
    return g_has_context[static_cast<size_t>(checked(index))];
  }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { t_current = checked(index); }
  c10::DeviceIndex getCurrentDevice() const override { return t_current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return std::exchange(t_current, checked(index));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return make_generator(checked(index));
  }
};

// --- functions for the tests, as ops: there is no Python module to put them in

at::Tensor generator_state(int64_t index) {
  at::Generator generator = default_generator(static_cast<c10::DeviceIndex>(index));
  std::lock_guard<std::mutex> lock(generator.mutex());
  return at::Tensor(generator.unsafeGetGeneratorImpl()->get_state());
}

void set_generator_state(int64_t index, const at::Tensor& state) {
  at::Generator generator = default_generator(static_cast<c10::DeviceIndex>(index));
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

void manual_seed(int64_t index, int64_t seed) {
  at::Generator generator = default_generator(static_cast<c10::DeviceIndex>(index));
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_current_seed(static_cast<uint64_t>(seed));
}

bool has_context(int64_t index) {
  return at::detail::getPrivateUse1Hooks().hasPrimaryContext(static_cast<c10::DeviceIndex>(index));
}

int64_t states_read() { return static_cast<int64_t>(TestGenerator::states_read()); }
int64_t states_set() { return static_cast<int64_t>(TestGenerator::states_set()); }

}  // namespace

c10::Allocator* allocator() {
  static HostMemory memory;
  return &memory;
}

c10::DeviceIndex checked(c10::DeviceIndex index) {
  if (index == -1) {
    return t_current;
  }
  TORCH_CHECK_INDEX(index >= 0 && index < kDevices, "testdev has devices 0 to ", kDevices - 1,
                    ", not ", static_cast<int>(index));
  return index;
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  // Never destroyed: Python may hold tensors until after static teardown.
  static const auto& generators =
      *new std::array<at::Generator, kDevices>{make_generator(0), make_generator(1)};
  index = checked(index);
  make_context(index);
  return generators[static_cast<size_t>(index)];
}

TORCH_LIBRARY(testdev, m) {
  m.def("generator_state(int device) -> Tensor", &generator_state);
  m.def("set_generator_state(int device, Tensor state) -> ()", &set_generator_state);
  m.def("manual_seed(int device, int seed) -> ()", &manual_seed);
  m.def("has_context(int device) -> bool", &has_context);
  m.def("states_read() -> int", &states_read);
  m.def("states_set() -> int", &states_set);
}

namespace {

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

const bool g_registered = [] {
  c10::register_privateuse1_backend("testdev");
  c10::SetAllocator(kType, allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);  // torch keeps the pointer
  return true;
}();

}  // namespace
}  // namespace testdev
