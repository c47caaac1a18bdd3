// Running fn again in backward to fill the slots of a segment.
//
// One Replay object belongs to one segment and one ReplayKey (a graph task, or
// a GraphExecGroup). It holds the recomputed tensors until they are asked for:
//
//   - in a graph task an unpack hands its tensor over and forgets it;
//   - in a GraphExecGroup of ours it keeps it until the slot dies or the group
//     ends, so that overlapping backward calls (dx, then dw) share one replay;
//     the end of a group of torch's own class is not told to us, so there it is
//     handed over as in a graph task;
//   - a slot that is asked for again (ctx.saved_tensors read twice) gets the
//     same memory while somebody still holds it; after that a second replay is
//     started, which keeps what it fills.
//
// Note [Early stop]
//
//   def fn(x, w, v):
//       h = torch.tanh(x @ w)      # saves x, w, h
//       return (h @ v).sum()       # saves h, v, sizes only
//
// After the last live slot is full the rest of fn is of no use, and stopping
// before the last matmul runs saves its time. The only way out of user code
// that is in the middle of an operator is an exception. It derives from
// BaseException, so that `except Exception` lets it through; a bare `except:`
// may swallow it or turn it into another error. So the replay notes that it
// asked to stop: from then on tensors that autograd saves are passed over,
// nothing is compared, and an error that fn ends with is dropped.
//
// Throwing through an operator costs 15 to 25 us, more than the rest of many
// operators: if the tensor is what the operator computed, or all that it saves
// is small, it may finish, and the exception is raised where it returns to
// (Host::stop_after_operator).
//
// Some operators save a tensor first and fill it after (the noise of rrelu). Such a
// tensor requires no grad; if the last operator saves one of that kind, the replay goes
// on until the next operator saves something.
//
// Note [Recomputed tensors have no history]
//
// The tensor offered by the replay's graph may be the output of the very node
// that saves it. Kept as it is, it would keep its node, and the node it: a
// cycle in C++ that nobody frees. So the values are kept, without history.
// SavedVariable gives them the history of the first forward when it hands them
// to backward, which is what makes higher derivatives right.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SafePyObject.h>
#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fingerprint/value_notes.h"
#include "pool.h"
#include "rng/rng_stash.h"
#include "rng/rnn_dropout.h"
#include "segment/recorder.h"
#include "segment/slot.h"
#include "torch_compat.h"

namespace reprise {

class Segment;
class Timeline;

// Marks this thread as replaying for a scope, in both forms.
class ReplayMark {
 public:
  // `timeline`: of the segment that is replayed; must outlive the mark.
  explicit ReplayMark(const std::shared_ptr<Timeline>& timeline)
      : outer_(std::exchange(innermost(), this)), timeline_(timeline) {}
  ~ReplayMark() { innermost() = outer_; }
  ReplayMark(const ReplayMark&) = delete;
  ReplayMark& operator=(const ReplayMark&) = delete;
  static bool active() { return innermost() != nullptr; }
  // Of the innermost replay on this thread, which must be active.
  static const std::shared_ptr<Timeline>& timeline() { return innermost()->timeline_; }

 private:
  static ReplayMark*& innermost();
  ReplayMark* outer_;
  const std::shared_ptr<Timeline>& timeline_;
};

class Replay final : public Recorder, public Pooled<Replay> {
 public:
  // `keep`: unpacks leave the values here (a group whose end we are told).
  Replay(compat::ReplayKey key, bool keep, std::optional<c10::SafePyObject> group)
      : key_(key), keep_(keep), group_(std::move(group)) {}

  ~Replay() override;

  // Runs fn with everything as in the forward. Called without any lock held.
  // Throws CheckpointError when what it recomputed does not match.
  void run(Segment& segment);

  // The recorder of the run.
  std::unique_ptr<torch::autograd::SavedVariableHooks> make_hooks() override;
  int depth() const override { return depth_; }
  bool is_replay() const override { return true; }
  void meet_rnn_state(const at::Tensor& buffer, RnnState& state) override;

  // The next tensor that the replay's autograd saves. Returns its values for
  // the replay's own graph. May throw early stop or CheckpointError.
  at::Tensor offer(Segment& segment, const at::Tensor& tensor);

