#include "segment/segment.h"

#include <ATen/SequenceNumber.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>

#include "lease.h"
#include "per_thread.h"
#include "segment/ahead.h"
#include "segment/ledger.h"
#include "segment/replay.h"
#include "segment/slot_hooks.h"

namespace reprise {

namespace ag = torch::autograd;

// ---------------------------------------------------------------------------
// Begin and end
// ---------------------------------------------------------------------------

namespace {

thread_local bool t_saving_inputs = false;

struct SavingInputs {
  SavingInputs() { t_saving_inputs = true; }
  ~SavingInputs() { t_saving_inputs = false; }
};

}  // namespace

bool Segment::is_saving_inputs() noexcept { return t_saving_inputs; }

c10::intrusive_ptr<Segment> Segment::begin(std::unique_ptr<Program> program,
                                           const std::vector<at::Tensor>& inputs,
                                           SegmentOptions options, int depth,
                                           RngSnapshot::Generators generators,
                                           c10::ArrayRef<Reached> reached) {
  auto segment = c10::intrusive_ptr<Segment>::make();
  segment->forward_thread_ = std::this_thread::get_id();
  segment->first_node_ = at::sequence_number::peek();
  segment->program_ = std::move(program);
  segment->options_ = options;
  segment->depth_ = depth;
  Ledger& ledger = Ledger::get();
  ledger.add(*segment);
  segment->in_replay_ = ReplayMark::active();
  if (depth > 0 || segment->in_replay_) {
    Ahead::note_unseen();
  }
  segment->unseen_ = Ahead::unseen();
  if (segment->in_replay_) {
    if (const auto& holder = ReplayMark::timeline()) {
      segment->watch().holder = holder;
    }
  } else if (ledger.recording()) {
    segment->begin_row();
  }
  segment->inputs_.reserve(inputs.size());
  // Under hooks, an enclosing segment's or the user's, the inputs are kept by those.
  const bool hooked = compat::top_pack_hook() != nullptr;
  for (const auto& input : inputs) {
    Input& entry = segment->inputs_.emplace_back();
    if (hooked) {
      // Given twice: the replay gets one object twice as well. It is saved twice all the same,
      // for in the replay of an enclosing segment these may be two tensors. (Without hooks
      // autograd gives back the object that it was given.)
      const auto first = std::find_if(inputs.begin(), inputs.end(),
                                      [&input](const auto& other) { return other.is_same(input); });
      entry.same_as = &*first == &input ? -1 : first - inputs.begin();
    }
    if (input.is_inference()) {
      // SavedVariable refuses inference tensors. They have no version to check.
      entry.inference = input;
    } else {
      const SavingInputs saving;
      entry.saved = ag::SavedVariable(input, /*is_output=*/false);
      entry.version = ag::impl::version_counter(input);
      entry.saved_version = entry.version.current_version();
      entry.is_leaf = input.is_leaf();
      entry.requires_grad = input.requires_grad();
      entry.has_history = entry.requires_grad && !entry.is_leaf;
      if (entry.has_history && depth == 0) {
        Previous& last = Previous::last_ended();
        ag::Node* node = input.grad_fn().get();
        if (last.node == node && node != nullptr && last.number == node->sequence_nr()) {
          segment->previous_ = std::exchange(last, {});
        }
      }
    }
    if (input.has_storage()) {
      segment->input_storages_.push_back(input.storage().unsafeGetStorageImpl());
    }
    segment->note_device(input.device());
  }
  if (segment->holder() && !hooked) {
    for (const auto& input : inputs) {
      if (segment->holder()->hold(input)) {
        segment->watched_->held_inputs.push_back(input.storage().unsafeGetStorageImpl());
      }
    }
  }
  segment->checks_versions_ = options.check_versions && !compat::user_hooks_in_force();
  if (options.ambient != AmbientPolicy::kIgnore) {
    segment->ambient_ = AmbientState::current();
  }
  if (options.preserve_rng_state) {
    segment->stash_ = RngStash(RngSnapshot::glance(generators));
  }
  segment->reached_.note(reached);
  if (options.check_values) {
    segment->watch().value_notes = std::make_unique<ValueNotes>();
  }
  return segment;
}

void Segment::begin_row() {
  Ledger& ledger = Ledger::get();
  auto row = ledger.new_row();
  if (row) {
    auto name = program_->name();
    {
      auto lock = ledger.lock_rows();
      row->name = std::move(name);
      row->depth = depth_;
    }
    Watched& watched = watch();
    watched.timeline = row->timeline;
    watched.holder = watched.timeline;
    watched.row = std::move(row);
  }
}

const Segment::Watched& Segment::by_nobody_ = *new Watched;

Segment::Watched& Segment::watch() {
  if (!watched_) {
    watched_ = std::make_unique<Watched>();
  }
  return *watched_;
}

Segment::~Segment() { drop(); }

void Segment::release_resources() { drop(); }

void Segment::drop() noexcept {
  if (dropped_) {
    return;
  }
  dropped_ = true;
  Ledger::get().remove(*this);
  replays_.clear();
  EndOfGraphTask<Segment>::take_out(*this, place_in_task_);
  previous_ = {};
  for (const auto* storage : watched().held_inputs) {
    holder()->drop(storage);
  }
  stash_ = RngStash();
  rnn_states_.reset();
  reached_ = ReachedState();
  const InterpreterHeld held;  // once for all objects that are let go
  inputs_.clear();
  ambient_.reset();
  program_.reset();
}

void Segment::end_forward(const at::Tensor* output) {
  for (auto& input : inputs_) {
    // Changed in place, it has a history inside of this segment's own graph: kept,
    // it would close a cycle that nobody frees. No replay can use it anyway.
    if (input.has_history && input.version.current_version() != input.saved_version) {
      input.saved = ag::SavedVariable();
      input.changed_inside = true;
    }
  }
  reached_.settle();
  if (const auto& notes = watched().value_notes) {
    write_fingerprints(notes->finish());
  }
  RngStash needed;
  if (options_.preserve_rng_state) {
    needed = RngStash::needed_by_a_replay(stash_.begin(), devices_);
    const auto unknown = needed.add_newcomers(stash_.begin());
    if (!unknown.empty()) {
      throw_checkpoint_error(
          c10::str("torch_reprise: ", name(), " is the first to use the device ", unknown.front(),
                   ", whose generator has a state of its own kind, so that what it was before "
                   "cannot be told. Use the device once before the checkpoint (any tensor on it "
                   "will do), or pass preserve_rng_state=False."));
    }
  }
  uint64_t bytes = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::swap(stash_, needed);
    forward_done_ = true;
    bytes = bytes_not_saved_;
  }
  if (depth_ == 0) {
    note_as_last_ended(output);
  }
  Ledger& ledger = Ledger::get();
  if (!in_replay_) {
    ledger.count_bytes(bytes);
  }
  if (row()) {
    auto names = stash_.names_of_moved();
    auto lock = ledger.lock_rows();
    row()->slots = slots_.size();
    row()->bytes = bytes;
    row()->generators = std::move(names);
  }
}

