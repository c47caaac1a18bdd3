// What the graph holds in the place of a saved tensor.
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "host.h"
#include "pool.h"
#include "segment/segment.h"

namespace reprise {

class SlotHooks final : public torch::autograd::SavedVariableHooks, public Pooled<SlotHooks> {
 public:
  explicit SlotHooks(c10::intrusive_ptr<Segment> segment) : segment_(std::move(segment)) {}
  ~SlotHooks() override {
    if (index_ != kNone) {
      segment_->release(index_);
    }
  }
  void call_pack_hook(const at::Tensor& tensor) override { index_ = segment_->record(tensor); }
  at::Tensor call_unpack_hook() override { return segment_->unpack(index_); }
  std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>> retrieve_unpack_hook_data()
      const override {
    return host().as_function_and_data(std::make_unique<Unpack>(segment_, index_));
  }

 private:
  // What a compiled backward calls; the graph may be freed before.
  class Unpack final : public torch::autograd::SavedVariableHooks {
   public:
    Unpack(c10::intrusive_ptr<Segment> segment, uint32_t index)
        : segment_(std::move(segment)), index_(index) {
      segment_->retain(index_);
    }
    ~Unpack() override { segment_->release(index_); }
    void call_pack_hook(const at::Tensor&) override {}
    at::Tensor call_unpack_hook() override { return segment_->unpack(index_); }

   private:
    c10::intrusive_ptr<Segment> segment_;  // strong
    uint32_t index_;
  };

  static constexpr uint32_t kNone = UINT32_MAX;
  c10::intrusive_ptr<Segment> segment_;  // strong: the graph keeps its segments
  uint32_t index_ = kNone;               // until call_pack_hook, which may never come
};

}  // namespace reprise
