// Where a set of generators stands at one moment.
//
// Which generators: the default generator of the CPU and of every device of
// every accelerator that is initialised, wherever the tensors are. A device
// that nobody has touched has no state worth keeping, and asking for it would
// initialise it.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/util/SmallVector.h>

#include <functional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "rng/generator_state.h"

namespace reprise {

// The default generators that exist now, CPU first.
c10::SmallVector<at::Generator, 2> default_generators();

// Tells whether an accelerator is initialised; the core cannot know for CUDA
// without a CUDA header (its own query would initialise the driver), so the
// bindings install torch's Python-level answer. Unset: the hooks interface is
// asked for a primary context.
using InitialisedQuery = std::function<bool(c10::DeviceType)>;
void set_initialised_query(InitialisedQuery query);
// What the hooks interface says: for backends that have no flag of their own.
bool accelerator_has_context(c10::DeviceType type);

// "cpu", "cuda:3": how a default generator is called in tables and messages.
std::string generator_name(const at::Generator& generator);

class RngSnapshot {
 public:
  static RngSnapshot capture_defaults();

  // Leaves out the generators that still stand where they were captured.
  void keep_only_moved();
  // Puts back the generators that do not stand where they were captured.
  void restore_moved();
  // Puts every generator where it was captured.
  void apply();

  bool empty() const { return entries_.empty(); }
  size_t size() const { return entries_.size(); }
  void clear() { entries_.clear(); }
  // Bytes kept alive by states that are not in `seen` yet; adds them to it.
  size_t nbytes(std::unordered_set<const void*>& seen) const;
  std::vector<std::string> names() const;

 private:
  struct Entry {
    at::Generator generator;  // strong
    GeneratorState state;
  };
  // One entry inline: most programs have the CPU alone, most stashes one device.
  c10::SmallVector<Entry, 1> entries_;
};

}  // namespace reprise
