// Where a set of generators stands at one moment. Immutable once made and shared by its
// copies: a run of segments that draw nothing holds one.
//
// Which generators: the default generator of the CPU and of every device of
// every accelerator that is initialised, wherever the tensors are, and the
// explicit ones that a segment's function can reach. A device that nobody has
// touched has no state worth keeping, and asking for it would initialise it; if
// the forward touches it first, RngStash::add_newcomers() tells what its state was.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "rng/generator_state.h"

namespace reprise {

// The default generators that exist now, CPU first.
using GeneratorList = c10::SmallVector<at::Generator, 2>;
GeneratorList default_generators();
// That of one device, if it is the CPU or a CUDA device that is there and initialised; else null.
const at::Generator* default_generator(c10::Device device);
void visit_default_generators(c10::function_ref<void(const at::Generator&)> visit);

// Tells whether an accelerator is initialised of those that torch initialises lazily: asking the
// driver would initialise it, and break a later fork. The bindings install torch's Python-level
// answer, which is asked once torch's core has initialised the type. Unset: the hooks interface is
// asked for a primary context then, as it always is for the others.
using InitialisedQuery = bool (*)(c10::DeviceType);
void set_initialised_query(InitialisedQuery query);

// The current device of the first accelerator that is initialised; none if none is.
std::optional<c10::Device> current_accelerator_device();

// "cpu", "cuda:3", "explicit cuda:3": how a generator is called in tables and
// messages.
std::string generator_name(const at::Generator& generator);

// A state cannot be restored, because it belongs to another stream capture than the
// one that the generator's device is in now. what(): which generator and states,
// and what to do.
class OutOfReach : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
std::string out_of_reach(const at::Generator& generator, const GeneratorState& state);
// Puts a generator back to `state`; throws OutOfReach. False if it stands there.
bool put_back(const at::Generator& generator, const GeneratorState& state,
              bool new_to_rnns = false);

// Runs actions, each whatever became of the others; rethrow() throws the last error.
class Attempts {
 public:
  template <typename Action>
  void operator()(const Action& action) {
    try {
      action();
    } catch (...) {
      error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) {
      std::rethrow_exception(error_);
    }
  }

 private:
  std::exception_ptr error_;
};

class RngSnapshot {
 public:
  using Generators = c10::ArrayRef<at::Generator>;
  struct Entry {
    at::Generator generator;  // strong
    GeneratorState state;     // where it was captured
  };
  // One entry inline: most programs have the CPU alone.
  using Entries = c10::SmallVector<Entry, 1>;

  // Holds nothing.
  RngSnapshot() = default;
  // The default generators, and `others` (explicit torch.Generator objects), as a segment or
  // a replay begins, of which most will not move: GeneratorState::glance(). Each once, however
  // often it is named.
  static RngSnapshot glance(Generators others = {});
  // The default generators, of which the CPU's is put to `to`, which is a state of it, in the same
  // breath.
  static RngSnapshot glance_and_rewind_cpu(const GeneratorState& to);
  // Only `generators`, each once.
  static RngSnapshot capture(Generators generators);

  // Puts back the generators that do not stand where they were captured, as somebody who asks for
  // numbers that can be drawn again (GeneratorState::apply: `new_to_rnns`), and returns them. An
  // error of one does not keep the others from being put back; the last one is thrown at the end,
  // OutOfReach if it is a stream capture.
  GeneratorList restore_moved() const;

  // `hint`: the place where it is nearly always, if it is there.
  std::optional<size_t> place_of(const at::Generator& generator, size_t hint) const {
    const Entries& all = entries();
    return hint < all.size() && all[hint].generator == generator ? hint : place_of(generator);
  }
  bool empty() const { return entries_ == nullptr; }
  size_t size() const { return entries().size(); }
  const Entries& entries() const { return entries_ ? *entries_ : none(); }
  // Bytes kept alive by states that are not in `seen` yet; adds them to it.
  size_t nbytes(std::unordered_set<const void*>& seen) const;
  std::vector<std::string> names() const;
  GeneratorList generators() const;
  const GeneratorState& state(size_t index) const { return entries()[index].state; }
  const at::Generator& generator(size_t index) const { return entries()[index].generator; }
  static RngSnapshot of(std::vector<std::pair<at::Generator, GeneratorState>> states);

 private:
  // Filled before it is shared; null: none.
  using NewEntries = std::shared_ptr<Entries>;
  explicit RngSnapshot(NewEntries entries) : entries_(std::move(entries)) {}
  static Entries& made(NewEntries& entries);
  static const Entries& none();
  // Adds where a generator stands now, unless it is there already.
  static void capture_one(NewEntries& entries, const at::Generator& generator);
  std::optional<size_t> place_of(const at::Generator& generator) const;
  // A glance at the default generators; the thread's last snapshot of them if they stand there
  // still.
  static const RngSnapshot& of_defaults(const GeneratorState* rewind_cpu_to);

  std::shared_ptr<Entries> entries_;  // null: none; changed by of_defaults() alone
};

}  // namespace reprise
