// One call of checkpoint(fn, ...): what ran, its inputs, its slots, its stash.
//
// The life of a segment in the non-reentrant form:
//
//   begin          the inputs are saved, the ambient state and the generators noted
//   forward        fn runs while this segment is the recorder on torch's
//                  hook stack; each tensor that autograd saves becomes a slot, and
//                  the graph gets a SlotHooks object in the tensor's place
//   end_forward    only the generators that moved stay in the stash
//   unpack         backward asks a SlotHooks for its tensor: the first one in a
//                  graph task replays fn (replay.h), every one hands its tensor over
//   release        the graph drops a SlotHooks: its slot is dead, what a replay
//                  holds for it is freed
//
// In the reentrant form (reentrant.h) there are no slots: the forward runs
// without a graph and a node replays the segment inside backward.
//
// Who owns whom
//   graph -> SlotHooks -> Segment -> program, inputs, stash, ambient state
//   A segment never points to a node of its own graph, so a dropped graph frees
//   it by reference counting. What fn itself holds (a module that stores its
//   output, a closure over a loss) is the user's; a cycle through it is not seen
//   by Python's garbage collector, since the graph is not Python's.
//
// Locks
//   mutex_ guards the slots, their liveness and the replays. It is never held
//   while fn runs, while a tensor is destroyed (that may take the interpreter
//   lock), or while this thread waits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/util/SmallVector.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

#include "ambient/ambient_state.h"
#include "effects/reached_state.h"
#include "fingerprint/value_notes.h"
#include "host.h"
#include "pool.h"
#include "rng/rng_stash.h"
#include "rng/rnn_dropout.h"
#include "segment/end_of_graph_task.h"
#include "segment/recorder.h"
#include "segment/slot.h"
#include "torch_compat.h"

namespace reprise {

class Replay;
class Timeline;
struct LedgerRow;

// What a segment runs again: fn, its arguments other than tensors, the context
// of the replay. Implemented by the bindings; destroyed from any thread.
class Program {
 public:
  virtual ~Program() = default;

  // Calls fn with `inputs` in the places of the tensor arguments and drops what
  // it returns. `stopped` tells whether early stop was raised: whatever fn makes
  // of that exception (lets it through, swallows it, turns it into another) the
  // replay has what it came for. Throws what fn raises otherwise. With the
  // interpreter lock.
  enum class Outcome : uint8_t { kFinished, kStopped, kWentOnAfterStop };
  virtual Outcome run(std::vector<at::Tensor> inputs, const std::atomic<bool>& stopped) = 0;

  // The same to the end, without the interpreter lock; returns the tensors among the
  // outputs in order.
  virtual std::vector<at::Tensor> run_for_outputs(std::vector<at::Tensor> inputs) = 0;

  // "Block.forward" or the like, for messages and tables.
  virtual std::string name() const = 0;

  // How the user knows a tensor argument: "argument 1", "keyword argument 'mask'[0]".
  virtual std::string input_name(size_t index) const {
    return "tensor argument " + std::to_string(index);
  }

  // Where fn reaches a tensor that is no argument, for messages; "" if it does not.
  virtual std::string where_reached(const c10::TensorImpl*) const { return {}; }

  // The module of fn that is running on this thread, as "Block.mlp.fc1 (Linear)"; "" if
  // that is not known.
  virtual std::string running_module() const { return {}; }

  // More about a failed replay, to be put below the message; "" if nothing.
  virtual std::string explain_mismatch() const { return {}; }
};

// What a replay does about the ambient state of the forward.
enum class AmbientPolicy : uint8_t {
  kRestore,  // puts it in force
  kCheck,    // the same, but refuses to run if a setting was changed for good since
  kIgnore,   // runs with what is there
};

struct SegmentOptions {
  AmbientPolicy ambient = AmbientPolicy::kRestore;
  bool preserve_rng_state = true;
  bool early_stop = true;
  bool check_determinism = true;  // shapes, dtypes, devices
  bool check_values = false;      // bits, by fingerprints
  bool check_rng = true;          // where the replay leaves the generators
  bool check_versions = true;     // in-place changes of tensors that were saved
  bool may_be_ahead = true;       // there is nothing of the user's around a replay: ahead.h
};

class Segment final : public Recorder, public Pooled<Segment> {
 public:
  // `generators`: explicit ones that fn may draw from. `reached`: tensors that it
  // reaches by itself.
  // Saves the inputs (through the hooks that are in force outside the segment,
  // so that the user's hooks and an enclosing segment see them) and notes the
  // ambient state and the generators. `depth`: segments around this one.
  static c10::intrusive_ptr<Segment> begin(std::unique_ptr<Program> program,
                                           const std::vector<at::Tensor>& inputs,
                                           SegmentOptions options, int depth,
                                           RngSnapshot::Generators generators = {},
                                           c10::ArrayRef<Reached> reached = {});
  ~Segment() override;

