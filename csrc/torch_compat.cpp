#include "torch_compat.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/SequenceNumber.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/core/AutogradState.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string_view>
#include <type_traits>
#include <typeinfo>
#include <unordered_set>

#include "open_member.h"
#include "segment/ahead.h"
#include "segment/recorder.h"

namespace reprise::compat {

namespace ag = torch::autograd;

namespace {

std::atomic<bool> g_native_hooks{true};

// Note [Chain token]
//
// Torch carries its map of thread-local Python objects to the threads of a backward, and
// nothing else that we could put there. Setting and erasing a key of it is a tenth of what a
// segment with dropout costs, so that the token of a thread's own chain is a variable, and
// goes into the map when a backward begins, which our engine is told.
//
// The variable comes first: a thread that waits for its inner backward may run nodes of another
// one meanwhile, with that one's map. What these take lies inside of what it holds. They may need
// what their own chain holds as well.
thread_local uint64_t t_chain = 0;

// An object in the map that is none of Python's.
struct ChainToken : c10::SafePyObject {
  explicit ChainToken(uint64_t number) : c10::SafePyObject(nullptr, nullptr), number(number) {}
  const uint64_t number;
};

const std::string& chain_key() {
  static const auto* key = new std::string("reprise.chain");  // short: no memory of its own
  return *key;
}

// Puts the token of this thread's chain into the map while a backward is begun from it.
class CarriedChain {
 public:
  CarriedChain() {
    if (t_chain != 0 && carried_chain_token() == 0) {
      at::impl::ThreadLocalPythonObjects::set(chain_key(), std::make_shared<ChainToken>(t_chain));
      is_set_ = true;
    }
  }
  ~CarriedChain() {
    if (is_set_) {
      at::impl::ThreadLocalPythonObjects::erase(chain_key());
    }
  }
  CarriedChain(const CarriedChain&) = delete;
  CarriedChain& operator=(const CarriedChain&) = delete;

 private:
  bool is_set_ = false;
};

// See Note [Native hooks].
class DelegatingEngine final : public ag::Engine {
 public:
  explicit DelegatingEngine(ag::Engine& inner) : inner_(inner) {}

  ag::variable_list execute(const ag::edge_list& roots, const ag::variable_list& inputs,
                            bool keep_graph, bool create_graph, bool accumulate_grad,
                            const ag::edge_list& outputs) override {
    const CarriedChain carried;
    return inner_.execute(roots, inputs, keep_graph, create_graph, accumulate_grad, outputs);
  }

  c10::intrusive_ptr<at::ivalue::Future> execute_with_graph_task(
      const std::shared_ptr<ag::GraphTask>& graph_task, c10::intrusive_ptr<ag::Node> graph_root,
      ag::InputBuffer&& input_buffer) override {
    return inner_.execute_with_graph_task(graph_task, std::move(graph_root),
                                          std::move(input_buffer));
  }

  std::unique_ptr<ag::AnomalyMetadata> make_anomaly_metadata() override {
    return inner_.make_anomaly_metadata();
  }

  std::unique_ptr<ag::SavedVariableHooks> get_default_saved_variable_hooks() override {
    PyObject* top = top_pack_hook();
    if (top != nullptr && g_native_hooks.load(std::memory_order_relaxed)) {
      if (Recorder* recorder = host().recorder_of(top)) {
        return recorder->make_hooks();
      }
    }
    auto hooks = inner_.get_default_saved_variable_hooks();
    if (hooks) {
      Ahead::note_unseen();
    }
    return hooks;
  }

  void thread_on_exception(const std::shared_ptr<ag::GraphTask>& graph_task,
                           const c10::intrusive_ptr<ag::Node>& fn, std::exception& e) override {
    inner_.thread_on_exception(graph_task, fn, e);
  }

  void thread_init(int device, const std::shared_ptr<ag::ReadyQueue>& ready_queue,
                   bool should_increment) override {
    inner_.thread_init(device, ready_queue, should_increment);
  }

