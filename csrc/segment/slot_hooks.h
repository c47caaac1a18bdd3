// What the graph holds in the place of a saved tensor.
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <cstdint>

#include "segment/segment.h"

namespace reprise {

class SlotHooks final : public torch::autograd::SavedVariableHooks {
 public:
  explicit SlotHooks(c10::intrusive_ptr<Segment> segment) : segment_(std::move(segment)) {}
  ~SlotHooks() override {
    if (index_ != kNone) {
      segment_->release(index_);
    }
  }
  void call_pack_hook(const at::Tensor& tensor) override { index_ = segment_->record(tensor); }
  at::Tensor call_unpack_hook() override { return segment_->unpack(index_); }

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  c10::intrusive_ptr<Segment> segment_;  // strong: the graph keeps its segments
  uint32_t index_ = kNone;               // until call_pack_hook, which may never come
};

}  // namespace reprise
