// The generators of the test device: one family of numbers, two ways to tell
// where a generator stands.
//
//   opaque  24 bytes: seed, number of draws, and a salt that every draw stirs.
//           get_offset and set_offset throw, and seed and counter together do
//           not tell the state.
//   philox  16 bytes: seed and offset, as CUDA's. A draw of n numbers moves the
//           offset by n, rounded up to a multiple of 4.
//
// Numbers are a hash of the state and the element's position. They are as
// random as a test needs and depend on every bit of the state.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/GeneratorImpl.h>

#include <cstdint>

namespace testdev {

// The position of one draw: number i of it is bits(i), uniform in 64 bits.
class Draw {
 public:
  explicit Draw(uint64_t key) : key_(key) {}
  uint64_t bits(uint64_t i) const;
  double unit(uint64_t i) const;  // in [0, 1)

 private:
  uint64_t key_;
};

class TestGenerator : public c10::GeneratorImpl {
 public:
  explicit TestGenerator(c10::DeviceIndex index);

  // Takes `count` numbers. The caller holds the mutex.
  virtual Draw draw(uint64_t count) = 0;

  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override;

  // How often the state of any of these generators was read and set since the
  // process started.
  static uint64_t states_read();
  static uint64_t states_set();

 protected:
  uint64_t seed_ = c10::default_rng_seed_val;
};

// Of the kind that the environment variable REPRISE_TEST_GENERATOR names,
// "opaque" if it is not set. A process has one kind: a backend does not change
// its generators while it runs.
at::Generator make_generator(c10::DeviceIndex index);

}  // namespace testdev
