#include "segment/ahead.h"

#include <torch/csrc/autograd/anomaly_mode.h>

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
  std::vector<uint64_t> reentrant = {};  // numbers of nodes of that form, in order

  // The one that this thread works for.
  static const GraphTask& current() {
    GraphTask& last = per_thread<GraphTask>();
    const int64_t id = compat::current_replay_key().graph_task;
    if (last.id != id) {
      last = GraphTask();
      last.id = id;
      last.look();
    }
    return last;
  }

 private:
  void look() {
    const auto* nodes = id >= 0 ? compat::nodes_of_graph_task() : nullptr;
    if (nodes == nullptr || compat::modes_are_active() || ag::AnomalyMode::is_enabled() ||
        !compat::native_hooks_installed() || host().is_distributed()) {
      return;
    }
    // The root is not among them; if it is over, so are its hooks.
    const auto running = ag::get_current_node();
    runs_no_user_code = running && is_plain(*running) &&
                        std::all_of(nodes->begin(), nodes->end(), [this](ag::Node* node) {
                          return is_plain(*node) && is_of_one_thread(*node);
                        });
    std::sort(reentrant.begin(), reentrant.end());
  }

  bool is_plain(ag::Node& node) {
    const bool is_ours = typeid(node) == typeid(ReentrantNode);
    if (is_ours) {
      reentrant.push_back(node.sequence_nr());
    }
    return compat::runs_no_user_code(node, is_ours);
  }

  // Of nodes that one thread has made the newest one that is ready is executed first. (Leaves are
  // met by whoever comes first.)
  bool is_of_one_thread(const ag::Node& node) {
    if (node.next_edges().empty()) {
      return true;
    }
    thread_ = thread_.value_or(node.thread_id());
    return *thread_ == node.thread_id();
  }

  std::optional<uint64_t> thread_ = std::nullopt;
};

}  // namespace

const std::unordered_set<ag::Node*>* Ahead::nodes_if_possible_in_hooks() {
  const GraphTask& task = GraphTask::current();
  // The inner graphs of reentrant nodes may run anything.
  return task.runs_no_user_code && task.reentrant.empty() ? compat::nodes_of_graph_task() : nullptr;
}

bool Ahead::is_possible_in_nodes(const ag::Node& node, const ag::Node& next) {
  const GraphTask& task = GraphTask::current();
  const auto& numbers = task.reentrant;
  const auto newer = std::upper_bound(numbers.begin(), numbers.end(), next.sequence_nr());
  return task.runs_no_user_code && (newer == numbers.end() || *newer >= node.sequence_nr());
}

}  // namespace reprise
