// Is the work of this thread on a device being captured into a graph, and which?
//
// Note [Stream capture]
//
//   with torch.cuda.graph(graph):
//       loss = model(x)            # has segments with dropout
//       loss.backward()
//
// While a stream is captured nothing runs, and a draw does not move its generator:
// torch counts offsets from where the generator will stand when the graph is
// launched, one count for each generator and capture. get_offset and set_offset
// are refused. get_state and set_state give and take that count, as long as the
// seed is the one it is, and neither synchronises. So a Philox state has three
// parts: seed, offset, and the capture that the offset belongs to. Two states of
// different captures, or of a capture and of none, cannot be compared, and none
// can be restored in place of the other: where the generator stands at launch is
// not known at capture.
//
// Which capture a draw belongs to is decided by the current stream of the
// generator's own device, since operators make the device of their tensors the
// current one. So that is what is asked here, for each generator. While a stream of
// one device is captured, the others draw as always, and are rewound as always;
// only must their device be the current one where a generator is asked by its virtuals,
// since torch looks at the current device to refuse get_offset.
//
// The first get_state in a capture makes torch's count (16 bytes on the device),
// as the first draw would. A graph that then draws nothing pays nothing at launch.
//
// Rejected: torch's Python class for the graph that is being captured. It takes
// the interpreter lock, and the same object may be captured twice.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>

namespace reprise {

// CUDA's number of a capture; no two captures of a process share one.
using CaptureId = uint64_t;
constexpr CaptureId kNoCapture = 0;
// A capture that torch did not begin: it refuses to draw there, so no generator
// can move.
constexpr CaptureId kForeignCapture = ~CaptureId{0};
// Of a position that was looked at while nothing had been drawn from the generator in any
// capture: then which stream is current makes no difference to what it is. Outside of a
// capture it is (seed, offset), inside of any it is (seed, 0).
constexpr CaptureId kNotAsked = ~CaptureId{1};
constexpr bool is_in_capture(CaptureId id) { return id != kNoCapture && id != kNotAsked; }

// Null where a type has none, as the CPU.
inline const c10::impl::DeviceGuardImplInterface* guard_of(c10::DeviceType type) {
  return c10::impl::device_guard_impl_registry[static_cast<size_t>(type)].load();
}

// Is the current stream of `device` being captured? Some 20 ns where that is the default
// stream, which CUDA does not capture; a glance at a generator need not ask.
bool is_captured(c10::Device device);

// The same, but false also where torch refuses to tell an offset anyway: on the
// current device, as far as CUDA goes. For looks by torch's virtuals, which ask the
// driver themselves.
inline bool is_captured_unnoticed(c10::Device device) {
  const auto* guard = guard_of(device.type());
  return guard != nullptr && guard->getStream(device).id() != 0 &&
         !(device.is_cuda() && guard->getDevice() == device) && is_captured(device);
}

// The same for the device of this type that is current, whatever its stream.
bool current_device_is_captured(c10::DeviceType type);

// The capture that is_captured() speaks of. Throws if the backend cannot tell.
CaptureId capture_of(c10::Device device);

// Makes a device the current one for a scope, without making a context for it.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const c10::impl::DeviceGuardImplInterface* guard_;  // torch's, never freed
  c10::Device before_;
};

}  // namespace reprise