 private:
  ag::Engine& inner_;  // torch's Python engine: a static object, re-made in place after a fork
};

DelegatingEngine* g_engine = nullptr;  // never destroyed: nodes outlive every order of teardown

ag::Engine& engine_stub() { return *g_engine; }

// std::stack keeps its container protected; a derived class may look.
using HookStack = decltype(at::impl::SavedTensorDefaultHooksTLS::stack);
struct OpenStack : HookStack {
  static const HookStack::container_type& container(const HookStack& stack) {
    return stack.*(&OpenStack::c);
  }
};

PyObject* raw(const c10::SafePyObject& object) { return object.ptr(&object.pyinterpreter()); }

}  // namespace

void install_native_hooks() {
  if (g_engine != nullptr) {
    return;
  }
  g_engine = new DelegatingEngine(ag::Engine::get_default_engine());
  ag::set_default_engine_stub(&engine_stub);
  // Without this call the first push after start-up is ignored by torch.
  at::SavedTensorDefaultHooks::lazy_initialize();
}

void enable_native_hooks(bool enabled) { g_native_hooks.store(enabled, std::memory_order_relaxed); }

bool native_hooks_installed() {
  return g_engine != nullptr && &ag::Engine::get_default_engine() == g_engine;
}

PyObject* top_pack_hook() noexcept {
  const auto& state = at::SavedTensorDefaultHooks::get_tls_state();
  if (state.stack.empty() || state.is_tracing) {
    return nullptr;
  }
  return raw(state.stack.top().first);
}

const std::string* hooks_disabled_message() {
  const auto& message = at::SavedTensorDefaultHooks::get_disabled_error_message();
  return message.has_value() ? &*message : nullptr;
}

HookScope::HookScope(HookPair pair) {
  const auto& state = at::SavedTensorDefaultHooks::get_tls_state();
  depth_ = state.stack.size();
  if (state.disabled_error_message.has_value()) {
    outer_ = state;
    at::SavedTensorDefaultHooks::enable();
  }
  at::SavedTensorDefaultHooks::push_hooks(std::move(pair.first), std::move(pair.second));
}

HookScope::~HookScope() {
  // Pairs that the function pushed and did not pop go with ours. The state is
  // set rather than popped: fn may have left hooks disabled.
  if (outer_.has_value()) {
    at::SavedTensorDefaultHooks::set_tls_state(*outer_);
    return;
  }
  const auto& state = at::SavedTensorDefaultHooks::get_tls_state();  // this thread's, in place
  while (state.stack.size() > depth_) {
    host().take_back(at::SavedTensorDefaultHooks::pop_hooks());
  }
}

bool is_traced() {
  using Modes = c10::impl::TorchDispatchModeTLS;
  using Key = c10::impl::TorchDispatchModeKey;
  return Modes::any_modes_set() &&
         (Modes::get_mode(Key::PROXY) || Modes::get_mode(Key::FUNCTIONAL));
}

void visit_recorders(c10::function_ref<bool(Recorder&)> visit) {
  const auto& pairs = OpenStack::container(at::SavedTensorDefaultHooks::get_tls_state().stack);
  for (size_t i = pairs.size(); i-- > 0;) {
    Recorder* recorder = host().recorder_of(raw(pairs[i].first));
    if (recorder != nullptr && !visit(*recorder)) {
      return;
    }
  }
}

bool user_hooks_in_force() {
  const auto& pairs = OpenStack::container(at::SavedTensorDefaultHooks::get_tls_state().stack);
  for (const auto& pair : pairs) {
    if (host().recorder_of(raw(pair.first)) == nullptr) {
      return true;
    }
  }
  return false;
}

namespace {
thread_local std::optional<at::impl::SavedTensorDefaultHooksTLS> t_hidden;
}  // namespace

void hide_own_hooks() {
  const auto& state = at::SavedTensorDefaultHooks::get_tls_state();
  if (t_hidden.has_value() || state.stack.empty() || user_hooks_in_force()) {
    return;
  }
  t_hidden = state;
  auto empty = state;
  empty.stack = {};
  at::SavedTensorDefaultHooks::set_tls_state(empty);
}

void show_own_hooks() {
  if (t_hidden.has_value()) {
    at::SavedTensorDefaultHooks::set_tls_state(*t_hidden);
    t_hidden.reset();
  }
}

bool graph_is_retained() {
  return ag::get_current_graph_task_id() == -1 || ag::get_current_graph_task_keep_graph();
}

bool inside_functorch() {
  // functorch includes this key while its stack of transforms is not empty. Its
  // own header would say so more directly, but needs a library torch does not ship.
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

std::optional<HookPair> hook_pair_below(PyObject* pack_hook) {
  const auto& pairs = OpenStack::container(at::SavedTensorDefaultHooks::get_tls_state().stack);
  for (size_t i = pairs.size(); i-- > 1;) {
    if (raw(pairs[i].first) == pack_hook) {
      return pairs[i - 1];
    }
  }
  return std::nullopt;
}

namespace {

REPRISE_OPEN_MEMBER(EngineOfGenerator, at::CPUGeneratorImpl, engine_, at::mt19937)
REPRISE_OPEN_MEMBER(DataOfEngine, at::mt19937, data_, at::mt19937_data_pod)
REPRISE_OPEN_MEMBER(DoubleOfGenerator, at::CPUGeneratorImpl, next_double_normal_sample_,
                    std::optional<double>)
REPRISE_OPEN_MEMBER(FloatOfGenerator, at::CPUGeneratorImpl, next_float_normal_sample_,
                    std::optional<float>)
REPRISE_OPEN_MEMBER(StateOfGenerator, at::CUDAGeneratorImpl, state_,
                    c10::intrusive_ptr<at::CUDAGeneratorState>)
REPRISE_OPEN_MEMBER(RnnFlagOfGenerator, at::CUDAGeneratorImpl, no_reset_rnn_state_,
                    std::atomic_flag)

}  // namespace

at::mt19937_data_pod& mt19937_data(at::CPUGeneratorImpl& generator) noexcept {
  return generator.*member_of(EngineOfGenerator()).*member_of(DataOfEngine());
}

std::optional<double>& double_sample(at::CPUGeneratorImpl& generator) noexcept {
  return generator.*member_of(DoubleOfGenerator());
}

std::optional<float>& float_sample(at::CPUGeneratorImpl& generator) noexcept {
  return generator.*member_of(FloatOfGenerator());
}

namespace {

PhiloxFields fields_of(at::CUDAGeneratorImpl& generator) {
  auto& state = *(generator.*member_of(StateOfGenerator()));
  return {state.seed_, state.philox_offset_per_thread_, generator.*member_of(RnnFlagOfGenerator()),
          !state.capture_states_.empty(), &state};
}

// Which class an object is of, as one word. The class's own type_info is not asked for
// it: it is in a library that only a CUDA build has.
const void* class_of(const c10::GeneratorImpl& generator) {
  const void* table = nullptr;
  std::memcpy(&table, &generator, sizeof(table));
  return table;
}

// The class whose fields are what its virtuals say, and the last one that was not opened.
std::atomic<const void*> g_opened{nullptr};
std::atomic<const void*> g_closed{nullptr};
std::atomic<bool> g_philox_fields{true};

[[gnu::noinline, gnu::cold]] bool opens(c10::GeneratorImpl& generator) noexcept {
  if (std::strcmp(typeid(generator).name(), "N2at17CUDAGeneratorImplE") == 0) {
    try {
      const PhiloxFields fields = fields_of(static_cast<at::CUDAGeneratorImpl&>(generator));
      if (generator.current_seed() == fields.seed && generator.get_offset() == fields.offset) {
        g_opened.store(class_of(generator), std::memory_order_relaxed);
        return true;
      }
    } catch (...) {  // refused, as while a stream is captured: another time
      return false;
    }
  }
  g_closed.store(class_of(generator), std::memory_order_relaxed);
  return false;
}

}  // namespace

std::optional<PhiloxFields> philox_fields(c10::GeneratorImpl& generator) noexcept {
  if (!g_philox_fields.load(std::memory_order_relaxed)) {
    return std::nullopt;
  }
  const void* type = class_of(generator);
  if (type != g_opened.load(std::memory_order_relaxed) &&
      (type == g_closed.load(std::memory_order_relaxed) || !opens(generator))) {
    return std::nullopt;
  }
  return fields_of(static_cast<at::CUDAGeneratorImpl&>(generator));
}

bool at_philox(c10::GeneratorImpl& generator, const c10::intrusive_ptr_target& owner, uint64_t seed,
               uint64_t offset, bool keeps_rnn_state) noexcept {
  auto& cuda = static_cast<at::CUDAGeneratorImpl&>(generator);
  const auto& now = cuda.*member_of(StateOfGenerator());
  static_assert(sizeof(now) == sizeof(void*));
  const auto read = [](const auto& field) { return __atomic_load_n(&field, __ATOMIC_RELAXED); };
  const auto& state = static_cast<const at::CUDAGeneratorState&>(owner);
  return read(reinterpret_cast<const at::CUDAGeneratorState* const&>(now)) == &state &&
         read(state.philox_offset_per_thread_) == offset && read(state.seed_) == seed &&
         (cuda.*member_of(RnnFlagOfGenerator())).test(std::memory_order_relaxed) ==
             keeps_rnn_state &&
         state.capture_states_.empty() && g_philox_fields.load(std::memory_order_relaxed);
}

void enable_philox_fields(bool enabled) {
  g_philox_fields.store(enabled, std::memory_order_relaxed);
}

ReplayKey current_replay_key() {
  const auto& group = c10::AutogradState::get_tls_state().get_graph_exec_group();
  if (group.has_value()) {
    return {.graph_task = -1, .group = raw(*group)};
  }
  return {.graph_task = ag::get_current_graph_task_id(), .group = nullptr};
}

std::optional<c10::SafePyObject> current_group() {
  return c10::AutogradState::get_tls_state().get_graph_exec_group();
}

void at_end_of_graph_task(std::function<void()> callback) {
  ag::Engine::get_default_engine().queue_callback(std::move(callback));
}

uint64_t chain_token() { return t_chain != 0 ? t_chain : carried_chain_token(); }

uint64_t carried_chain_token() {
  using at::impl::ThreadLocalPythonObjects;
  if (!ThreadLocalPythonObjects::contains(chain_key())) {  // get() would throw
    return 0;
  }
  return static_cast<const ChainToken&>(*ThreadLocalPythonObjects::get(chain_key())).number;
}

void set_chain_token(uint64_t token) { t_chain = token; }

namespace {
REPRISE_OPEN_MEMBER(InitialisedOfContext, at::Context, init_,
                    std::array<c10::once_flag, at::COMPILE_TIME_MAX_DEVICE_TYPES>)
}  // namespace

bool is_initialised_in_core(c10::DeviceType type) {
  static auto& flags = at::globalContext().*member_of(InitialisedOfContext());
  return flags[static_cast<size_t>(type)].test_once();
}

const std::unordered_set<ag::Node*>* nodes_of_graph_task() {
  return graph_task_is_restricted() ? nullptr : ag::get_current_graph_task_nodes_in_graph();
}

namespace {

bool has_hooks(ag::Node& node) {
  return !node.tensor_pre_hooks().empty() || !node.pre_hooks().empty() ||
         !node.post_hooks().empty() || node.tensor_post_acc_grad_hooks() != nullptr;
}

bool takes_subclasses(const ag::Node& node) {
  for (uint32_t i = 0; i < node.num_inputs(); ++i) {
    if (node.input_metadata(i).is_tensor_subclass()) {
      return true;
    }
  }
  return false;
}

// What is asked of the class of a node, from its name, and remembered: a graph has few of them.
struct NodeClass {
  const std::type_info* type = nullptr;
  bool is_torchs_own = false;  // autograd's in C++, of those that call no function of a user's
  bool is_generated = false;   // from torch's list of derivatives
  bool is_of_a_view = false;
};

NodeClass class_of(const std::type_info& type) {
  constexpr std::string_view kNamespace = "N5torch8autograd";
  constexpr std::string_view kGenerated = "N5torch8autograd9generated";
  constexpr std::string_view kViews[] = {
      "13ViewBackward0",           "10TBackward0",         "18TransposeBackward0",
      "15ExpandBackward0",         "16PermuteBackward0",   "21ReshapeAliasBackward0",
      "19UnsafeViewBackward0",     "15UnbindBackward0",    "14SplitBackward0",
      "23SplitWithSizesBackward0", "15SelectBackward0",    "14SliceBackward0",
      "16SqueezeBackward0",        "16SqueezeBackward1",   "18UnsqueezeBackward0",
      "14AliasBackward0",          "18AsStridedBackward0", "17DiagonalBackward0",
  };
  const auto begins_with = [](std::string_view name, std::string_view prefix) {
    return name.substr(0, prefix.size()) == prefix;
  };
  const std::string_view name = type.name();
  NodeClass found{.type = &type};
  if (begins_with(name, kNamespace)) {
    const auto rest = name.substr(kNamespace.size());
    found.is_torchs_own = !begins_with(rest, "6PyNode") && !begins_with(rest, "7CppNode");
  }
  found.is_generated = begins_with(name, kGenerated);
  if (found.is_generated) {
    const auto rest = name.substr(kGenerated.size());
    found.is_of_a_view = std::any_of(std::begin(kViews), std::end(kViews),
                                     [&](auto view) { return begins_with(rest, view); });
  }
  return found;
}

const NodeClass& class_of(const ag::Node& node) {
  thread_local std::array<NodeClass, 64> t_known{};
  const std::type_info& type = typeid(node);
  auto& known = t_known[(reinterpret_cast<uintptr_t>(&type) >> 4) % t_known.size()];
  if (known.type != &type) {
    known = class_of(type);
  }
  return known;
}

}  // namespace

bool runs_no_user_code(ag::Node& node, bool is_ours) {
  if (typeid(node) == typeid(ag::CopySlices)) {  // of a change of a view, by whatever did it
    const auto& change = static_cast<const ag::CopySlices&>(node).fn;
    if (change && !runs_no_user_code(*change)) {
      return false;
    }
  }
  return (is_ours || class_of(node).is_torchs_own) && !has_hooks(node) && !takes_subclasses(node);
}

bool is_of_a_view(const ag::Node& node) { return class_of(node).is_of_a_view; }

bool modes_are_active() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         at::impl::torch_function_mode_enabled();
}

std::string current_node_name() {
  auto node = ag::get_current_node();
  return node ? node->name() : std::string();
}

bool running_node_unpacks_once() {
  const auto node = ag::get_current_node();
  return node && class_of(*node).is_generated;
}

bool is_output_of_newest_node(const at::Tensor& tensor) {
  const auto* meta = ag::impl::get_autograd_meta(tensor);
  return meta != nullptr && meta->grad_fn_ &&
         meta->grad_fn_->sequence_nr() + 1 == at::sequence_number::peek();
}

bool has_history_from_before(const at::Tensor& tensor, uint64_t number) {
  // Not by requires_grad(): a view asks its base, and has a history from there on alone.
  const auto* meta = ag::impl::get_autograd_meta(tensor);
  if (meta == nullptr) {
    return false;
  }
  return meta->grad_fn_ ? meta->grad_fn_->sequence_nr() < number : meta->requires_grad_;
}

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0
                               : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

bool graph_task_is_restricted() {
  const auto* exec_info = ag::get_current_graph_task_exec_info();
  return exec_info != nullptr && !exec_info->empty();
}

namespace {
thread_local const void* t_wanted_leaves = nullptr;
using ExecInfo = std::remove_pointer_t<decltype(ag::get_current_graph_task_exec_info())>;
}  // namespace

const void* wanted_leaves() {
  return t_wanted_leaves != nullptr ? t_wanted_leaves : ag::get_current_graph_task_exec_info();
}

WantedLeaves::WantedLeaves(const void* wanted) : outer_(t_wanted_leaves) {
  t_wanted_leaves = wanted;
}

WantedLeaves::~WantedLeaves() { t_wanted_leaves = outer_; }

bool graph_task_wants(ag::Node* node) {
  const auto* exec_info = static_cast<const ExecInfo*>(wanted_leaves());
  if (exec_info == nullptr) {
    return false;
  }
  auto it = exec_info->find(node);
  return it != exec_info->end() && it->second.should_execute();
}

std::vector<std::optional<at::Tensor>> wrap_outputs(
    const ag::variable_list& inputs, const std::vector<std::optional<at::Tensor>>& outputs,
    const c10::intrusive_ptr<ag::Node>& node) {
  std::unordered_set<at::TensorImpl*> non_differentiable;
  for (const auto& output : outputs) {
    if (output.has_value() && !c10::isFloatingType(output->scalar_type()) &&
        !c10::isComplexType(output->scalar_type())) {
      non_differentiable.insert(output->unsafeGetTensorImpl());
    }
  }
  ag::_jvp_fn_t no_forward_mode = [](const ag::variable_list&,
                                     const ag::variable_list&) -> ag::variable_list {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "torch_reprise.checkpoint with use_reentrant=True has no forward-mode derivative: ",
        "pass use_reentrant=False");
  };
  auto alias = [](const at::Tensor& self) { return self.view_as(self); };
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
  c10::intrusive_ptr<ag::Node> attached;  // always `node`: no input is marked dirty
  return ag::_wrap_outputs(inputs, non_differentiable, /*dirty_inputs=*/{}, outputs, node,
                           no_forward_mode, /*to_save_if_setup_context=*/{}, alias,
                           /*pure_view=*/false, attached);
#else
  return ag::_wrap_outputs(inputs, non_differentiable, /*dirty_inputs=*/{}, outputs, node,
                           no_forward_mode, /*to_save_if_setup_context=*/{}, alias,
                           /*pure_view=*/false);
#endif
}

