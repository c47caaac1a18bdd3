#include "rng/stream_capture.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

namespace reprise {
namespace {

// cudaStreamGetCaptureInfo: stream, status, id, and then what differs between
// versions of CUDA, all of it out-parameters that may be null. More arguments than
// a version takes are passed over by every calling convention of Linux.
using CaptureInfo = int (*)(void* stream, int* status, unsigned long long* id, void*, void*, void*,
                            void*);

// torch loads the CUDA runtime for the whole process, so that a header or a link
// is not needed to find it. Null in a build without CUDA.
CaptureInfo capture_info() {
  static const auto found =
      reinterpret_cast<CaptureInfo>(dlsym(RTLD_DEFAULT, "cudaStreamGetCaptureInfo"));
  return found;
}

}  // namespace

bool is_captured(c10::Device device) {
  const auto* guard = guard_of(device.type());
  if (guard == nullptr) {
    return false;
  }
  const c10::Stream stream = guard->getStream(device);
  return stream.id() != 0 && guard->isStreamCapturing(stream);
}

bool current_device_is_captured(c10::DeviceType type) {
  const auto* guard = guard_of(type);
  return guard != nullptr && guard->isStreamCapturing(guard->getStream(guard->getDevice()));
}

CaptureId capture_of(c10::Device device) {
  TORCH_CHECK(device.is_cuda() && capture_info() != nullptr, "torch_reprise: a stream of ", device,
              " is being captured. Random state inside of a capture is supported for CUDA alone: "
              "pass preserve_rng_state=False, or run the segment outside of it.");
  const auto* guard = c10::impl::getDeviceGuardImpl(device.type());
  const OnDevice there(device);
  int status = 0;
  unsigned long long id = 0;
  const int error = capture_info()(guard->getStreamNativeHandle(guard->getStream(device)), &status,
                                   &id, nullptr, nullptr, nullptr, nullptr);
  TORCH_CHECK(error == 0, "torch_reprise: CUDA does not tell which capture a stream of ", device,
              " belongs to (error ", error, ")");
  return id;
}

// The unchecked one of the two ways to set a device is the one that leaves a device
// without a context as it is.
OnDevice::OnDevice(c10::Device device)
    : guard_(c10::impl::getDeviceGuardImpl(device.type())), before_(guard_->getDevice()) {
  guard_->uncheckedSetDevice(device);
}

OnDevice::~OnDevice() { guard_->uncheckedSetDevice(before_); }

}  // namespace reprise
