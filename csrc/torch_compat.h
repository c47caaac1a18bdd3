// The only door to private torch API.
//
// Everything here leans on something that torch does not promise to keep. Each
// shim says what it needs and with which torch versions it was tested (2.13.0
// CPU, 2.14.1 CUDA). tests/test_compat.py fails loudly when one of them stops
// doing what its comment says.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Generator.h>
#include <ATen/core/MT19937RNGEngine.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/SafePyObject.h>
#include <c10/util/python_stub.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/csrc/utils/torch_dispatch_mode.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "host.h"

namespace reprise::compat {

// ---------------------------------------------------------------------------
// Saved-tensor hooks without Python
//
// Note [Native hooks]
//
//   for _ in range(8): x = torch.tanh(x @ w)      # 24 saved tensors
//
// With Python hooks on torch's stack, SavedVariable takes the interpreter lock
// three times per saved tensor and wraps the tensor into a Python object, even
// when the hook is written in C. But SavedVariable asks
// Engine::get_default_engine().get_default_saved_variable_hooks() for its
// hooks, and that member is virtual. torch's Python layer installs itself by
// set_default_engine_stub(); so do we. Our engine delegates every virtual to
// the engine it found and answers this one with C++ hooks while the top of
// torch's hook stack is a pair of ours (see Host::recorder_of). User hooks that
// are pushed inside a segment are then on top and win, as they should; code
// that looks at the stack sees a real pair that also works when it is called
// (which is the fallback where somebody else's engine is installed later).
//
// The non-virtual members that others call on the default engine
// (queue_callback, is_checkpoint_valid) act on thread-local state in 2.13 and
// 2.14, so it does not matter which engine object they are called on.
// The engine object is never destroyed.
// ---------------------------------------------------------------------------
void install_native_hooks();             // idempotent; at import
void enable_native_hooks(bool enabled);  // off: the Python pair is used (tests)
bool native_hooks_installed();           // false if somebody else's engine is in force

// A pair on this thread's hook stack for a scope, which begins and ends with the
// interpreter lock. It is in force also where hooks are disabled:
// torch.autograd.graph.disable_saved_tensors_hooks around a backward must not stop a
// replay.
class HookScope {
 public:
  explicit HookScope(HookPair pair);
  ~HookScope();
  HookScope(const HookScope&) = delete;
  HookScope& operator=(const HookScope&) = delete;