// ---------------------------------------------------------------------------
// Slots
// ---------------------------------------------------------------------------

namespace {

// Bytes of a tensor's own elements; 0 where that is not one block of memory.
uint64_t element_bytes(const at::Tensor& tensor, c10::IntArrayRef sizes) {
  if (tensor.layout() != at::kStrided) {
    return 0;
  }
  uint64_t elements = 1;
  for (int64_t size : sizes) {
    elements *= size == Slot::kSymbolic ? 0 : static_cast<uint64_t>(size);
  }
  return elements * tensor.dtype().itemsize();
}

}  // namespace

uint32_t Segment::record(const at::Tensor& tensor) {
  const compat::UnseenByModes unseen(tensor);
  Slot slot;
  // The line and sizes of other kinds may take the interpreter lock, so they come
  // before mutex_.
  slot.where = where_is(at::sequence_number::peek());
  meet_if_rnn_state(tensor);
  TensorMeta meta;
  c10::IntArrayRef sizes;
  if (has_plain_sizes(tensor)) {
    sizes = tensor.sizes();
  } else {
    meta = TensorMeta::of(tensor);
    sizes = meta.sizes;
  }
  slot.dim = static_cast<uint16_t>(sizes.size());
  slot.dtype = tensor.scalar_type();
  slot.device = tensor.device();
  if (options_.preserve_rng_state && options_.check_rng) {
    const auto* generator = default_generator(slot.device);
    slot.clock = generator != nullptr ? draw_clock(*generator) : 0;
  }
  const bool is_parameter = compat::shows_a_leaf(tensor);
  const bool is_input = tensor.has_storage() &&
                        std::find(input_storages_.begin(), input_storages_.end(),
                                  tensor.storage().unsafeGetStorageImpl()) != input_storages_.end();
  uint64_t bytes = 0;
  uint64_t of_replay = 0;
  if (!is_parameter && !is_input) {
    bytes = element_bytes(tensor, sizes);
    const bool is_dense = has_plain_sizes(tensor) && tensor.layout() == at::kStrided;
    of_replay = is_dense && tensor.has_storage() ? tensor.storage().nbytes() : kUnknownBytes;
  }
  if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) {
    Ahead::note_unseen();
  }
  if (checks_versions_ && !tensor.is_inference()) {
    slot.version = ag::impl::version_counter(tensor);
    slot.saved_version = slot.version.current_version();
  }

  std::unique_lock<std::mutex> lock(mutex_);
  note_device(slot.device);
  slot.first_size = static_cast<uint32_t>(sizes_.size());
  sizes_.append(sizes.begin(), sizes.end());
  slots_.push_back(std::move(slot));
  ++live_;
  bytes_not_saved_ += bytes;
  bytes_of_replay_ += of_replay;
  if (timeline()) {
    timeline()->save(tensor);
  }
  const auto index = static_cast<uint32_t>(slots_.size() - 1);
  if (const auto& notes = watched().value_notes) {
    lock.unlock();
    try {
      write_fingerprints(notes->add(index, tensor, at::sequence_number::peek()));
    } catch (...) {
      release(index);  // the graph never got it
      throw;
    }
  }
  return index;
}

