// The fingerprints of the tensors that a forward or a replay saves, one after the other.
//
// Some operators save a tensor first and fill it after (the noise of rrelu). Such a
// tensor requires no grad; it is looked at when the next operator saves something, or at
// the end.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "fingerprint/fingerprint.h"
#include "host.h"

namespace reprise {

// The fingerprint, for subclasses that of their parts. Takes the interpreter lock for these.
inline std::optional<uint64_t> fingerprint_or_parts(const at::Tensor& tensor) {
  auto value = fingerprint(tensor);
  if (!value.has_value() && tensor.defined() &&
      tensor.unsafeGetTensorImpl()->is_python_dispatch()) {
    value = host().fingerprint_of_parts(tensor);
  }
  return value;
}

class ValueNotes {
 public:
  struct Note {
    uint32_t position;
    std::optional<uint64_t> value;  // nothing: it has no values that could be read
  };

  // `node`: the newest autograd node. Returns what is known now. From any thread.
  std::vector<Note> add(uint32_t position, const at::Tensor& tensor, uint64_t node) {
    std::vector<Waiting> ready;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (node_ != node) {
        node_ = node;
        ready.swap(waiting_);
      }
      if (!tensor.requires_grad()) {
        waiting_.emplace_back(position, tensor);
      }
    }
    auto notes = look_at(ready);
    if (tensor.requires_grad()) {
      notes.push_back({position, fingerprint_or_parts(tensor)});
    }
    return notes;
  }

  // All that is left.
  std::vector<Note> finish() {
    std::vector<Waiting> ready;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ready.swap(waiting_);
    }
    return look_at(ready);
  }

  // Forgets what is left.
  void clear() {
    std::vector<Waiting> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(waiting_);
  }

 private:
  using Waiting = std::pair<uint32_t, at::Tensor>;

  static std::vector<Note> look_at(const std::vector<Waiting>& ready) {
    std::vector<Note> notes;
    for (const auto& [position, tensor] : ready) {
      notes.push_back({position, fingerprint_or_parts(tensor)});
    }
    return notes;
  }

  std::mutex mutex_;
  uint64_t node_ = 0;
  std::vector<Waiting> waiting_;  // strong, until the next operator
};

}  // namespace reprise
