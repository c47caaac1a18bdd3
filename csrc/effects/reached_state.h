// Tensors that fn reaches without being given them: the buffers and parameters of
// modules, tensors in a closure, in attributes, in globals.
//
//   begin      the version of each is noted, and what fn may change is copied
//   end        copies of what was not changed are dropped
//   replay     what was changed holds, for as long as fn runs again, the values that the
//              forward began with; after it, it holds again what it held before, and its
//              version counter stands where it stood. So a BatchNorm's statistics are
//              counted once, and a replay does not see later values. What required grad in
//              the forward does so in the replay, and nothing else.
//
// Note [What fn may change]
//
// A version counter tells of most changes, but not of all: batch_norm updates its
// running statistics without a word. So storages of the CPU up to kSmall bytes are
// copied at every begin and compared at the end, which takes less than a microsecond.
// Comparing on a device would wait for it, and copies of large storages (masks,
// codebooks) cost too much; those are copied until a forward in training, and one in
// evaluation, is seen to leave them alone. Those that are copied on the CPU are compared
// as well. Where one is changed later for the first time, what it was is lost; a replay then
// refuses to run and names it. Running statistics on a device are always copied, in
// training.
//
// Note [Exchanging]
//
// The values in the storage are exchanged, not the tensor in its module: every view and
// alias sees the old ones, and nobody's object changes its identity. On the CPU the bytes
// themselves: another thread may be in the middle of an operator that has a pointer to
// them (the same module without a checkpoint), and memory that it reads or writes must
// not be freed. On a device the memory is exchanged, which costs one copy instead of
// three; its allocator gives nothing back to the system.
//
// Replays that exchange the same storage take turns (lease.h). Threads outside of any
// replay see the old values while one runs, and what they write then is lost.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "lease.h"

namespace reprise {

// One tensor that fn reaches.
struct Reached {
  const at::Tensor* tensor;  // valid while the search's interpreter lock is held
  enum class Role : uint8_t {
    kFixed,    // fn does not change it (a parameter): never copied
    kScaled,   // the same, but an embedding with max_norm may change it before it reads it: a
               // replay finds it changed, and must not do it again
    kState,    // fn may change it
    kRunning,  // running statistics: changed in training, without a word
  } role;
  bool checked;       // fn uses it for certain: it must not be changed before the replay
  bool training;      // of the module that it belongs to; true where there is none
  bool may_be_large;  // copied also when large: a buffer of a module
};

class ReachedState {
 public:
  static constexpr size_t kSmall = 64 * 1024;
  // So many bytes of small ones at every begin; what comes after that is copied as large ones are.
  static constexpr size_t kMostSmall = 4 * 1024 * 1024;

  // Before the forward.
  void note(c10::ArrayRef<Reached> reached);
  // After the forward.
  void settle();

  // The tensor that was changed in place since the forward, or whose values at its
  // beginning are lost; null if there is none. Only to be compared: it may be gone.
  struct Problem {
    const c10::TensorImpl* tensor = nullptr;
    bool lost = false;
    bool by_fn = false;  // changed in the forward already
    uint32_t then = 0;
    uint32_t now = 0;
  };
  // Begins at `*from` and advances it: to look at all of them one after the other. None
  // while the forward runs.
  Problem first_problem(size_t* from) const;

  // Was it there before the forward, and is it as it was by its version?
  bool has_left_alone(const c10::TensorImpl* tensor) const;

  // Those that require grad and have no history, as far as they are still there.
  std::vector<at::Tensor> leaves() const;

  // Bytes of the copies.
  size_t nbytes() const;

 private:
  friend class StateScope;
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Noted {
    WeakTensor tensor;
    c10::VariableVersion version;  // shared with it
    uint32_t saved_version;        // when the forward began; after it, when it ended
    uint32_t begin_version;
    bool checked;
    bool requires_grad;
    bool changed_by_fn = false;
    bool is_scaled = false;
    int32_t storage = -1;  // into storages_; -1: only its version is noted
  };
  struct Kept {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    c10::Storage begin;  // a copy; empty: none was taken, or it is not needed
    bool training;
    bool running;
    bool is_learned;  // whether fn changes it
    bool changed = false;
    bool lost = false;
  };
  c10::SmallVector<Noted, 2> noted_;  // a layer's weight and bias
  c10::SmallVector<Kept, 0> storages_;
  bool settled_ = false;  // until then (a replay during the forward) anything may have changed
  bool changes_ = false;
};

// Gives what a forward changed the values that it began with, and leaves the requires_grad that
// they had, for a scope.
class StateScope {
 public:
  explicit StateScope(const ReachedState& state);
  ~StateScope();
  StateScope(const StateScope&) = delete;
  StateScope& operator=(const StateScope&) = delete;

 private:
  // `other`: what the forward began with, then what was there before the replay.
  struct Exchanged {
    c10::intrusive_ptr<c10::StorageImpl> storage;
    c10::Storage other;
  };
  struct Version {
    c10::VariableVersion version;
    uint32_t value;
  };
  std::optional<Lease> lease_;  // given back last
  std::vector<Exchanged> exchanged_;
  std::vector<Version> versions_;
  std::vector<std::pair<at::Tensor, bool>> flipped_;  // leaves, and whether they require grad now
};

}  // namespace reprise