void Segment::meet_rnn_state(const at::Tensor& buffer, RnnState& state) {
  if (!options_.preserve_rng_state) {
    return;
  }
  if (!state.values.defined()) {
    state.values = copy_of_rnn_state(buffer);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (!rnn_states_) {
    rnn_states_ = std::make_unique<RnnStates>();
  }
  rnn_states_->push_back(state);
}

void Segment::write_fingerprints(const std::vector<ValueNotes::Note>& notes) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [position, value] : notes) {
    auto& fingerprints = watched_->fingerprints;
    if (fingerprints.size() <= position) {
      fingerprints.resize(position + 1);
    }
    fingerprints[position] = value;
  }
}

SourceLocation Segment::where_is(uint64_t node) {
  if (forward_thread_ != std::this_thread::get_id()) {
    return host().current_location();  // a thread of a backward inside fn
  }
  if (last_node_ != node || last_where_.code == nullptr) {
    last_node_ = node;
    last_where_ = host().current_location();
  }
  return last_where_;
}

void Segment::note_device(c10::Device device) {
  if (std::find(devices_.begin(), devices_.end(), device) == devices_.end()) {
    devices_.push_back(device);
  }
}

void Segment::retain(uint32_t index) {
  std::lock_guard<std::mutex> lock(mutex_);
  live_ += slots_[index].live++ == 0 ? 1 : 0;
}

void Segment::release(uint32_t index) noexcept {
  c10::SmallVector<at::Tensor, 1> dropped;  // destroyed after the lock is let go
  std::lock_guard<std::mutex> lock(mutex_);
  if (--slots_[index].live > 0) {
    return;
  }
  --live_;
  for (auto& replay : replays_) {
    dropped.push_back(replay->take(index));
  }
  if (timeline()) {
    timeline()->free(index);
    if (live_ == 0) {
      timeline()->end_backward();
    }
  }
}

size_t Segment::live_slots() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return live_;
}

size_t Segment::stashed_bytes(std::unordered_set<const void*>& seen) const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t of_rnns = 0;
  if (rnn_states_) {
    for (const RnnState& state : *rnn_states_) {
      const bool is_new = seen.insert(state.values.unsafeGetTensorImpl()).second;
      of_rnns += is_new ? state.values.nbytes() : 0;
    }
  }
  return stash_.nbytes(seen) + of_rnns + reached_.nbytes();
}

// ---------------------------------------------------------------------------
// Unpacking and replays
// ---------------------------------------------------------------------------

Replay* Segment::find_replay(const compat::ReplayKey& key) const {
  for (const auto& replay : replays_) {
    if (replay->key() == key) {
      return replay.get();
    }
  }
  return nullptr;
}

