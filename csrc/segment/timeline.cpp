#include "segment/timeline.h"

#include <ATen/record_function.h>

#include "torch_compat.h"

namespace reprise {

void Timeline::note_locked(Kind kind, uint64_t bytes, uintptr_t storage) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  events_.push_back({std::chrono::duration_cast<std::chrono::nanoseconds>(now).count(), kind,
                     at::RecordFunction::currentThreadId(), bytes, storage});
}

uint64_t Timeline::bytes_of(const c10::StorageImpl& storage) {
  const auto bytes = storage.sym_nbytes().maybe_as_int();
  return bytes.has_value() ? static_cast<uint64_t>(*bytes) : 0;
}

void Timeline::note(Kind kind, uint64_t bytes, uintptr_t storage) {
  const std::lock_guard<std::mutex> lock(mutex_);
  note_locked(kind, bytes, storage);
}

void Timeline::begin_backward() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!in_backward_) {
    in_backward_ = true;
    note_locked(Kind::kBackward, 0, 0);
  }
}

void Timeline::end_backward() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (in_backward_) {
    in_backward_ = false;
    note_locked(Kind::kBackwardEnd, 0, 0);
  }
}

bool Timeline::hold(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.has_storage() || compat::shows_a_leaf(tensor)) {
    return false;
  }
  const auto* storage = tensor.storage().unsafeGetStorageImpl();
  const auto key = reinterpret_cast<uintptr_t>(storage);
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& [count, bytes] = held_[key];
  if (++count == 1) {
    bytes = bytes_of(*storage);
    note_locked(Kind::kHold, bytes, key);
  }
  return true;
}

void Timeline::drop(const c10::StorageImpl* storage) {
  const auto key = reinterpret_cast<uintptr_t>(storage);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = held_.find(key);
  if (found != held_.end() && --found->second.first == 0) {
    note_locked(Kind::kDrop, found->second.second, key);
    held_.erase(found);
  }
}

void Timeline::save(const at::Tensor& tensor) {
  const bool counts = tensor.has_storage() && !compat::shows_a_leaf(tensor);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!counts) {
    slots_.push_back(0);
    return;
  }
  const auto& storage = tensor.storage();
  const auto key = reinterpret_cast<uintptr_t>(storage.unsafeGetStorageImpl());
  slots_.push_back(key);
  const auto [entry, is_new] = saved_.try_emplace(
      key, Saved{c10::weak_intrusive_ptr<c10::StorageImpl>(storage.getWeakStorageImpl()), 0,
                 bytes_of(*storage.unsafeGetStorageImpl())});
  ++entry->second.count;
  if (is_new) {
    note_locked(Kind::kSave, entry->second.bytes, key);
  }
}

void Timeline::free(uint32_t slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = slot < slots_.size() ? saved_.find(slots_[slot]) : saved_.end();
  if (found != saved_.end() && --found->second.count == 0) {
    note_locked(Kind::kFree, found->second.bytes, found->first);
    saved_.erase(found);
  }
}

std::vector<Timeline::Event> Timeline::events() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return events_;
}

}  // namespace reprise
