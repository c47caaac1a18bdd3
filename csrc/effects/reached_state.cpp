#include "effects/reached_state.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pthread.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "torch_compat.h"

namespace reprise {

namespace {

// What is known of storages that are copied only if they were changed before.
class KnownStorages {
 public:
  static KnownStorages& get() {
    static auto* known = [] {
      // Not while another thread holds the lock: that thread is not in the child.
      pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                     [] { get().mutex_.unlock(); });
      return new KnownStorages;
    }();
    return *known;
  }

  // Must the storage be copied? True until a forward is known to have left it alone.
  bool may_change(const c10::intrusive_ptr<c10::StorageImpl>& storage, bool training) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto [it, fresh] = known_.try_emplace(storage.get(), storage);
    if (fresh && known_.size() > next_tidying_) {
      tidy();
    }
    const Entry& entry = it->second;
    return entry.changes || !(training ? entry.kept_in_training : entry.kept_in_evaluation);
  }

  // What a forward has done to it. Of those alone that it was asked of.
  void learn(const c10::StorageImpl* storage, bool training, bool changed) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = known_.find(storage);
    if (it == known_.end()) {
      return;
    }
    Entry& entry = it->second;
    (changed ? entry.changes : training ? entry.kept_in_training : entry.kept_in_evaluation) = true;
  }

 private:
  struct Entry {
    explicit Entry(const c10::intrusive_ptr<c10::StorageImpl>& storage) : weak(storage) {}
    c10::weak_intrusive_ptr<c10::StorageImpl> weak;
    bool kept_in_training = false;
    bool kept_in_evaluation = false;
    bool changes = false;
  };

  // Forgets storages that are gone.
  void tidy() {
    for (auto it = known_.begin(); it != known_.end();) {
      it = it->second.weak.expired() ? known_.erase(it) : std::next(it);
    }
    next_tidying_ = 2 * known_.size() + 1024;
  }

  std::mutex mutex_;
  std::unordered_map<const c10::StorageImpl*, Entry> known_;
  size_t next_tidying_ = 1024;
};

// A storage of its own with the same bytes.
c10::Storage copy_of(const c10::Storage& storage) {
  if (storage.device_type() == c10::kCPU) {
    c10::Storage copy(c10::Storage::use_byte_size_t(), storage.nbytes(),
                      c10::GetAllocator(c10::kCPU), /*resizable=*/true);
    if (storage.nbytes() > 0) {
      std::memcpy(copy.mutable_data(), storage.data(), storage.nbytes());
    }
    return copy;
  }
  // The device's own copy, seen by nobody: no graph, no mode, no autocast.
  const at::AutoDispatchBelowAutograd no_graph;
  const c10::impl::ExcludeDispatchKeyGuard unseen(
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}) |
      c10::autocast_dispatch_keyset);
  const auto bytes = at::empty({0}, at::TensorOptions(at::kByte).device(storage.device()))
                         .set_(storage, 0, {static_cast<int64_t>(storage.nbytes())}, {1});
  return bytes.clone().storage();
}

bool same_bytes(const c10::Storage& a, const c10::StorageImpl& b) {
  return a.nbytes() == b.nbytes() &&
         (a.nbytes() == 0 || std::memcmp(a.data(), b.data(), a.nbytes()) == 0);
}

}  // namespace