at::Tensor Segment::unpack(uint32_t index) {
  const compat::ReplayKey key = compat::current_replay_key();
  std::unique_lock<std::mutex> lock(mutex_);
  check_version(lock, index);
  if (at::Tensor values = recomputed(key, index); values.defined()) {
    return values;
  }
  lock.unlock();
  return replay_and_unpack(key, index);
}

at::Tensor Segment::recomputed(const compat::ReplayKey& key, uint32_t index) const {
  Replay* replay = find_replay(key);
  return replay != nullptr && !replay->running ? replay->hand_over(index) : at::Tensor();
}

at::Tensor Segment::replay_and_unpack(const compat::ReplayKey& key, uint32_t index) {
  // Declared before the lock, so that they are destroyed after it is let go, and
  // looked up without it: they may need the interpreter lock.
  std::optional<c10::SafePyObject> group;
  const bool keep = key.is_group() && host().reports_its_end(key.group);
  c10::intrusive_ptr<Replay> replay;
  std::vector<c10::intrusive_ptr<Replay>> past;  // of earlier rounds of the loop
  bool prepared = false;

  // The graph may be freed while fn runs again (a backward inside it).
  const auto self = c10::intrusive_ptr<Segment>::reclaim_copy(this);

  std::unique_lock<std::mutex> lock(mutex_);
  if (key.none()) {
    // Somebody looks at a saved tensor outside of backward.
    return replay_one(lock, index);
  }
  while (true) {
    if (at::Tensor values = recomputed(key, index); values.defined()) {
      return values;
    }
    if (slots_[index].live == 0) {
      return replay_one(lock, index);  // the graph was freed meanwhile
    }
    if (replay) {
      past.push_back(std::move(replay));
    }
    Replay* known = find_replay(key);
    replay = known != nullptr ? c10::intrusive_ptr<Replay>::reclaim_copy(known)
                              : c10::intrusive_ptr<Replay>();
    if (replay && replay->running) {
      if (replay->runner == std::this_thread::get_id()) {
        lock.unlock();
        throw_checkpoint_error(
            c10::str("torch_reprise: the replay of ", name(),
                     " asked for one of the tensors that it is there to recompute. "
                     "The function reads saved tensors of its own outer graph; keep what it "
                     "needs from there outside of the checkpointed function."));
      }
      if (Lease::held_by_this_chain() && Lease::is_waiting(replay->runner)) {
        // It waits for our turn to end, so that waiting for it would last for
        // ever (a GraphExecGroup over threads whose functions run backward).
        return replay_one(lock, index);
      }
      wait_for_replay(lock, *replay);
      continue;
    }
    if (replay) {
      // Handed over before, in the same backward: from now on keep.
      replay->keep_from_now_on();
    } else if (!prepared) {
      lock.unlock();
      EndOfGraphTask<Segment>::Place place;
      if (key.is_group()) {
        group = compat::current_group();
      } else {
        place = EndOfGraphTask<Segment>::of(key)->add(*this);
      }
      prepared = true;
      lock.lock();
      place_in_task_ = place;
      continue;  // another thread may have been quicker
    } else {
      replay = c10::make_intrusive<Replay>(key, keep, std::move(group));
      replays_.push_back(replay);
      prepared = !key.is_group();  // the next one needs a reference of its own
    }
    const bool goes_ahead = prepared && previous_.node != nullptr;
    replay->start(*this, std::nullopt);
    run_replay(lock, replay);
    if (goes_ahead) {
      lock.unlock();
      replay_ahead(key);
      lock.lock();
    }
  }
}

// --- ahead.h

void Segment::note_as_last_ended(const at::Tensor* output) {
  Previous& last = Previous::last_ended();
  ag::Node* node = output != nullptr ? output->grad_fn().get() : nullptr;
  if (node == nullptr || node->sequence_nr() < first_node_) {
    // fn has returned what somebody else made: its own graph may lie elsewhere.
    last.node = nullptr;
    return;
  }
  last.segment = decltype(last.segment)::reclaim_copy(this);
  last.node = node;
  last.number = node->sequence_nr();
}

Segment::Previous& Segment::Previous::last_ended() { return per_thread<Previous>(); }

c10::intrusive_ptr<Segment> Segment::Previous::lock() const {
  return c10::static_intrusive_pointer_cast<Segment>(segment.lock());
}

