#include "segment/reentrant.h"

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <optional>
#include <typeinfo>
#include <unordered_set>

#include "segment/ahead.h"
#include "segment/end_of_graph_task.h"
#include "segment/ledger.h"
#include "segment/replay_scope.h"
#include "segment/timeline.h"

namespace reprise {

namespace ag = torch::autograd;

namespace {

// Where the inner graph ends: in the place of the history of an input. Takes the
// gradient as it is. A leaf would do too, but its accumulator brings gradients
// into the memory layout of the leaf, and whoever sums over them next rounds in
// another order than the plain program.
struct GradientSink final : ag::Node, Pooled<GradientSink> {
  ag::variable_list apply(ag::variable_list&& grads) override {
    gradient = std::move(grads[0]);
    return {};
  }
  std::string name() const override { return "RepriseInput"; }
  at::Tensor gradient;
};

// What fn reached by itself, a leaf or the history of another tensor, and whose gradient this
// backward call was asked for or needs. The node has no edge to it.
const ag::Node* find_wanted(const ag::edge_list& roots, const ag::edge_list& known) {
  std::unordered_set<const ag::Node*> seen;
  for (const auto& edge : known) {
    seen.insert(edge.function.get());
  }
  std::vector<ag::Node*> open;
  for (const auto& root : roots) {
    open.push_back(root.function.get());
  }
  while (!open.empty()) {
    ag::Node* node = open.back();
    open.pop_back();
    if (node == nullptr || !seen.insert(node).second) {
      continue;
    }
    if (compat::graph_task_wants(node)) {
      return node;
    }
    for (const auto& edge : node->next_edges()) {
      open.push_back(edge.function.get());
    }
  }
  return nullptr;
}

}  // namespace

ReentrantNode::ReentrantNode(c10::intrusive_ptr<Segment> segment,
                             const std::vector<at::Tensor>& inputs,
                             const std::vector<std::optional<at::Tensor>>& outputs)
    : segment_(std::move(segment)) {
  needs_grad_.reserve(inputs.size());
  for (const auto& input : inputs) {
    needs_grad_.push_back(input.requires_grad());
  }
  set_next_edges(ag::collect_next_edges(inputs));
  for (const auto& leaf : segment_->reached().leaves()) {
    leaves_.push_back(ag::impl::grad_accumulator(leaf));
  }
  if (segment_->options().check_values) {
    for (const auto& output : outputs) {
      output_values_.push_back(output.has_value() ? fingerprint_or_parts(*output) : std::nullopt);
    }
  }
}

void ReentrantNode::release_variables() {
  c10::intrusive_ptr<Segment> dropped;  // destroyed after the lock is let go
  std::lock_guard<std::mutex> lock(mutex_);
  dropped = std::move(segment_);
}

void ReentrantNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const {
  throw_checkpoint_error(
      c10::str("torch_reprise: ", segment_ ? segment_->name() : "a function",
               " was checkpointed with use_reentrant=True, and its backward runs under compiled "
               "autograd, which cannot take a backward inside of a backward. Pass "
               "use_reentrant=False."));
}

struct ReentrantNode::InnerGraph final : Pooled<InnerGraph> {
  // One for each input that needs a gradient, and the edges to them.
  std::vector<c10::intrusive_ptr<GradientSink>> sinks;
  ag::edge_list input_edges;
  std::vector<at::Tensor> outputs;
};

ReentrantNode::~ReentrantNode() = default;

c10::intrusive_ptr<Segment> ReentrantNode::segment() {
  std::lock_guard<std::mutex> lock(mutex_);
  return segment_;
}

ag::variable_list ReentrantNode::apply(ag::variable_list&& grads) {
  const auto segment = this->segment();
  TORCH_CHECK(segment, ag::ERR_BACKWARD_TWICE);
  if (c10::GradMode::is_enabled()) {
    throw_checkpoint_error(
        c10::str("torch_reprise: ", segment->name(),
                 " was checkpointed with use_reentrant=True and is now differentiated with "
                 "create_graph=True. The reentrant form has no graph to differentiate again: pass "
                 "use_reentrant=False."));
  }
  auto inner = take_ahead(ag::get_current_graph_task_id());
  if (!inner) {
    inner = replay(*segment);
    replay_ahead(*segment, *inner);
  }
  return backward(*segment, *inner, std::move(grads));
}

// --- ahead.h

namespace {

// Does the backward of these outputs run nothing of the user's and stay on the CPU? Takes what the
// graph keeps off `*bytes`, false if that is not enough. Which tensors a node keeps is not known;
// taken for them is what all nodes have computed.
bool is_small_and_plain(const std::vector<at::Tensor>& outputs, uint64_t* bytes) {
  constexpr size_t kMostNodes = 256;      // each is looked for among all
  c10::SmallVector<ag::Node*, 64> nodes;  // each once; one more than the most: there are too many
  const auto add = [&](ag::Node* node) {
    if (node != nullptr && nodes.size() <= kMostNodes &&
        std::find(nodes.begin(), nodes.end(), node) == nodes.end()) {
      nodes.push_back(node);
    }
  };
  for (const auto& output : outputs) {
    if (output.requires_grad()) {
      add(ag::impl::gradient_edge(output).function.get());
    }
  }
  for (size_t next = 0; next < nodes.size(); ++next) {
    ag::Node& node = *nodes[next];
    const bool is_sink = typeid(node) == typeid(GradientSink);
    if (nodes.size() > kMostNodes || !compat::runs_no_user_code(node, is_sink)) {
      return false;
    }
    if (is_sink || node.next_edges().empty()) {
      continue;  // what it stands for is in memory anyway
    }
    for (uint32_t i = 0; i < node.num_inputs(); ++i) {
      const auto& result = node.input_metadata(i);
      if (!result.device().is_cpu() || result.is_nested_tensor() ||
          result.layout() != at::kStrided) {
        return false;
      }
      if (compat::is_of_a_view(node)) {
        break;
      }
      uint64_t size = result.dtype().itemsize();
      for (const auto& length : result.shape_as_dim_vector()) {
        size *= static_cast<uint64_t>(length.guard_int(__FILE__, __LINE__));
      }
      if (size > *bytes) {
        return false;
      }
      *bytes -= size;
    }
    for (const auto& edge : node.next_edges()) {
      add(edge.function.get());
    }
  }
  return true;
}

}  // namespace

// What was not asked for: the backward call has failed.
void ReentrantNode::forget(const compat::ReplayKey& key) { take_ahead(key.graph_task); }

c10::intrusive_ptr<ag::Node> ReentrantNode::next_node() const {
  for (const auto& edge : next_edges()) {
    if (edge.function && typeid(*edge.function) == typeid(ReentrantNode) &&
        Ahead::is_possible_in_nodes(*this, *edge.function)) {
      return edge.function;
    }
  }
  return {};
}

void ReentrantNode::replay_ahead(Segment& segment, const InnerGraph& inner) {
  auto next = segment.may_be_ahead() ? next_node() : nullptr;
  if (!next) {
    return;
  }
  const compat::ReplayKey key = compat::current_replay_key();
  uint64_t bytes = Ahead::kMostBytes;
  const InnerGraph* last = &inner;
  const InterpreterHeld held;  // once for all of them
  for (int i = 0; i < Ahead::kMostSegments && next; ++i) {
    auto& node = static_cast<ReentrantNode&>(*next);
    const auto its_segment = node.segment();
    if (!its_segment || !its_segment->may_be_ahead() ||
        !is_small_and_plain(last->outputs, &bytes)) {
      return;
    }
    EndOfGraphTask<ReentrantNode>::of(key)->add(node);
    auto made = node.replay(*its_segment);
    last = made.get();
    {
      std::lock_guard<std::mutex> lock(node.mutex_);
      node.ahead_.emplace_back(key.graph_task, std::move(made));
    }
    next = node.next_node();
  }
}

std::unique_ptr<ReentrantNode::InnerGraph> ReentrantNode::take_ahead(int64_t graph_task) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto made = std::find_if(ahead_.begin(), ahead_.end(),
                                 [&](const auto& ahead) { return ahead.first == graph_task; });
  if (made == ahead_.end()) {
    return nullptr;
  }
  auto taken = std::move(made->second);
  ahead_.erase(made);
  return taken;
}

