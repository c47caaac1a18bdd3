// The place of one tensor that autograd wanted to save in a segment.
//
// In the forward a slot notes what the tensor was like and drops it. A replay
// offers its tensors in the same order; each is compared with its slot and kept
// for the unpack that asks for it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/core/TensorImpl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "host.h"
#include "rng/generator_state.h"

namespace reprise {

// What the default determinism check compares. Sizes lie in one vector per
// segment, so that a slot needs no allocation of its own. A size that is
// symbolic (jagged tensors, shapes under tracing) is noted as kSymbolic and
// equals every other symbolic one.
struct Slot {
  static constexpr int64_t kSymbolic = -1;

  SourceLocation where;     // the user's line that made autograd save it
  uint32_t first_size = 0;  // into the segment's sizes
  uint16_t dim = 0;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  c10::Device device = c10::Device(c10::kCPU);
  // The tensor's version counter, shared with it and without its memory, and
  // where it stood. Not enabled: nothing to compare.
  c10::VariableVersion version = c10::VariableVersion(c10::VariableVersion::DISABLED);
  uint32_t saved_version = 0;
  // Who may still ask for it: autograd, until it lets go, and compiled backwards. Guarded by
  // the segment's mutex.
  uint16_t live = 1;
  DrawClock clock = 0;  // when it was saved

  // Is `tensor` what the slot was made from, as far as TensorMeta tells? For tensors
  // whose sizes are a plain list; `sizes`: of all slots.
  bool matches(const at::Tensor& tensor, c10::IntArrayRef sizes) const;
};

// Are the tensor's sizes a plain list of numbers, to be read without running code of
// anybody else's?
bool has_plain_sizes(const at::Tensor& tensor);

struct TensorMeta {
  c10::SmallVector<int64_t, 6> sizes;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  c10::Device device = c10::Device(c10::kCPU);

  static TensorMeta of(const at::Tensor& tensor);
  static TensorMeta of(const Slot& slot, c10::IntArrayRef sizes);
  bool operator==(const TensorMeta& other) const;
  std::string describe() const;  // "float32 [4, 8] on cpu"
};

}  // namespace reprise
