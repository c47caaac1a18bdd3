#include "segment/replay.h"

#include <ATen/ATen.h>
#include <ATen/SequenceNumber.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <sstream>
#include <utility>

#include "segment/replay_scope.h"
#include "segment/segment.h"
#include "segment/timeline.h"

namespace reprise {

namespace ag = torch::autograd;

namespace {

// The hooks of the replay's own graph: fn may run a backward of its own inside,
// so they hold what they packed. The graph may outlive the replay, where fn stores
// it somewhere; it needs its values then, nothing else.
class ReplayHooks final : public ag::SavedVariableHooks {
 public:
  // `segment`: null where somebody has kept the pair of a run that is over.
  ReplayHooks(Segment* segment, Replay& replay) : segment_(segment), replay_(&replay) {}
  void call_pack_hook(const at::Tensor& tensor) override {
    values_ = segment_ != nullptr ? replay_->offer(*segment_, tensor) : compat::values_of(tensor);
  }
  at::Tensor call_unpack_hook() override { return values_; }

 private:
  // Valid until the one call of call_pack_hook, which torch makes right after the
  // recorder made this object: the recorder, which lies on the hook stack, is the replay.
  Segment* segment_;
  Replay* replay_;
  at::Tensor values_;  // strong, without history
};

}  // namespace

// ---------------------------------------------------------------------------
// Running
// ---------------------------------------------------------------------------

ReplayMark*& ReplayMark::innermost() {
  thread_local ReplayMark* innermost = nullptr;
  return innermost;
}

Replay::~Replay() {
  for (size_t i = 0; i < is_held_.size(); ++i) {
    drop_from_holder(i);
  }
}

void Replay::drop_from_holder(size_t index) {
  if (index < is_held_.size() && is_held_[index]) {
    is_held_[index] = false;
    holder_->drop(values_[index].storage().unsafeGetStorageImpl());
  }
}

// Makes a replay the recorder of its run for a scope.
class Replay::Running {
 public:
  Running(Replay& replay, Segment& segment, RnnRewind* rnn) : replay_(replay) {
    replay.running_ = &segment;
    replay.rnn_ = rnn;
    replay.depth_ = segment.depth();
  }
  ~Running() {
    replay_.running_ = nullptr;
    replay_.rnn_ = nullptr;
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  Replay& replay_;
};

std::unique_ptr<ag::SavedVariableHooks> Replay::make_hooks() {
  return std::make_unique<ReplayHooks>(running_, *this);
}

void Replay::run(Segment& segment) {
  // First, and outside of every scope: an input may be a slot of an enclosing
  // segment, whose replay has an environment of its own.
  std::vector<at::Tensor> inputs = segment.unpack_inputs();
  stop_where_others_do(segment);
  std::string rng_differs;
  {
    ReplayScope scope(segment, /*inside_fn=*/!forward_was_done_);
    const InterpreterHeld held;  // once for fn and for the pair around it
    std::optional<RnnRewind> rnn;
    if (!rnn_states_.empty()) {
      rnn.emplace(rnn_states_);
    }
    const Running running(*this, segment, rnn.has_value() ? &*rnn : nullptr);
    compat::HookScope hooks(
        host().make_hook_pair(c10::intrusive_ptr<Recorder>::reclaim_copy(this)));
    const auto outcome = segment.program().run(std::move(inputs), stopped_);
    if (segment.options().check_values) {
      compare_values(segment, value_notes_.finish());
    }
    if (outcome != Program::Outcome::kWentOnAfterStop) {
      rng_differs = scope.check_generators(outcome == Program::Outcome::kStopped);
    }
    if (rng_differs.empty() && drawn_otherwise_.has_value() && host().is_alone()) {
      rng_differs = drawn_otherwise(segment);
    }
  }
  check(segment);
  if (!rng_differs.empty()) {
    fail(segment, rng_differs);
  }
}

std::string Replay::drawn_otherwise(Segment& segment) const {
  Slot slot;
  {
    std::lock_guard<std::mutex> lock(segment.mutex_);
    slot = segment.slots_[*drawn_otherwise_];
  }
  return c10::str("the replay of ", segment.name(),
                  " draws other random numbers than its forward did.\n  When position ",
                  *drawn_otherwise_, " was saved, at ", host().describe(slot.where),
                  ", the generator of ", slot.device,
                  " was not where it was in the forward: something before that drew only once, or "
                  "another number of times. A lazy module, or one that makes something in its "
                  "first call, has to be called once before it is checkpointed.");
}

// Note [Early stop and other processes]
//
//     def fn(x):
//         always = x.sin()
//         total = all_reduce(always.detach().sum())
//         return always, (always * total).sin()
//
// If one process dropped the second output and another one did not, the replay of the
// first has all that its backward asks for before the collective, in which the other one
// waits. So with other processes around, a replay goes on to where a replay of the whole
// graph stops: the same point in all of them.
void Replay::stop_where_others_do(Segment& segment) {
  const auto last = static_cast<int64_t>(slots_at_start_) - 1;
  if (last_wanted_ < last && !key_.none() && segment.options().early_stop &&
      host().is_distributed()) {
    last_wanted_ = last;  // of this thread's run, which has not begun
  }
}

void Replay::start(const Segment& segment, std::optional<uint32_t> only) {
  holder_ = segment.holder();
  slots_at_start_ = segment.slots_.size();
  forward_was_done_ = segment.forward_done_;
  values_.resize(slots_at_start_);
  // Autograd has no versions to compare there, and what is held here is no copy.
  const bool hooked = segment.options_.check_versions && !segment.checks_versions_;
  versions_.assign(hooked ? slots_at_start_ : 0, std::nullopt);
  is_held_.resize(holder_ ? slots_at_start_ : 0);
  wanted_.assign(slots_at_start_, false);
  last_wanted_ = -1;
  for (size_t i = 0; i < slots_at_start_; ++i) {
    const bool want =
        only.has_value() ? i == *only : segment.slots_[i].live > 0 && !values_[i].defined();
    if (want) {
      wanted_[i] = true;
      last_wanted_ = static_cast<int64_t>(i);
    }
  }
  cursor_ = 0;
  rnn_states_ = segment.rnn_states_ ? *segment.rnn_states_ : RnnStates();
  clocks_.clear();
  drawn_otherwise_.reset();
  const SegmentOptions& options = segment.options_;
  if (forward_was_done_ && options.preserve_rng_state && options.check_rng) {
    clocks_ = segment.stash_.clocks();
  }
  operator_begin_ = 0;
  operator_may_fill_ = false;
  mismatches_.clear();
  failure_.clear();
  value_notes_.clear();
  stop_at_next_ = false;
  stopped_.store(false, std::memory_order_relaxed);
}

namespace {

// Elements that a whole operator may have saved to be allowed to finish: about
// as many as are multiplied in the time of the exception.
constexpr int64_t kFewElements = 8192;

}  // namespace

bool Replay::is_nearly_done(const Segment& segment, uint32_t index,
                            const at::Tensor& tensor) const {
  if (compat::is_output_of_newest_node(tensor)) {
    return true;
  }
  int64_t elements = 0;
  for (uint32_t i = operator_begin_; i <= index; ++i) {
    int64_t count = 1;
    const Slot& slot = segment.slots_[i];
    for (uint16_t d = 0; d < slot.dim; ++d) {
      const int64_t size = segment.sizes_[slot.first_size + d];
      count = size < 0 || size > kFewElements ? kFewElements + 1 : count * size;
      if (count > kFewElements) {
        return false;
      }
    }
    elements += count;
  }
  return elements <= kFewElements;
}

void Replay::meet_rnn_state(const at::Tensor& buffer, RnnState&) {
  if (rnn_ != nullptr) {
    rnn_->rewind(buffer);
  }
}

at::Tensor Replay::offer(Segment& segment, const at::Tensor& tensor) {
  const compat::UnseenByModes unseen(tensor);
  meet_if_rnn_state(tensor);
  at::Tensor values = compat::values_of(tensor);
  if (stopped_.load(std::memory_order_relaxed)) {
    return values;  // fn swallowed the stop and goes on: see Note [Early stop]
  }
  // Sizes of other kinds may take the interpreter lock, so they come before the mutex.
  const bool plain = has_plain_sizes(tensor);
  TensorMeta found;
  if (!plain) {
    found = TensorMeta::of(tensor);
  }
  // Where the generator of its device is, if it is not where it began.
  std::optional<DrawClock> drawn;
  for (const auto& [device, begin] : clocks_) {
    if (device == tensor.device()) {
      if (const DrawClock now = draw_clock(*default_generator(device)); now != begin) {
        drawn = now;
      }
    }
  }
  const uint64_t newest_node = at::sequence_number::peek();
  bool stop = false;
  bool may_finish = false;
  bool too_many = false;
  bool differs = false;
  bool stop_before = false;  // before this tensor
  uint32_t position = 0;
  {
    std::lock_guard<std::mutex> lock(segment.mutex_);
    const uint32_t index = cursor_++;
    position = index;
    stop = stop_at_next_;
    stop_before = stop;
    if (newest_node != operator_) {
      operator_ = newest_node;
      operator_begin_ = index;
      operator_may_fill_ = false;
    }
    operator_may_fill_ |= !tensor.requires_grad();
    if (index >= slots_at_start_) {
      // A replay during the forward (backward inside fn) cannot know how many
      // more tensors fn is going to save.
      too_many = forward_was_done_;
    } else if (!stop) {
      const Slot& slot = segment.slots_[index];
      if (drawn.has_value() && *drawn != slot.clock && !drawn_otherwise_.has_value()) {
        drawn_otherwise_ = index;
      }
      if (segment.options_.check_determinism &&
          !(plain ? slot.matches(tensor, segment.sizes_)
                  : TensorMeta::of(slot, segment.sizes_) == found)) {
        mismatches_.push_back(
            {index, plain ? TensorMeta::of(tensor) : std::move(found), false, std::nullopt});
        differs = true;
      }
      if (wanted_[index]) {
        if (segment.slots_[index].live > 0 || key_.none()) {
          values_[index] = values;
          if (!versions_.empty() && tensor.requires_grad()) {
            versions_[index] = compat::version_of(values);
          }
          if (holder_) {
            is_held_[index] = holder_->hold(tensor);
          }
        }
        wanted_[index] = false;
      }
      stop = segment.options_.early_stop && static_cast<int64_t>(index) == last_wanted_;
      if (stop && operator_may_fill_) {
        stop_at_next_ = true;
        stop = false;
      }
      may_finish = stop && runner == std::this_thread::get_id() && !Segment::is_saving_inputs() &&
                   is_nearly_done(segment, index, tensor);
    }
  }
  if (too_many) {
    std::ostringstream out;
    out << "the replay of " << segment.name() << " saves more tensors than its forward did.\n"
        << "  expected: " << slots_at_start_ << " tensors\n"
        << "  found:    one more, " << TensorMeta::of(tensor).describe() << ", saved at "
        << host().describe(host().current_location());
    {
      // fn may swallow the error: check() raises it again.
      std::lock_guard<std::mutex> lock(segment.mutex_);
      failure_ = out.str();
    }
    fail(segment, out.str());
  }
  if (differs) {
    locate_mismatches(segment);
  } else if (segment.options_.check_values && !stop_before) {
    compare_values(segment, value_notes_.add(position, tensor, newest_node));
  }
  if (stop) {
    stopped_.store(true, std::memory_order_relaxed);
    if (!may_finish || !host().stop_after_operator()) {
      host().throw_early_stop();
    }
  }
  return values;
}

at::Tensor Replay::hand_over(uint32_t index) {
  if (index >= values_.size()) {
    return at::Tensor();
  }
  if (!values_[index].defined()) {
    for (const auto& past : handed_over_) {
      if (past.index != index) {
        continue;
      }
      auto storage = past.storage.lock();
      if (!storage) {
        return at::Tensor();
      }
      auto again = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                            past.keys, past.dtype);
      again.unsafeGetTensorImpl()->set_sizes_and_strides(past.sizes, past.strides, past.offset);
      return again;
    }
    return at::Tensor();
  }
  if (keep_) {
    return values_[index];
  }
  at::Tensor values = take(index);
  if (!compat::running_node_unpacks_once() && compat::is_plain(values)) {
    handed_over_.push_back(
        {index,
         c10::weak_intrusive_ptr<c10::StorageImpl>(values.storage().getWeakStorageImpl()),
         values.key_set(),
         values.dtype(),
         {values.sizes().begin(), values.sizes().end()},
         {values.strides().begin(), values.strides().end()},
         values.storage_offset()});
  }
  return values;
}

at::Tensor Replay::take(uint32_t index) {
  if (index >= values_.size()) {
    return at::Tensor();
  }
  drop_from_holder(index);
  return std::exchange(values_[index], at::Tensor());
}

// ---------------------------------------------------------------------------
// Checking
// ---------------------------------------------------------------------------

void Replay::compare_values(Segment& segment, const std::vector<ValueNotes::Note>& notes) {
  bool differs = false;
  {
    std::lock_guard<std::mutex> lock(segment.mutex_);
    const auto& fingerprints = segment.watched().fingerprints;
    for (const auto& [position, value] : notes) {
      if (position >= fingerprints.size() || !value.has_value()) {
        continue;
      }
      const auto& expected = fingerprints[position];
      if (expected.has_value() && *expected != *value) {
        mismatches_.push_back({position, TensorMeta::of(segment.slots_[position], segment.sizes_),
                               true, std::nullopt});
        differs = true;
      }
    }
  }
  if (differs) {
    locate_mismatches(segment);
  }
}

void Replay::locate_mismatches(Segment& segment) {
  const std::string module = segment.program().running_module();
  std::lock_guard<std::mutex> lock(segment.mutex_);
  for (auto it = mismatches_.rbegin(); it != mismatches_.rend() && !it->module.has_value(); ++it) {
    it->module = module;
  }
}

namespace {
// Replays that were compared by value and found equal.
std::atomic<uint64_t> g_equal_replays{0};
}  // namespace

void Replay::check(Segment& segment) {
  std::unique_lock<std::mutex> lock(segment.mutex_);
  if (!failure_.empty()) {
    const std::string failure = failure_;
    lock.unlock();
    fail(segment, failure);
  }
  if (!mismatches_.empty()) {
    lock.unlock();
    fail(segment, mismatch_message(segment));
  }
  for (size_t i = 0; i < wanted_.size(); ++i) {
    if (wanted_[i] && (segment.slots_[i].live > 0 || key_.none())) {
      const Slot slot = segment.slots_[i];
      const TensorMeta expected = TensorMeta::of(slot, segment.sizes_);
      const uint32_t offered = cursor_;
      lock.unlock();
      std::ostringstream out;
      out << "the replay of " << segment.name() << " saves fewer tensors than its forward did.\n"
          << "  expected: " << slots_at_start_ << " tensors\n"
          << "  found:    " << offered << "\n"
          << "  the first that is missing, at position " << i << ": " << expected.describe()
          << ", saved at " << host().describe(slot.where);
      fail(segment, out.str());
    }
  }
  for (size_t i = 0; i < versions_.size(); ++i) {
    if (versions_[i].has_value() && values_[i].defined() &&
        *versions_[i] != compat::version_of(values_[i])) {
      const Slot slot = segment.slots_[i];
      lock.unlock();
      fail(segment, segment.name() + " changes a tensor in place that backward needs, saved at " +
                        host().describe(slot.where) +
                        ". Saved-tensor hooks around the call keep its value in the forward; a "
                        "replay does not go through them. Change a copy.");
    }
  }
  if (segment.options_.check_values) {
    g_equal_replays.fetch_add(1, std::memory_order_relaxed);
  }
}

std::string Replay::mismatch_message(Segment& segment) const {
  std::ostringstream out;
  const bool only_values = std::all_of(mismatches_.begin(), mismatches_.end(),
                                       [](const auto& mismatch) { return mismatch.only_values; });
  out << "the replay of " << segment.name()
      << (only_values
              ? " computes other values than its forward did (determinism_check=\"bitwise\"; "
              : " saves other tensors than its forward did.");
  if (only_values) {
    const auto equal = g_equal_replays.load(std::memory_order_relaxed);
    out << equal << (equal == 1 ? " replay was" : " replays were") << " equal before).";
  }
  constexpr size_t kShown = 8;
  for (size_t i = 0; i < mismatches_.size() && i < kShown; ++i) {
    const auto& mismatch = mismatches_[i];
    Slot slot;
    TensorMeta expected;
    {
      std::lock_guard<std::mutex> lock(segment.mutex_);
      slot = segment.slots_[mismatch.position];
      expected = TensorMeta::of(slot, segment.sizes_);
    }
    out << "\n  position " << mismatch.position << ", saved at " << host().describe(slot.where);
    if (mismatch.module.has_value() && !mismatch.module->empty()) {
      out << ", in " << *mismatch.module;
    }
    out << "\n    expected: " << expected.describe();
    if (mismatch.only_values) {
      out << " with the bits of the forward\n    found:    other bits";
    } else {
      out << "\n    found:    " << mismatch.found.describe();
    }
  }
  if (mismatches_.size() > kShown) {
    out << "\n  and " << mismatches_.size() - kShown << " more";
  }
  return out.str();
}

void Replay::fail(Segment& segment, const std::string& message) const {
  std::ostringstream out;
  out << "torch_reprise: " << message;
  const std::string node = is_ahead ? std::string() : compat::current_node_name();
  if (!node.empty()) {
    out << "\nAsked for by the backward of " << node << ".";
  }
  const std::string more = segment.program().explain_mismatch();
  if (!more.empty()) {
    out << "\n" << more;
  } else {
    out << "\nThe function must do the same operations on the same shapes each time it is "
           "called with the same arguments. Look for a global or an attribute that changed in "
           "between, or a branch on a value that is not deterministic. "
           "torch_reprise.set_checkpoint_debug_enabled(True) around the forward adds the "
           "operators of both runs to this message.";
  }
  throw_checkpoint_error(out.str());
}

}  // namespace reprise
