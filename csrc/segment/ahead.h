// Replaying a segment before backward asks for it.
//
//   for block in blocks:
//       x = checkpoint(block, x)
//
// A forward in the middle of a backward runs with cold caches: a small block takes half as
// long again as in a loop of forwards, which is more than all bookkeeping. So where
// backward asks for a segment, those that it will ask for next are replayed as well, one
// after the other, as long as what they recompute is small. Nothing of the program can tell:
//
//   - The next one is the segment whose output this one took. This backward call executes
//     all of its graph, and the node of that output is in it.
//   - Nothing of the user's runs between such a replay and where it would have been: no
//     hooks, no custom Functions, no modes, no tensor subclasses, no segments inside of
//     segments. (A hook could load what the next replay needs, or stop the backward.) In the
//     reentrant form, whose inner graphs are made by the replays, these are looked at as well.
//     Hooks of saved tensors cannot be seen in a graph: none were made since the next segment
//     began.
//   - All is on the CPU, where one thread runs a backward and there are no streams, and there
//     are no other processes that wait for what a replay does.
//   - Nobody looks: segments that are recorded are shown as they are asked for.
//
// Only one segment's tensors at a time are in memory otherwise. Here it is a mebibyte more.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <atomic>
#include <cstdint>
#include <unordered_set>

namespace reprise {

class Ahead {
 public:
  // Something was put into some graph that will run code of the user's and that is not seen there.
  static void note_unseen() { unseen_.fetch_add(1, std::memory_order_relaxed); }
  // How often that was.
  static uint64_t unseen() { return unseen_.load(std::memory_order_relaxed); }

  // Of all that is recomputed before it is asked for, and how many segments that may be.
  static constexpr uint64_t kMostBytes = 1 << 20;
  static constexpr int kMostSegments = 15;

  // In the backward call that this thread works for: the nodes that it executes if segments with
  // hooks may be replayed ahead; else null. Looks at every node of it the first time.
  static const std::unordered_set<torch::autograd::Node*>* nodes_if_possible_in_hooks();
  // For segments in the reentrant form: will `next` be the first node of that form that is
  // executed after `node`?
  static bool is_possible_in_nodes(const torch::autograd::Node& node,
                                   const torch::autograd::Node& next);

 private:
  static inline std::atomic<uint64_t> unseen_{0};
};

}  // namespace reprise