bool is_plain(const at::Tensor& tensor) {
  // Keys whose presence means that a detach, or a tensor made by hand, would be noticed.
  constexpr c10::DispatchKeySet watched = c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
       c10::DispatchKey::NestedTensor, c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
       c10::DispatchKey::ZeroTensor});
  auto* impl = tensor.unsafeGetTensorImpl();
  return impl->layout() == at::kStrided && impl->has_storage() &&
         !impl->key_set().has_any(watched) && !impl->has_symbolic_sizes_strides();
}

bool shows_a_leaf(const at::Tensor& tensor) {
  const auto* meta = ag::impl::get_autograd_meta(tensor);
  if (meta == nullptr) {
    return false;
  }
  if (!meta->grad_fn_) {
    return meta->requires_grad_;
  }
  const auto* view = ag::impl::get_view_autograd_meta(tensor);
  if (view == nullptr || !view->has_bw_view()) {
    return false;
  }
  const at::Tensor& base = view->get_backward_view().base_;
  return base.requires_grad() && base.is_leaf();
}

at::Tensor values_of(const at::Tensor& tensor) {
  if (!tensor.requires_grad()) {
    return tensor;
  }
  if (!is_plain(tensor)) {
    return tensor.detach();
  }
  if (tensor.is_leaf()) {
    return tensor;
  }
  // Like detach(), which shares the version counter too.
  return at::Tensor(tensor.unsafeGetTensorImpl()->shallow_copy_and_detach(
      ag::impl::version_counter(tensor), /*allow_tensor_metadata_change=*/true));
}

}  // namespace reprise::compat
