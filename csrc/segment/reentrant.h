// The reentrant form: the forward runs without a graph, and one node of the
// outer graph replays the segment and runs its backward inside its own.
//
//     outer graph:   loss <- ... <- ReentrantNode <- ... <- x
//     in backward:   ReentrantNode::apply runs fn on tensors that stand for the
//                    inputs, then a backward over that inner graph
//
// It needs no saved-tensor hooks and keeps no graph between forward and
// backward, so it is the cheaper form. What it cannot do follows from the node's
// edges, which are the tensor arguments (positional, keyword and nested ones)
// and nothing else:
//
//   backward()                 parameters that fn reaches by itself get their
//                              gradients from the inner backward, as in torch
//   autograd.grad, inputs=     gradients for the tensor arguments; asking for a
//                              leaf that only fn reaches is an error that says so
//   create_graph=True          higher derivatives need a graph that joins the
//                              outer one; an error that says so
//
// An output that gets no gradient takes no part in the inner backward (torch
// feeds zeros, which is not the same bits where an infinity or a NaN meets them).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "pool.h"
#include "segment/segment.h"

namespace reprise {

class ReentrantNode final : public torch::autograd::Node, public Pooled<ReentrantNode> {
 public:
  // `inputs` in the order in which the program takes them.
  ReentrantNode(c10::intrusive_ptr<Segment> segment, const std::vector<at::Tensor>& inputs,
                const std::vector<std::optional<at::Tensor>>& outputs);
  ~ReentrantNode() override;

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void release_variables() override;
  // Compiled autograd makes a graph of nodes; this one is none that it could.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  std::string name() const override { return "RepriseCheckpointBackward"; }
  // The graph task is over: what was replayed for it is dropped.
  void forget(const compat::ReplayKey& key);

 private:
  // What a replay has made, whose backward is to be run.
  struct InnerGraph;
  std::unique_ptr<InnerGraph> replay(Segment& segment) const;
  torch::autograd::variable_list backward(Segment& segment, InnerGraph& inner,
                                          torch::autograd::variable_list&& grads) const;
  c10::intrusive_ptr<Segment> segment();

  // The node of the segment whose output is an input of this one's, if this backward call will
  // execute it before any other of this kind; else null. See ahead.h.
  c10::intrusive_ptr<torch::autograd::Node> next_node() const;
  // Replays the segments of the nodes that come after this one, whose replay made `inner`.
  void replay_ahead(Segment& segment, const InnerGraph& inner);
  // What was replayed ahead for a graph task, if anything was.
  std::unique_ptr<InnerGraph> take_ahead(int64_t graph_task);

  c10::intrusive_ptr<Segment> segment_;    // strong; null once the graph was freed
  c10::SmallVector<bool, 16> needs_grad_;  // by input
  // Accumulators of leaves that fn reaches, kept as edges would keep them: a backward call that is
  // asked for one knows it by that.
  std::vector<decltype(torch::autograd::impl::grad_accumulator(std::declval<at::Tensor>()))>
      leaves_;
  // By output, if values are checked; nothing where there are none that could be read.
  std::vector<std::optional<uint64_t>> output_values_;
  // Made before they were asked for, by graph task; several threads may use one graph. Guarded by
  // mutex_.
  std::vector<std::pair<int64_t, std::unique_ptr<InnerGraph>>> ahead_;
};

// Gives the outputs of a forward that ran without a graph their history.
std::vector<std::optional<at::Tensor>> join_graph(
    c10::intrusive_ptr<Segment> segment, const std::vector<at::Tensor>& inputs,
    const std::vector<std::optional<at::Tensor>>& outputs);

}  // namespace reprise