bool Segment::may_be_ahead() const {
  return options_.may_be_ahead && checks_versions_ && depth_ == 0 && !in_replay_ && !row() &&
         unseen_ == Ahead::unseen() &&
         std::all_of(devices_.begin(), devices_.end(),
                     [](c10::Device device) { return device.is_cpu(); });
}

void Segment::replay_ahead(const compat::ReplayKey& key) {
  const auto* nodes = may_be_ahead() ? Ahead::nodes_if_possible_in_hooks() : nullptr;
  if (nodes == nullptr) {
    return;
  }
  const auto end = EndOfGraphTask<Segment>::of(key);
  uint64_t bytes = Ahead::kMostBytes;
  const Segment* asked = this;
  c10::intrusive_ptr<Segment> next;
  const InterpreterHeld held;  // once for all of them
  for (int i = 0; i < Ahead::kMostSegments && nodes->count(asked->previous_.node) != 0; ++i) {
    auto previous = asked->previous_.lock();
    if (!previous || !previous->replay_before_asked(key, *end, &bytes)) {
      return;
    }
    next = std::move(previous);
    asked = next.get();
  }
}

bool Segment::replay_before_asked(const compat::ReplayKey& key, EndOfGraphTask<Segment>& end,
                                  uint64_t* bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!forward_done_ || live_ == 0 || bytes_of_replay_ > *bytes || find_replay(key) != nullptr ||
      !may_be_ahead()) {
    return false;
  }
  *bytes -= bytes_of_replay_;
  auto replay = c10::make_intrusive<Replay>(key, /*keep=*/false, std::nullopt);
  replay->is_ahead = true;
  replays_.push_back(replay);
  replay->start(*this, std::nullopt);
  run_replay(lock, replay);
  place_in_task_ = end.add(*this);
  return true;
}

void Segment::check_version(std::unique_lock<std::mutex>& lock, uint32_t index) {
  const Slot& slot = slots_[index];
  if (!slot.version.enabled()) {
    return;
  }
  const auto now = slot.version.current_version();
  if (now == slot.saved_version) {
    return;
  }
  const auto meta = TensorMeta::of(slot, sizes_);
  const auto where = slot.where;
  const auto then = slot.saved_version;
  lock.unlock();
  const std::string node = compat::current_node_name();
  throw_checkpoint_error(c10::str(
      "torch_reprise: a tensor that backward needs was modified by an inplace operation after it "
      "was saved in ",
      name(), ": position ", index, ", ", meta.describe(), ", saved at ", host().describe(where),
      node.empty() ? "" : ", needed by " + node, "; it was at version ", then,
      " and is at version ", now,
      ". The program without checkpointing stops here too: a gradient from the new value "
      "would be another one. Change a copy instead, or change it after backward."));
}

at::Tensor Segment::replay_one(std::unique_lock<std::mutex>& lock, uint32_t index) {
  auto replay = c10::make_intrusive<Replay>(compat::ReplayKey(), /*keep=*/false, std::nullopt);
  replay->start(*this, index);
  run_replay(lock, replay);
  return replay->take(index);
}

void end_group(PyObject* group) {
  Ledger::get().collect_replays([group](Segment& segment) {
    return segment.take_replays({.graph_task = -1, .group = group});
  });
}

void Segment::forget(const compat::ReplayKey& key) { take_replays(key); }

std::vector<c10::intrusive_ptr<Replay>> Segment::take_replays(const compat::ReplayKey& key) {
  std::vector<c10::intrusive_ptr<Replay>> taken;
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = replays_.size(); i-- > 0;) {
    if (!(replays_[i]->key() == key)) {
      continue;
    }
    if (replays_[i]->running) {
      replays_[i]->expired = true;  // on another thread; run_replay drops it
      continue;
    }
    taken.push_back(std::move(replays_[i]));
    replays_.erase(replays_.begin() + i);
    if (timeline()) {
      timeline()->end_backward();
    }
  }
  return taken;
}

namespace {

// Some replay that somebody waits for is over. One for all segments, for it is rare.
std::condition_variable_any& replay_done() {
  static auto* done = new std::condition_variable_any;
  static const bool is_new_in_children = [] {
    pthread_atfork(nullptr, nullptr, [] { done = new std::condition_variable_any; });
    return true;
  }();
  (void)is_new_in_children;
  return *done;
}

}  // namespace