  // The rest is guarded by the segment's mutex.

  // Prepares a run over the slots that there are now; fills those that are live and
  // empty, or only `only`.
  void start(const Segment& segment, std::optional<uint32_t> only);
  // The values for an unpack; undefined if they were handed over before and
  // nobody holds them any more, or were never asked for.
  at::Tensor hand_over(uint32_t index);
  void keep_from_now_on() { keep_ = true; }
  // What is held for a slot, taken out so that the caller can drop it unlocked.
  at::Tensor take(uint32_t index);
  const compat::ReplayKey& key() const { return key_; }

  bool running = false;
  std::thread::id runner;
  bool expired = false;   // its task or group ended while it was running
  bool is_ahead = false;  // nobody has asked for it yet: ahead.h

 private:
  struct Mismatch {
    uint32_t position;
    TensorMeta found;
    bool only_values;  // shape, dtype and device are equal
    // Where in fn's modules the replay was; not asked yet, or "" if that is not known.
    std::optional<std::string> module;
  };

  std::string drawn_otherwise(Segment& segment) const;
  // Note [Early stop and other processes]. Called without any lock held.
  void stop_where_others_do(Segment& segment);
  // Throws if the finished run does not match the forward.
  void check(Segment& segment);
  std::string mismatch_message(Segment& segment) const;
  // Compares with what the forward noted.
  void compare_values(Segment& segment, const std::vector<ValueNotes::Note>& notes);
  // Says of the mismatches found last which module is running.
  void locate_mismatches(Segment& segment);
  [[noreturn]] void fail(Segment& segment, const std::string& message) const;

  class Running;

  compat::ReplayKey key_;
  bool keep_;
  std::optional<c10::SafePyObject> group_;  // strong: see compat::current_group
  c10::SmallVector<at::Tensor, 4> values_;  // by slot; undefined: not filled or handed over
  std::shared_ptr<Timeline> holder_;        // where that is noted; nearly always null
  std::vector<bool> is_held_;               // by slot: noted there; empty without one
  void drop_from_holder(size_t index);

  // Is the operator that saves slot `index` as good as done? `tensor`: what it
  // saves there.
  bool is_nearly_done(const Segment& segment, uint32_t index, const at::Tensor& tensor) const;

  // What was handed over: enough to make the same tensor again from memory that
  // backward still holds. Weak, so that it is freed as if this were not here.
  // Plain dense tensors only, and only for nodes that may ask again.
  struct HandedOver {
    uint32_t index;
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    c10::SmallVector<int64_t, 5> sizes;
    c10::SmallVector<int64_t, 5> strides;
    int64_t offset;
  };
  std::vector<HandedOver> handed_over_;

  // The current run.
  Segment* running_ = nullptr;  // what runs it holds the segment
  RnnStates rnn_states_;        // that it needs
  RnnRewind* rnn_ = nullptr;    // that puts these in place; null: none
  int depth_ = 0;
  c10::SmallVector<bool, 32> wanted_;  // by slot
  int64_t last_wanted_ = -1;           // early stop after this one
  uint32_t cursor_ = 0;                // tensors offered so far
  // The autograd node that the last tensors were offered for, by the number of
  // nodes made on this thread, and the first of these tensors.
  uint64_t operator_ = 0;
  uint32_t operator_begin_ = 0;
  bool operator_may_fill_ = false;  // it may write to a tensor that it saved
  size_t slots_at_start_ = 0;
  bool forward_was_done_ = false;
  // Of the values that are compared again when the run is over, by slot; empty unless hooks of
  // the user's keep what autograd saves in the forward.
  std::vector<std::optional<uint32_t>> versions_;
  std::vector<Mismatch> mismatches_;
  // Note [Clock]: by device, where the generators begin that the forward moved, and the first slot
  // at which one was neither where it was in the forward nor where it began: that may have been
  // another thread, in the forward.
  RngStash::Clocks clocks_;
  std::optional<uint32_t> drawn_otherwise_;
  ValueNotes value_notes_;
  std::string failure_;  // an error that was raised inside fn
  std::atomic<bool> stopped_{false};
  bool stop_at_next_ = false;  // all is offered, the last one may not be filled yet
};

}  // namespace reprise
