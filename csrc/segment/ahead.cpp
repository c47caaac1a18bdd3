#include "segment/ahead.h"

#include <algorithm>
#include <optional>
#include <typeinfo>
#include <vector>

#include "host.h"
#include "per_thread.h"
#include "segment/reentrant.h"
#include "torch_compat.h"

namespace reprise {

namespace ag = torch::autograd;

namespace {

// What is known of a backward call.
struct GraphTask {
  int64_t id = -1;
  bool runs_no_user_code = false;
  bool has_one_thread = true;            // of the reentrant nodes
  std::vector<uint64_t> reentrant = {};  // their numbers, by which the engine goes

  // The one that this thread works for.
  static const GraphTask& current() {
    GraphTask& last = per_thread<GraphTask>();
    const int64_t id = compat::current_replay_key().graph_task;
    if (last.id != id) {
      last = GraphTask{.id = id};
      last.look();
    }
    return last;
  }

 private:
  void look() {
    std::optional<uint64_t> thread;
    const auto* nodes = id >= 0 ? compat::nodes_of_graph_task() : nullptr;
    runs_no_user_code = nodes != nullptr && !compat::modes_are_active() &&
                        !host().is_distributed() &&
                        std::all_of(nodes->begin(), nodes->end(), [&](ag::Node* node) {
                          const bool is_ours = typeid(*node) == typeid(ReentrantNode);
                          if (is_ours) {
                            reentrant.push_back(node->sequence_nr());
                            has_one_thread = has_one_thread && thread.value_or(node->thread_id()) ==
                                                                   node->thread_id();
                            thread = node->thread_id();
                          }
                          return compat::runs_no_user_code(*node, is_ours);
                        });
  }
};

}  // namespace

const std::unordered_set<ag::Node*>* Ahead::nodes_if_possible_in_hooks() {
  const GraphTask& task = GraphTask::current();
  // The inner graphs of reentrant nodes may run anything.
  return task.runs_no_user_code && task.reentrant.empty() ? compat::nodes_of_graph_task() : nullptr;
}

bool Ahead::is_possible_in_nodes(const ag::Node& node, const ag::Node& next) {
  const GraphTask& task = GraphTask::current();
  // Of nodes that were made by one thread the newest one that is ready is executed first.
  return task.runs_no_user_code && task.has_one_thread &&
         std::none_of(task.reentrant.begin(), task.reentrant.end(), [&](uint64_t number) {
           return next.sequence_nr() < number && number < node.sequence_nr();
         });
}

}  // namespace reprise