void ReachedState::note(c10::ArrayRef<Reached> reached) {
  noted_.reserve(reached.size());
  size_t small = 0;  // bytes
  for (const auto& [tensor_pointer, role, checked, training, may_be_large] : reached) {
    const at::Tensor& tensor = *tensor_pointer;
    if (!tensor.defined() || tensor.is_inference()) {
      continue;
    }
    Noted& noted = noted_.emplace_back(Noted{WeakTensor(tensor.getIntrusivePtr()),
                                             torch::autograd::impl::version_counter(tensor), 0, 0,
                                             checked, tensor.requires_grad()});
    noted.saved_version = noted.version.current_version();
    noted.begin_version = noted.saved_version;
    noted.is_scaled = role == Reached::Role::kScaled;
    // On the meta device, or a FakeTensor, there are no values.
    if (role != Reached::Role::kFixed && tensor.has_storage() &&
        tensor.storage().device_type() == c10::kMeta) {
      noted.checked = false;
      continue;
    }
    if (role == Reached::Role::kFixed || noted.is_scaled || !compat::is_plain(tensor)) {
      continue;
    }
    const c10::Storage& storage = tensor.storage();
    c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
    for (size_t i = 0; i < storages_.size() && noted.storage < 0; ++i) {
      if (storages_[i].storage._unsafe_get_target() == impl) {
        noted.storage = static_cast<int32_t>(i);
      }
    }
    if (noted.storage >= 0) {
      continue;
    }
    noted.storage = static_cast<int32_t>(storages_.size());
    const bool running = role == Reached::Role::kRunning && training;
    const auto held = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(impl);
    const bool is_small = impl->nbytes() <= kSmall;
    bool copy = running;
    bool is_learned = false;
    if (!copy && is_small && impl->device_type() == c10::kCPU && small < kMostSmall) {
      copy = true;
      small += impl->nbytes();
    } else if (!copy && (is_small || may_be_large)) {
      is_learned = true;
      copy = KnownStorages::get().may_change(held, training);
    }
    storages_.emplace_back(Kept{c10::weak_intrusive_ptr<c10::StorageImpl>(held),
                                copy ? copy_of(storage) : c10::Storage(), training, running,
                                is_learned});
  }
}

void ReachedState::settle() {
  settled_ = true;
  for (auto& noted : noted_) {
    const auto now = noted.version.current_version();
    if (noted.storage >= 0 && now != noted.saved_version) {
      storages_[static_cast<size_t>(noted.storage)].changed = true;
    }
    // Scaled twice, the first reading of it is lost.
    const bool is_scaled_once = noted.is_scaled && now == noted.begin_version + 1;
    if (noted.storage >= 0 || is_scaled_once) {
      noted.saved_version = now;
    } else {
      noted.changed_by_fn = now != noted.saved_version;
    }
  }
  for (auto& kept : storages_) {
    if (kept.running) {
      kept.changed = true;
    }
    const bool on_cpu = kept.begin && kept.begin.device_type() == c10::kCPU;
    if (!kept.changed && on_cpu) {  // .data and batch_norm change no version
      const auto storage = kept.storage.lock();
      kept.changed = storage && !same_bytes(kept.begin, *storage);
    }
    if (kept.is_learned && (kept.changed || kept.begin)) {
      KnownStorages::get().learn(kept.storage._unsafe_get_target(), kept.training, kept.changed);
    }
    if (!kept.changed) {
      kept.begin = c10::Storage();
      continue;
    }
    kept.lost = !kept.begin;
    changes_ = true;
  }
}

ReachedState::Problem ReachedState::first_problem(size_t* from) const {
  while (settled_ && *from < noted_.size()) {
    const Noted& noted = noted_[(*from)++];
    if (noted.storage >= 0 && storages_[static_cast<size_t>(noted.storage)].changed) {
      if (storages_[static_cast<size_t>(noted.storage)].lost) {
        return {noted.tensor._unsafe_get_target(), true, false, 0, 0};
      }
      continue;  // whatever happens to it later, a replay has what it needs
    }
    const auto now = noted.version.current_version();
    if (noted.checked && now != noted.saved_version) {
      return {noted.tensor._unsafe_get_target(), false, noted.changed_by_fn, noted.saved_version,
              now};
    }
  }
  return {};
}

bool ReachedState::has_left_alone(const c10::TensorImpl* tensor) const {
  return std::any_of(noted_.begin(), noted_.end(), [tensor](const Noted& noted) {
    return noted.tensor._unsafe_get_target() == tensor &&
           noted.version.current_version() == noted.begin_version;
  });
}