  // Is this thread saving the inputs of a segment that begins? What follows is no operator.
  static bool is_saving_inputs() noexcept;

  // The forward is over and fn returned, `output` if that is one tensor. Not called when
  // fn raised. Throws CheckpointError if fn was the first to use a device whose
  // generator's state before that cannot be known.
  void end_forward(const at::Tensor* output = nullptr);

  // --- the recorder of its forward ---
  std::unique_ptr<torch::autograd::SavedVariableHooks> make_hooks() override;
  int depth() const override { return depth_; }
  bool is_replay() const override { return false; }
  void meet_rnn_state(const at::Tensor& buffer, RnnState& state) override;

  // --- called through SlotHooks, from any thread, without the interpreter lock ---
  uint32_t record(const at::Tensor& tensor);
  at::Tensor unpack(uint32_t index);
  void release(uint32_t index) noexcept;
  // One more will ask for the slot, and release it.
  void retain(uint32_t index);

  // The graph task is over: what was recomputed for it is dropped.
  void forget(const compat::ReplayKey& key);

  // --- the replay's side ---
  // The inputs as tensors again, version-checked; may replay an enclosing segment.
  std::vector<at::Tensor> unpack_inputs() const;
  // As far as it depends on the segment: see ahead.h.
  bool may_be_ahead() const;
  Program& program() { return *program_; }
  const RngStash& stash() const { return stash_; }
  // Null where it is ignored.
  const AmbientState* ambient() const { return ambient_.get(); }
  const ReachedState& reached() const { return reached_; }
  // The number on the forward's thread of the first autograd node that fn can make.
  uint64_t first_node() const { return first_node_; }
  const SegmentOptions& options() const { return options_; }
  const std::shared_ptr<LedgerRow>& row() const { return watched().row; }
  const std::shared_ptr<Timeline>& timeline() const { return watched().timeline; }
  const std::shared_ptr<Timeline>& holder() const { return watched().holder; }
  std::string name() const { return program_->name(); }

  // --- the ledger's side ---
  size_t live_slots() const;
  size_t stashed_bytes(std::unordered_set<const void*>& seen) const;

 private:
  friend class Replay;
  friend class Ledger;
  friend class c10::intrusive_ptr<Segment>;

  Segment() = default;
  // Frees all that is owned when the last strong reference goes, even while the
  // weak ones of graph tasks remain.
  void release_resources() override;
  void drop() noexcept;
  void begin_row();  // a recording is on

  // The segment whose one output is an input of another one.
  struct Previous {
    // Weak, so that a graph that is dropped frees it. A Segment, which is not complete here.
    c10::weak_intrusive_ptr<c10::intrusive_ptr_target> segment{
        c10::intrusive_ptr<c10::intrusive_ptr_target>()};
    torch::autograd::Node* node = nullptr;  // of that output; only compared
    uint64_t number = 0;                    // of that node: another one may get its address

    // The one that ended last on this thread with one output.
    static Previous& last_ended();
    c10::intrusive_ptr<Segment> lock() const;
  };
  void note_as_last_ended(const at::Tensor* output);
  // ahead.h: replays those before this one that the graph task of `key` will ask for next. Without
  // mutex_.
  void replay_ahead(const compat::ReplayKey& key);
  // Replays this one if that was not begun, and if what it recomputes has at most `*bytes`, which
  // it takes off. False if it did not.
  bool replay_before_asked(const compat::ReplayKey& key, EndOfGraphTask<Segment>& end,
                           uint64_t* bytes);

  // Waits for the replay that fills the slot or runs it. Without mutex_.
  at::Tensor replay_and_unpack(const compat::ReplayKey& key, uint32_t index);
  // The next three with mutex_ held through `lock`, which is let go while fn runs and
  // while this thread waits.
  void run_replay(std::unique_lock<std::mutex>& lock, const c10::intrusive_ptr<Replay>& replay);
  // Recomputes one slot; nothing is kept.
  at::Tensor replay_one(std::unique_lock<std::mutex>& lock, uint32_t index);
  // Until `replay`, which runs on another thread, is over.
  void wait_for_replay(std::unique_lock<std::mutex>& lock, const Replay& replay);
  void write_fingerprints(const std::vector<ValueNotes::Note>& notes);
  // Throws if the tensor of a slot was changed in place since it was saved: the
  // check that autograd makes where it keeps the tensor.
  void check_version(std::unique_lock<std::mutex>& lock, uint32_t index);
  void note_device(c10::Device device);
  // The line that made the autograd node with this number, the newest of this thread.
  // Without mutex_.
  SourceLocation where_is(uint64_t node);
  Replay* find_replay(const compat::ReplayKey& key) const;
  // What a finished replay holds for a slot; undefined if nothing.
  at::Tensor recomputed(const compat::ReplayKey& key, uint32_t index) const;
  // What was recomputed for `key`, taken out so that the caller can drop it
  // unlocked: the graph task or group is over.
  std::vector<c10::intrusive_ptr<Replay>> take_replays(const compat::ReplayKey& key);
  friend void end_group(PyObject* group);