 private:
  size_t depth_;
  // The whole outer state, where hooks were disabled: SavedVariable does not ask
  // for hooks then, so they are enabled inside.
  std::optional<at::impl::SavedTensorDefaultHooksTLS> outer_;
};

// The pack hook on top of this thread's stack, borrowed, or null. Null also
// when torch would not use it (tracing).
PyObject* top_pack_hook() noexcept;

// Why hooks may not be pushed now (the message given to
// disable_saved_tensors_hooks, or functorch's), or null.
const std::string* hooks_disabled_message();

// Is a tracer at work that makes a graph of what runs (the autograd of torch.compile, export)?
bool is_traced();

// The recorders on this thread's stack, from the innermost outward, until `visit` returns false.
void visit_recorders(c10::function_ref<bool(Recorder&)> visit);

// Are there saved-tensor hooks on this thread's stack that are not ours?
bool user_hooks_in_force();

// Takes all pairs off this thread's stack if every one of them stands for a recorder of
// ours, and puts them back. For functorch, which refuses to begin a transform while
// there are hooks: what is saved inside of it is saved as without checkpointing.
void hide_own_hooks();
void show_own_hooks();

// Will the graph of the running graph task be needed again? True outside of one.
bool graph_is_retained();

// Is a torch.func transform (grad, vmap, ...) active on this thread?
bool inside_functorch();

// The pair right below the one whose pack hook is `pack_hook`.
std::optional<HookPair> hook_pair_below(PyObject* pack_hook);

// ---------------------------------------------------------------------------
// Generators
// ---------------------------------------------------------------------------

// The state of a CPU generator's engine where it lies. CPUGeneratorImpl::engine()
// and mt19937::data() copy 2,504 bytes each, and a segment looks at the engine some
// ten times. The members are private in 2.13 and 2.14; a build against a torch
// that renamed them fails. The caller holds the generator's mutex.
at::mt19937_data_pod& mt19937_data(at::CPUGeneratorImpl& generator) noexcept;
// The same for what is left of its pairs of normal samples.
std::optional<double>& double_sample(at::CPUGeneratorImpl& generator) noexcept;
std::optional<float>& float_sample(at::CPUGeneratorImpl& generator) noexcept;

// Seed and offset of torch's own CUDA generator where they lie; nothing for any other
// class of generators. While no stream of its device is captured they are what its virtuals
// give and take; but each of these first asks the driver whether one is, a quarter of a
// microsecond, and a segment looks at the generators of all devices four times. The
// header of that class (2.13, 2.14) needs none of CUDA. The first object of it that is
// met is compared with what its virtuals say; they are used from then on if it differs.
// The caller holds the generator's mutex.
struct PhiloxFields {
  uint64_t& seed;
  uint64_t& offset;
  std::atomic_flag& keeps_rnn_state;  // see GeneratorState::keeps_rnn_state()
  bool drawn_in_capture;              // some capture has a count of its own for it
  // What the first two lie in; two generators may share one, and a generator may get another.
  c10::intrusive_ptr_target* owner;
};
std::optional<PhiloxFields> philox_fields(c10::GeneratorImpl& generator) noexcept;
// Does a generator that had `owner`, which the caller keeps alive, stand at (seed, offset), with
// that flag and nothing drawn in any capture? Without its mutex, for two reads: `owner` is alive,
// so that its fields can be read whenever it is still the generator's. Who draws meanwhile has done
// so before or after; who sets a seed meanwhile, in another thread, may be seen with the old
// offset. False where it has another owner by now.
bool at_philox(c10::GeneratorImpl& generator, const c10::intrusive_ptr_target& owner, uint64_t seed,
               uint64_t offset, bool keeps_rnn_state) noexcept;
void enable_philox_fields(bool enabled);  // off: the virtuals are used (tests)

// ---------------------------------------------------------------------------
// Graph tasks
// ---------------------------------------------------------------------------

// Which results belong together: one backward call, or one GraphExecGroup.
struct ReplayKey {
  int64_t graph_task = -1;    // -1: outside of any backward
  PyObject* group = nullptr;  // compared only; kept alive by GroupRef below
  bool none() const { return graph_task < 0 && group == nullptr; }
  bool is_group() const { return group != nullptr; }
  bool operator==(const ReplayKey&) const = default;
};
ReplayKey current_replay_key();

// A strong reference to the current GraphExecGroup, so that its address is not
// used again while results are filed under it.
std::optional<c10::SafePyObject> current_group();

// Runs `callback` at the end of the current backward call, and destroys it
// then also if that call failed. Must be called inside one.
void at_end_of_graph_task(std::function<void()> callback);

// A number that goes with this thread to whatever threads the backward calls begun on
// it run on; 0 if none is set. See lease.h.
uint64_t chain_token();
void set_chain_token(uint64_t token);
// The one of the chain that began the backward of the node which this thread runs; 0 if none did.
uint64_t carried_chain_token();

// Has the core of torch initialised devices of this type, of those that it initialises when
// they are first used? No driver is asked.
bool is_initialised_in_core(c10::DeviceType type);

// The nodes that the backward call of this thread executes, if that is all of its graph; null
// outside of one, and in one for some gradients.
const std::unordered_set<torch::autograd::Node*>* nodes_of_graph_task();
// Does a node run nothing but torch's own code in C++: no custom Function, no hooks, no tensor
// subclass? (A node of ours: `is_ours`.)
bool runs_no_user_code(torch::autograd::Node& node, bool is_ours = false);
// Is a node the history of a view, that has no memory of its own?
bool is_of_a_view(const torch::autograd::Node& node);
// Are there modes on this thread that see what is executed?
bool modes_are_active();

// The node this thread is executing, e.g. "MulBackward0", or "".
std::string current_node_name();

// Does the node that this thread is executing unpack each of its saved tensors
// once per call? True of the nodes that torch generates from its list of
// derivatives; the user's own may unpack as often as they like.
bool running_node_unpacks_once();

// Is `tensor` what the newest autograd node of this thread has computed? Nodes are
// numbered per thread (2.13, 2.14). A wrong answer costs time, nothing else.
bool is_output_of_newest_node(const at::Tensor& tensor);

// Does it require grad, and did it before this thread made the node of this number?
bool has_history_from_before(const at::Tensor& tensor, uint64_t number);

// How often it was changed in place; 0 of an inference tensor, which does not count.
uint32_t version_of(const at::Tensor& tensor);

// Is this backward call restricted to some inputs (autograd.grad, inputs=)?
bool graph_task_is_restricted();
// In a restricted backward call: is the gradient of what this node stands for, a leaf or another
// tensor, asked for or on the way to what is? Inside of a WantedLeaves scope that is asked of the
// call that the scope was made for.
bool graph_task_wants(torch::autograd::Node* node);

// What the current backward call, or the one that a scope speaks for, was asked for.
const void* wanted_leaves();
// Makes backward calls below this one on this thread speak for an outer one; null
// ends that.
class WantedLeaves {
 public:
  explicit WantedLeaves(const void* wanted);
  ~WantedLeaves();
  WantedLeaves(const WantedLeaves&) = delete;
  WantedLeaves& operator=(const WantedLeaves&) = delete;

 private:
  const void* outer_;
};

// A backward may be called in inference mode; a replay records a graph.
class NoInferenceMode {
 public:
  NoInferenceMode() {
    if (c10::InferenceMode::is_enabled()) {
      guard_.emplace(false);
    }
  }

 private:
  std::optional<c10::InferenceMode> guard_;
};

// torch.autograd.Function's way to give outputs their history.
std::vector<std::optional<at::Tensor>> wrap_outputs(
    const torch::autograd::variable_list& inputs,
    const std::vector<std::optional<at::Tensor>>& outputs,
    const c10::intrusive_ptr<torch::autograd::Node>& node);

// A tensor's values without its history: the tensor itself if it has none, be it
// a leaf or not. For plain tensors this skips the dispatcher (a tenth of the cost
// of at::Tensor::detach); everything that has behaviour of its own (subclasses,
// functorch wrappers, ...) takes the long way.
at::Tensor values_of(const at::Tensor& tensor);

// A dense tensor with a storage and without behaviour of its own.
bool is_plain(const at::Tensor& tensor);

// For looking at a tensor subclass: what its methods dispatch is no part of the user's program, and
// TorchDispatch modes must not see it.
class UnseenByModes {
 public:
  explicit UnseenByModes(const at::Tensor& tensor) {
    if (tensor.unsafeGetTensorImpl()->is_python_dispatch() &&
        c10::impl::TorchDispatchModeTLS::any_modes_set()) {
      modes_.emplace();
    }
  }

 private:
  std::optional<torch::torch_dispatch_mode::StashTorchDispatchStackGuard> modes_;
};

// A leaf that requires grad, or a view of one: a parameter, whose memory is there anyway.
bool shows_a_leaf(const at::Tensor& tensor);

}  // namespace reprise::compat