// ---

std::unique_ptr<ReentrantNode::InnerGraph> ReentrantNode::replay(Segment& segment) const {
  Ledger::get().count_replay(segment.row().get());
  std::optional<RowTimer> timer(std::in_place, segment.row(), &LedgerRow::replay_seconds);
  Timeline* const timeline = segment.timeline().get();
  std::optional<Timeline::Span> span(std::in_place, timeline, Timeline::Kind::kReplay,
                                     Timeline::Kind::kReplayEnd);
  std::vector<at::Tensor> inputs = segment.unpack_inputs();
  auto inner = std::make_unique<InnerGraph>();
  for (size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = inputs[i].detach();
    if (needs_grad_[i]) {
      auto sink = c10::make_intrusive<GradientSink>();
      ag::set_history(inputs[i], sink);
      inner->input_edges.push_back(ag::impl::gradient_edge(inputs[i]));
      inner->sinks.push_back(std::move(sink));
    }
  }
  std::string rng_differs;
  {
    ReplayScope scope(segment, /*inside_fn=*/false);
    inner->outputs = segment.program().run_for_outputs(std::move(inputs));
    rng_differs = scope.check_generators(/*stopped_early=*/false);
  }
  timer.reset();
  span.reset();
  if (!rng_differs.empty()) {
    throw_checkpoint_error("torch_reprise: " + rng_differs);
  }
  if (inner->outputs.size() != num_inputs()) {
    throw_checkpoint_error(c10::str(
        "torch_reprise: the replay of ", segment.name(), " returned ", inner->outputs.size(),
        " output tensors where its forward returned ", num_inputs(), "."));
  }
  for (size_t i = 0; i < output_values_.size(); ++i) {
    const auto now =
        output_values_[i].has_value() ? fingerprint_or_parts(inner->outputs[i]) : std::nullopt;
    if (now.has_value() && now != output_values_[i]) {
      throw_checkpoint_error(
          c10::str("torch_reprise: the replay of ", segment.name(),
                   " computes other values than its forward did (determinism_check=\"bitwise\"): "
                   "output ",
                   i, ", ", TensorMeta::of(inner->outputs[i]).describe(),
                   ". use_reentrant=False compares every saved tensor and names the line."));
    }
  }
  return inner;
}

