// What happened to one segment of a recording, and when. Filled by the segment and
// its replays, from any thread; read by whoever recorded. A segment that nobody
// records has no timeline, and pays for the question whether it has.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <chrono>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace reprise {

class Timeline {
 public:
  enum class Kind : uint8_t {
    kForward,
    kForwardEnd,
    kReplay,
    kReplayEnd,
    kBackward,     // what was replayed is being used
    kBackwardEnd,  // the last saved tensor is gone, or the graph task is over
    kHold,         // the segment keeps a storage
    kDrop,         // and does not any more
    kSave,         // autograd would have kept a tensor: it became a slot
    kFree,         // the slot is gone
  };
  struct Event {
    int64_t ns;  // of the steady clock
    Kind kind;
    uint64_t thread;  // as profilers number threads
    uint64_t bytes;
    uintptr_t storage;  // which, while somebody keeps it; only compared
  };

  // For a scope that is to be noted at both ends; `timeline` may be null.
  class Span {
   public:
    Span(Timeline* timeline, Kind begin, Kind end) : timeline_(timeline), end_(end) {
      if (timeline_ != nullptr) {
        timeline_->note(begin);
      }
    }
    ~Span() {
      if (timeline_ != nullptr) {
        timeline_->note(end_);
      }
    }
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;

   private:
    Timeline* timeline_;
    Kind end_;
  };

  void note(Kind kind, uint64_t bytes = 0, uintptr_t storage = 0);
  // kBackward once, however many replays feed it, and its end once.
  void begin_backward();
  void end_backward();
  // A tensor that is kept from now on, and not any more. Those without a storage of
  // one block count nothing; neither do parameters, which are there anyway: then false,
  // and it must not be dropped.
  bool hold(const at::Tensor& tensor);
  void drop(const c10::StorageImpl* storage);
  // The next slot stands for this tensor. A storage counts once, however many slots show it.
  void save(const at::Tensor& tensor);
  void free(uint32_t slot);

  std::vector<Event> events() const;

 private:
  void note_locked(Kind kind, uint64_t bytes, uintptr_t storage);
  static uint64_t bytes_of(const c10::StorageImpl& storage);

  mutable std::mutex mutex_;  // taken last: nothing is called while it is held
  std::vector<Event> events_;
  bool in_backward_ = false;
  // Storages that are kept: how often, and their size.
  std::unordered_map<uintptr_t, std::pair<uint32_t, uint64_t>> held_;
  // What autograd would have kept, in the same way. Weak: the memory is free, but the
  // address is not given to another storage meanwhile.
  struct Saved {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    uint32_t count;
    uint64_t bytes;
  };
  std::unordered_map<uintptr_t, Saved> saved_;
  std::vector<uintptr_t> slots_;  // the storage of each, or 0
};

}  // namespace reprise
