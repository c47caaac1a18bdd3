// A backend for the tests, registered as PrivateUse1 under the name "testdev".
//
// Two devices whose memory is host memory, built from torch's public hooks
// alone, the way a vendor's extension is. There is no Python module
// `torch.testdev`: whoever looks after these generators has to go through the
// hooks interface.
//
// What it is strict about, since the tests rest on it:
//   - A device has a context from the first allocation on it, or the first time
//     that its default generator is asked for, and each device its own.
//   - A random op without a kernel here is refused. The CPU fallback would draw
//     from the CPU's generator, and such a test would pass for no reason.
//   - The generator in use is the one of the tensor's device, never of the
//     current device.
//
// runtime.cpp    allocator, device guard, hooks, functions for the tests
// generator.cpp  two kinds of generators
// kernels.cpp    tensors, copies, random ops, the CPU fallback
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

namespace testdev {

constexpr c10::DeviceIndex kDevices = 2;
constexpr auto kType = c10::DeviceType::PrivateUse1;

c10::Allocator* allocator();

// The device meant by `index`, where -1 means this thread's current one. Throws
// on an index that is out of range.
c10::DeviceIndex checked(c10::DeviceIndex index);

// The default generator of a device; makes its context.
const at::Generator& default_generator(c10::DeviceIndex index);

}  // namespace testdev
