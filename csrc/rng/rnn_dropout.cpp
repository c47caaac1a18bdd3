#include "rng/rnn_dropout.h"

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "rng/stream_capture.h"
#include "segment/recorder.h"
#include "torch_compat.h"
#include "unobserved.h"

namespace reprise {

namespace {

// What is known of one device.
struct OfDevice {
  int64_t size = -1;  // of a buffer in bytes; -1: not asked, 0: there is none
  at::Tensor buffer;  // the one that was met last
};

// Never destroyed: at the end of a process CUDA may be gone before it.
struct Known {
  std::mutex mutex;
  std::map<c10::DeviceIndex, OfDevice> devices;
};
Known& known() {
  static auto* all = new Known;
  return *all;
}

// As large as no mask of a small model is: what is smaller need not be asked about.
constexpr int64_t kLeastBytes = 1 << 20;

// cuDNN's answer, of which the buffer's own bytes are not needed. 0 without cuDNN, -1 if there is
// no memory for it now.
int64_t size_on(c10::Device device) {
  try {
    const Unobserved quietly;
    return at::_cudnn_init_dropout_state(/*dropout=*/0.5, /*train=*/true, /*dropout_seed=*/0,
                                         at::TensorOptions(at::kByte).device(device))
        .numel();
  } catch (const c10::OutOfMemoryError&) {
    return -1;
  } catch (const c10::Error&) {
    return 0;
  }
}

// What nearly every tensor is not.
bool may_be_rnn_state(const at::Tensor& tensor) {
  return tensor.is_cuda() && tensor.scalar_type() == at::kByte && tensor.dim() == 1 &&
         tensor.numel() >= kLeastBytes && tensor.layout() == at::kStrided &&
         tensor.is_contiguous() && !tensor.unsafeGetTensorImpl()->key_set().has_any(kWrapped);
}

bool is_rnn_state(const at::Tensor& tensor) {
  const c10::Device device = tensor.device();
  {
    const std::lock_guard<std::mutex> lock(known().mutex);
    const OfDevice& there = known().devices[device.index()];
    if (there.size >= 0) {
      return tensor.numel() == there.size;
    }
  }
  if (is_captured(device)) {
    return false;  // what would be asked becomes part of the graph
  }
  const int64_t size = size_on(device);
  const std::lock_guard<std::mutex> lock(known().mutex);
  known().devices[device.index()].size = size;
  return tensor.numel() == size;
}

void set_values(const at::Tensor& buffer, const at::Tensor& values) {
  const Unobserved quietly;
  // As a tensor of its own: torch does not count versions of the buffer either.
  buffer.variable_data().copy_(values);
}

bool is_same(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() && b.defined() &&
         a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

}  // namespace

at::Tensor copy_of_rnn_state(const at::Tensor& buffer) {
  const Unobserved quietly;
  return buffer.variable_data().clone();
}

void set_rnn_state_size(c10::DeviceIndex device, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(known().mutex);
  known().devices[device] = {bytes, at::Tensor()};
}

void meet_if_rnn_state(const at::Tensor& tensor) {
  if (!may_be_rnn_state(tensor) || !is_rnn_state(tensor)) {
    return;
  }
  c10::SmallVector<Recorder*, 4> around;
  compat::visit_recorders([&](Recorder& recorder) {
    around.push_back(&recorder);
    // A replay stands for its own forward alone: what lies around it is no business of what it
    // runs again.
    return !recorder.is_replay();
  });
  RnnState state;
  {
    const std::lock_guard<std::mutex> lock(known().mutex);
    at::Tensor& last = known().devices[tensor.device().index()].buffer;
    state.is_in_another_buffer = !is_same(last, tensor);
  }
  std::for_each(around.rbegin(), around.rend(),
                [&](Recorder* recorder) { recorder->meet_rnn_state(tensor, state); });
  const std::lock_guard<std::mutex> lock(known().mutex);
  known().devices[tensor.device().index()].buffer = tensor.variable_data();
}

RnnRewind::RnnRewind(const RnnStates& states) : states_(states) {
  for (const RnnState& state : states) {
    const c10::Device device = state.values.device();
    const auto is_there = [&](const Outer& outer) { return outer.buffer.device() == device; };
    if (std::any_of(outer_.begin(), outer_.end(), is_there)) {
      continue;
    }
    at::Tensor buffer;
    {
      const std::lock_guard<std::mutex> lock(known().mutex);
      buffer = known().devices[device.index()].buffer;
    }
    outer_.push_back({buffer, copy_of_rnn_state(buffer)});
  }
}

void RnnRewind::rewind(const at::Tensor& buffer) {
  if (next_ >= states_.size()) {
    return;  // more of them than in the forward: an error of its own
  }
  const RnnState& state = states_[next_++];
  for (Outer& outer : outer_) {
    if (outer.buffer.device() != buffer.device()) {
      continue;
    }
    if (!is_same(outer.buffer, buffer)) {
      if (!state.is_in_another_buffer) {  // so it was made by one outside of any segment
        outer.values = copy_of_rnn_state(buffer);
      }
      outer.buffer = buffer.variable_data();
    }
    set_values(buffer, state.values);
  }
}

void RnnRewind::put_back() noexcept {
  for (const Outer& outer : outer_) {
    try {
      set_values(outer.buffer, outer.values);
    } catch (...) {  // an error of the device that comes again wherever it is asked
    }
  }
}

}  // namespace reprise
