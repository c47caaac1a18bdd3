// The process-wide settings of torch that decide what an operator computes: SDPA
// backends and their order, deterministic algorithms, float32 precision, cuDNN, mkldnn
// and BLAS switches, the default dtype. One table (torch_flags.cpp) names each.
//
// They are noted as raw values, not through torch's getters: several getters resolve
// what is inherited from a more general setting, or refuse to answer when the old and
// the new way of setting TF32 were mixed, and what they say cannot be put back.
#pragma once

#include <array>
#include <cstddef>
#include <string>

namespace reprise {

class TorchFlags {
 public:
  // As they are now. Equal ones are one object, which stays for ever, so that a segment keeps a
  // pointer and comparisons are of pointers; a program meets few.
  static const TorchFlags* current();

  // Sets what differs from `now`, the current state.
  void apply(const TorchFlags& now) const;
  bool operator==(const TorchFlags&) const = default;

  // "default dtype was float64 in the forward, is float32 now", a line per setting that
  // differs; empty if none does.
  std::string diff(const TorchFlags& now) const;

 private:
  static TorchFlags read();

  static constexpr size_t kBytes = 128;
  std::array<std::byte, kBytes> bytes_{};  // in the order of the table; the rest is 0
};

}  // namespace reprise