void Segment::wait_for_replay(std::unique_lock<std::mutex>& lock, const Replay& replay) {
  // The interpreter lock must be given up before mutex_ is waited for, and taken
  // back after mutex_ is let go: the running replay needs both in turn.
  lock.unlock();
  {
    const InterpreterReleased released;
    const bool holds_lease = Lease::held_by_this_chain();
    std::unique_lock<std::mutex> waiting(mutex_);
    // Whoever holds the lease looks again now and then: the runner may have come
    // to wait for it meanwhile.
    ++waiting_;
    while (replay.running && !(holds_lease && Lease::is_waiting(replay.runner))) {
      if (holds_lease) {
        replay_done().wait_for(waiting, std::chrono::milliseconds(5));
      } else {
        replay_done().wait(waiting);
      }
    }
    --waiting_;
  }
  lock.lock();
}

void Segment::run_replay(std::unique_lock<std::mutex>& lock,
                         const c10::intrusive_ptr<Replay>& replay) {
  replay->running = true;
  replay->runner = std::this_thread::get_id();
  lock.unlock();
  Ledger::get().count_replay(row().get());
  std::exception_ptr error;
  try {
    const RowTimer timer(row(), &LedgerRow::replay_seconds);
    const Timeline::Span span(timeline().get(), Timeline::Kind::kReplay,
                              Timeline::Kind::kReplayEnd);
    replay->run(*this);
  } catch (...) {
    error = std::current_exception();
  }
  if (timeline() && !error && !replay->key().none()) {
    timeline()->begin_backward();
  }
  std::vector<c10::intrusive_ptr<Replay>> dropped;
  lock.lock();
  replay->running = false;
  if (error || replay->expired) {
    for (size_t i = replays_.size(); i-- > 0;) {
      if (replays_[i].get() == replay.get()) {
        dropped.push_back(std::move(replays_[i]));
        replays_.erase(replays_.begin() + i);
      }
    }
  }
  if (waiting_ > 0) {
    replay_done().notify_all();
  }
  if (error) {
    lock.unlock();
    dropped.clear();
    std::rethrow_exception(error);
  }
}

// ---------------------------------------------------------------------------
// Inputs
// ---------------------------------------------------------------------------

std::vector<at::Tensor> Segment::unpack_inputs() const {
  std::vector<at::Tensor> inputs;
  inputs.reserve(inputs_.size());
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const Input& input = inputs_[i];
    if (input.changed_inside) {
      throw_checkpoint_error(c10::str(
          "torch_reprise: ", name(), " changed ", program_->input_name(i),
          " in place: what backward needs was modified by an inplace operation, and the function "
          "cannot be called again with the value that it was given. Change a copy inside of it."));
    }
    if (input.same_as >= 0) {
      inputs.push_back(inputs[static_cast<size_t>(input.same_as)]);
      continue;
    }
    if (input.inference.defined()) {
      inputs.push_back(input.inference);
      continue;
    }
    if (checks_versions_ && input.version.enabled() &&
        input.version.current_version() != input.saved_version) {
      throw_checkpoint_error(
          c10::str("torch_reprise: ", program_->input_name(i), " of ", name(),
                   " was modified by an inplace operation after the forward: it was at version ",
                   input.saved_version, " and is at version ", input.version.current_version(),
                   ". The function cannot be called again with the value that it was given. "
                   "Change a copy instead, or change it after backward."));
    }
    at::Tensor value = input.saved.unpack();
    if (input.is_leaf && value.requires_grad() != input.requires_grad && value.is_leaf()) {
      value = value.detach().set_requires_grad(input.requires_grad);
    }
    inputs.push_back(std::move(value));
  }
  return inputs;
}

// ---------------------------------------------------------------------------
// The recorder of the forward
// ---------------------------------------------------------------------------

std::unique_ptr<ag::SavedVariableHooks> Segment::make_hooks() {
  return std::make_unique<SlotHooks>(c10::intrusive_ptr<Segment>::reclaim_copy(this));
}

int current_depth() {
  PyObject* top = compat::top_pack_hook();
  Recorder* recorder = top != nullptr ? host().recorder_of(top) : nullptr;
  return recorder != nullptr ? recorder->depth() + 1 : 0;
}

}  // namespace reprise