std::vector<at::Tensor> ReachedState::leaves() const {
  std::vector<at::Tensor> found;
  for (const Noted& noted : noted_) {
    if (noted.requires_grad) {
      at::Tensor tensor(noted.tensor.lock());
      if (tensor.defined() && tensor.is_leaf()) {
        found.push_back(std::move(tensor));
      }
    }
  }
  return found;
}

size_t ReachedState::nbytes() const {
  size_t bytes = 0;
  for (const auto& kept : storages_) {
    bytes += kept.begin ? kept.begin.nbytes() : 0;
  }
  return bytes;
}

namespace {

// See Note [Exchanging]. Does not throw where both are on the CPU and of one size.
void exchange(c10::StorageImpl& storage, const c10::Storage& other) {
  if (storage.device_type() == c10::kCPU && storage.nbytes() == other.nbytes()) {
    if (same_bytes(other, storage)) {
      return;  // perhaps nobody can write to it
    }
    auto* bytes = static_cast<std::byte*>(storage.mutable_data());
    auto* others = static_cast<std::byte*>(other.mutable_data());
    std::swap_ranges(bytes, bytes + storage.nbytes(), others);
  } else {  // a replay that resizes it: so is the size
    storage.swap_data_ptr(*other.unsafeGetStorageImpl());
  }
}

}  // namespace

StateScope::StateScope(const ReachedState& state) {
  for (const auto& noted : state.noted_) {
    const at::Tensor tensor(noted.tensor.lock());
    if (tensor.defined() && tensor.requires_grad() != noted.requires_grad && tensor.is_leaf()) {
      flipped_.emplace_back(tensor, tensor.requires_grad());
    }
  }
  if (state.settled_ && !state.changes_ && flipped_.empty()) {
    return;
  }
  const auto is_changed = [&state](const ReachedState::Kept& kept) {
    return kept.begin && (kept.changed || !state.settled_);
  };
  Lease::Keys keys;
  for (const auto& kept : state.storages_) {
    if (is_changed(kept)) {
      keys.push_back(kept.storage._unsafe_get_target());
    }
  }
  const size_t kept = keys.size();
  for (const auto& [tensor, now] : flipped_) {
    keys.push_back(tensor.unsafeGetTensorImpl());
  }
  if (keys.empty()) {
    return;
  }
  lease_.emplace(Lease::Kind::kBuffer, keys,
                 [](size_t) { return std::string("a buffer that its function changes"); });
  // All that may throw comes before the first exchange.
  exchanged_.reserve(kept);
  versions_.reserve(state.noted_.size());
  for (const auto& kept : state.storages_) {
    if (!is_changed(kept)) {
      continue;
    }
    auto storage = kept.storage.lock();
    if (storage && storage->nbytes() == kept.begin.nbytes()) {
      if (storage->device_type() == c10::kCPU) {
        storage->mutable_data();  // memory of its own, where it was shared lazily
      }
      exchanged_.push_back({std::move(storage), copy_of(kept.begin)});
    }
  }
  for (const auto& [storage, other] : exchanged_) {
    exchange(*storage, other);
  }
  for (const auto& [tensor, now] : flipped_) {
    tensor.unsafeGetTensorImpl()->set_requires_grad(!now);
  }
  for (const auto& noted : state.noted_) {
    if (noted.storage >= 0 && is_changed(state.storages_[static_cast<size_t>(noted.storage)])) {
      // What is saved in the replay has the version that it had in the forward: autograd
      // compares with where the counter stands after it.
      versions_.push_back({noted.version, noted.version.current_version()});
      versions_.back().version.set_version(noted.begin_version);
    }
  }
}

StateScope::~StateScope() {
  for (const auto& [tensor, now] : flipped_) {
    tensor.unsafeGetTensorImpl()->set_requires_grad(now);
  }
  for (const auto& [storage, other] : exchanged_) {
    exchange(*storage, other);
  }
  // Backwards: two tensors may share a counter.
  for (auto it = versions_.rbegin(); it != versions_.rend(); ++it) {
    it->version.set_version(it->value);
  }
}

}  // namespace reprise
