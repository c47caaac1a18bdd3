// What a segment keeps of the random state: where the generators stood that its replay has to
// rewind, and where the forward left them. Immutable once made; copies share it.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Device.h>
#include <c10/util/SmallVector.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "pool.h"
#include "rng/generator_state.h"
#include "rng/rng_snapshot.h"

namespace reprise {

class RngStash {
 public:
  // Of one generator.
  struct Entry {
    at::Generator generator;  // strong
    GeneratorState state;     // where the forward began
    GeneratorMark end;        // where it ended
    bool moved;               // by the forward, as far as its end tells
  };
  struct View {
    const at::Generator& generator;
    const GeneratorState& state;
    const GeneratorMark* end;  // null: the forward is not over
    bool moved;
  };

  // Keeps nothing.
  RngStash() = default;
  // While the forward runs: all generators, so that a backward inside of fn can replay.
  explicit RngStash(RngSnapshot begin) : begin_(std::move(begin)) {}
  // The forward is over. Without the generators that it cannot have used: an
  // mt19937 engine that nobody touched, and other kinds that stand where they
  // stood and whose device no tensor of the segment was on (16 bytes each stay
  // for the others, as the ledger counts: once for all segments of a thread for which they are
  // the same). Notes where the rest stands now: a replay must end there.
  static RngStash needed_by_a_replay(const RngSnapshot& begin,
                                     const c10::SmallVectorImpl<c10::Device>& devices);
  // After that: adds generators that exist now and did not when the segment began. A Philox
  // generator began at offset 0 with the seed it has, be it there again; of others that
  // were drawn from nothing is known: their names are returned.
  std::vector<std::string> add_newcomers(const RngSnapshot& begin);

  const RngSnapshot& begin() const { return begin_; }  // while the forward runs

  bool empty() const { return size() == 0; }
  size_t size() const { return begin_.size() + size_of_own() + size_of(shared_); }
  View operator[](size_t index) const {
    if (!begin_.empty()) {
      const auto& entry = begin_.entries()[index];
      return {entry.generator, entry.state, nullptr, false};
    }
    const size_t of_own = size_of_own();
    const Entry& entry = index < of_own ? own_->entries[index] : (*shared_)[index - of_own];
    return {entry.generator, entry.state, &entry.end, entry.moved};
  }
  // Of the default generators that the forward moved: device, and clock at the beginning.
  using Clocks = c10::SmallVector<std::pair<c10::Device, DrawClock>, 1>;
  Clocks clocks() const;
  GeneratorList generators() const;
  // Those that did not stand where they were captured any more at the forward's end.
  std::vector<std::string> names_of_moved() const;
  // Bytes kept alive by states that are not in `seen` yet; adds them to it.
  size_t nbytes(std::unordered_set<const void*>& seen) const;

 private:
  // One inline: most programs have the CPU alone, most stashes one device.
  using Entries = c10::SmallVector<Entry, 1>;
  struct Own final : c10::intrusive_ptr_target, Pooled<Own> {
    Entries entries;
  };
  using Shared = std::shared_ptr<const Entries>;  // null: none
  static size_t size_of(const Shared& entries) { return entries ? entries->size() : 0; }
  size_t size_of_own() const { return own_ ? own_->entries.size() : 0; }

  RngSnapshot begin_;
  c10::intrusive_ptr<Own> own_;  // not changed once others have it; null: none
  Shared shared_;                // with other segments: generators that did not move
};

}  // namespace reprise