  // Set in begin(), read-only after.
  std::unique_ptr<Program> program_;  // strong
  SegmentOptions options_;
  AmbientState::Ref ambient_;
  int depth_ = 0;
  // Begun inside of a replay: the same segment as one of the forward, and not
  // counted a second time.
  bool in_replay_ = false;
  // Versions are compared unless hooks of the user's keep the values: then
  // autograd does not compare either.
  bool checks_versions_ = true;

  // What is needed by those alone that somebody watches: apart, for of others there are many.
  struct Watched {
    // Shared with a recording; null when none is on.
    std::shared_ptr<LedgerRow> row;
    std::shared_ptr<Timeline> timeline;
    // Where it is noted what this segment keeps: its timeline, or, for one that began
    // inside of a replay, that of the segment which is replayed.
    std::shared_ptr<Timeline> holder;
    std::vector<const c10::StorageImpl*> held_inputs;  // noted there

    std::unique_ptr<ValueNotes> value_notes;  // used while the forward runs; null unless checked
    std::vector<std::optional<uint64_t>> fingerprints;  // by slot; guarded by mutex_
  };
  std::unique_ptr<Watched> watched_;  // null: nobody does
  static const Watched& by_nobody_;   // holds nothing
  const Watched& watched() const { return watched_ ? *watched_ : by_nobody_; }
  Watched& watch();  // begins to, if nobody does yet

  // Written at begin and end of the forward, read-only after. While the forward
  // runs it holds all generators, so that a backward inside fn can replay.
  RngStash stash_;

  // Written at begin and end of the forward, read-only after.
  ReachedState reached_;

  // The tensor arguments. Read-only after the forward: unpacking changes nothing.
  struct Input {
    torch::autograd::SavedVariable saved;
    at::Tensor inference;  // defined where SavedVariable refuses
    c10::VariableVersion version = c10::VariableVersion(c10::VariableVersion::DISABLED);
    uint32_t saved_version = 0;
    int64_t same_as = -1;  // the number of the first input that is the same tensor
    bool is_leaf = false;
    bool requires_grad = false;
    bool has_history = false;     // fn must not change it in place
    bool changed_inside = false;  // it did
  };
  c10::SmallVector<Input, 1> inputs_;
  // Storages of the inputs, only compared: what aliases an input is not "not saved".
  c10::SmallVector<const c10::StorageImpl*, 1> input_storages_;

  Previous previous_;        // written in begin(), read-only until it is dropped
  uint64_t unseen_ = 0;      // Ahead::unseen() when it began
  uint64_t first_node_ = 0;  // see first_node()

  // Of the thread that runs the forward, and used by it alone: the newest autograd
  // node when the last slot was recorded, by its number on this thread, and the line
  // that made it. The slots of one operator have one line.
  std::thread::id forward_thread_;
  uint64_t last_node_ = 0;
  SourceLocation last_where_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  // Of small segments without memory of their own, as most are where there are many.
  c10::SmallVector<Slot, 1> slots_;
  c10::SmallVector<int64_t, 4> sizes_;  // of all slots, see Slot::first_size
  uint32_t live_ = 0;
  uint32_t waiting_ = 0;  // threads in wait_for_replay()
  bool forward_done_ = false;
  std::unique_ptr<RnnStates> rnn_states_;     // that a replay needs; nearly always null
  c10::SmallVector<c10::Device, 2> devices_;  // of the inputs and slots, each once
  uint64_t bytes_not_saved_ = 0;
  uint64_t bytes_of_replay_ = 0;  // memory that a replay fills, at most; kUnknownBytes
  static constexpr uint64_t kUnknownBytes = uint64_t{1} << 40;
  c10::SmallVector<c10::intrusive_ptr<Replay>, 1> replays_;  // nearly always none or one

  // The ledger's list of live segments; guarded by the ledger's mutex.
  Segment* ledger_previous_ = nullptr;
  Segment* ledger_next_ = nullptr;

  EndOfGraphTask<Segment>::Place place_in_task_;  // guarded by mutex_
  bool dropped_ = false;  // by whoever drops the last reference; no lock needed
};

// The group is over: nothing recomputed in it is needed any more.
void end_group(PyObject* group);

// How many segments lie around code that runs now on this thread.
int current_depth();

}  // namespace reprise