ag::variable_list ReentrantNode::backward(Segment& segment, InnerGraph& inner,
                                          ag::variable_list&& grads) const {
  std::vector<at::Tensor>& outputs = inner.outputs;
  ag::edge_list roots;
  ag::variable_list root_grads;
  bool any_output_has_history = false;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (ag::impl::grad_fn_unsafe(outputs[i]) == this) {
      throw_checkpoint_error(c10::str(
          "torch_reprise: ", segment.name(), " returns, as output ", i,
          ", a tensor that was there before it was called and that is not among its arguments. "
          "With use_reentrant=True what is returned comes out of the segment, so that the replay "
          "found itself in that tensor's history: return a copy of it, or pass "
          "use_reentrant=False."));
    }
    any_output_has_history |= outputs[i].requires_grad();
    if (outputs[i].requires_grad() && grads[i].defined()) {
      if (outputs[i].sym_sizes() != grads[i].sym_sizes()) {
        throw_checkpoint_error(
            c10::str("torch_reprise: the replay of ", segment.name(),
                     " returned a tensor of shape ", outputs[i].sym_sizes(), " as output ", i,
                     " where its forward returned one of shape ", grads[i].sym_sizes(), "."));
      }
      roots.push_back(ag::impl::gradient_edge(outputs[i]));
      root_grads.push_back(grads[i]);
    }
  }
  if (!any_output_has_history) {
    throw_checkpoint_error(c10::str(
        "torch_reprise: no output of ", segment.name(),
        " requires grad when it is replayed, though backward asks for its gradient. Everything "
        "it returns is detached or was computed under no_grad; call it without checkpoint."));
  }
  const Timeline::Span span(segment.timeline().get(), Timeline::Kind::kBackward,
                            Timeline::Kind::kBackwardEnd);
  ag::variable_list input_grads;
  if (!roots.empty()) {
    outputs.clear();
    ag::Engine& engine = ag::Engine::get_default_engine();
    if (compat::graph_task_is_restricted()) {
      if (find_wanted(roots, inner.input_edges) != nullptr) {
        throw_checkpoint_error(c10::str(
            "torch_reprise: this backward call (autograd.grad, or backward with inputs=) asks for "
            "the gradient of a tensor, or of one that it was computed from, that ",
            segment.name(),
            " reaches by itself and that is not among its arguments. With use_reentrant=True only "
            "arguments have an edge in the graph: pass the tensor as an argument, or pass "
            "use_reentrant=False."));
      }
      // The inner call is restricted to the sinks; nodes of this kind inside of it
      // must know what the outer one was asked for.
      const compat::WantedLeaves outer_call(compat::wanted_leaves());
      input_grads =
          engine.execute(roots, root_grads, /*keep_graph=*/false,
                         /*create_graph=*/false, /*accumulate_grad=*/false, inner.input_edges);
    } else {
      engine.execute(roots, root_grads, /*keep_graph=*/false, /*create_graph=*/false,
                     /*accumulate_grad=*/true);
      for (const auto& sink : inner.sinks) {
        input_grads.push_back(std::move(sink->gradient));
      }
    }
  } else {
    input_grads.resize(inner.input_edges.size());
  }
  ag::variable_list result(needs_grad_.size());
  for (size_t i = 0, next = 0; i < result.size(); ++i) {
    if (needs_grad_[i]) {
      result[i] = std::move(input_grads[next++]);
    }
  }
  return result;
}

std::vector<std::optional<at::Tensor>> join_graph(
    c10::intrusive_ptr<Segment> segment, const std::vector<at::Tensor>& inputs,
    const std::vector<std::optional<at::Tensor>>& outputs) {
  auto node = c10::make_intrusive<ReentrantNode>(std::move(segment), inputs, outputs);
  return compat::wrap_outputs(inputs, outputs, node);
}

}  // namespace reprise
