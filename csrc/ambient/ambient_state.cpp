#include "ambient/ambient_state.h"

#include <ATen/Context.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <bit>

#include "ambient/cast_cache.h"
#include "host.h"
#include "rng/rng_snapshot.h"
#include "rng/stream_capture.h"

namespace reprise {

using at::impl::PythonTorchFunctionTLS;
using c10::impl::TorchDispatchModeTLS;

namespace {

// Can a tensor be on a device of this type? If not, its autocast dtype decides
// nothing while its autocast is off. A backend brings a guard; it may come later.
bool may_compute(c10::DeviceType type) { return c10::impl::hasDeviceGuardImpl(type); }

struct AutocastDevices {
  std::array<c10::DeviceType, kAutocastDevices> types;
  std::array<c10::DispatchKeySet, kAutocastDevices> keys;  // excluded while autocast is off
  c10::DispatchKeySet all_keys;
};

// Two calls into torch per device type and segment would cost more than the rest
// of what is noted, and most of the ten types are of backends that are not there.
const AutocastDevices& autocast_devices() {
  static const auto devices = [] {
    AutocastDevices found;
    for (size_t i = 0; i < kAutocastDevices; ++i) {
      const auto type = at::autocast::_AUTOCAST_SUPPORTED_DEVICES[i];
      found.types[i] = type;
      found.keys[i] =
          c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(type));
      found.all_keys = found.all_keys | found.keys[i];
    }
    return found;
  }();
  return devices;
}

}  // namespace

AutocastState AutocastState::of(uint32_t devices_noted) {
  AutocastState state;
  const AutocastDevices& devices = autocast_devices();
  // is_autocast_enabled() asks whether the key is excluded: once for all of them.
  const auto excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  if (!excluded.has_all(devices.all_keys)) {
    for (size_t i = 0; i < kAutocastDevices; ++i) {
      state.enabled |= excluded.has_all(devices.keys[i]) ? 0 : 1u << i;
    }
  }
  state.noted = devices_noted | state.enabled;
  for (uint32_t left = state.noted; left != 0; left &= left - 1) {
    const auto i = static_cast<size_t>(std::countr_zero(left));
    state.dtypes[i] = at::autocast::get_autocast_dtype(devices.types[i]);
  }
  state.cache = at::autocast::is_autocast_cache_enabled();
  return state;
}

AutocastState AutocastState::current() {
  const AutocastDevices& devices = autocast_devices();
  uint32_t noted = 0;
  for (size_t i = 0; i < kAutocastDevices; ++i) {
    noted |= may_compute(devices.types[i]) ? 1u << i : 0u;
  }
  return of(noted);
}

void AutocastState::apply(const AutocastState& now) const {
  if (*this == now) {
    return;
  }
  const auto& devices = autocast_devices();
  for (size_t i = 0; i < kAutocastDevices; ++i) {
    const auto bit = 1u << i;
    if ((enabled & bit) != (now.enabled & bit)) {
      at::autocast::set_autocast_enabled(devices.types[i], (enabled & bit) != 0);
    }
    if ((noted & bit) != 0 && dtypes[i] != now.dtypes[i]) {
      at::autocast::set_autocast_dtype(devices.types[i], dtypes[i]);
    }
  }
  if (cache != now.cache) {
    at::autocast::set_autocast_cache_enabled(cache);
  }
}

namespace {

// How many modes of torch's own (fake, proxy, functional) there are, which get_stack_at
// counts first.
int64_t infra_modes() {
  int64_t found = 0;
  for (auto key : {c10::impl::TorchDispatchModeKey::FAKE, c10::impl::TorchDispatchModeKey::PROXY,
                   c10::impl::TorchDispatchModeKey::FUNCTIONAL}) {
    found += TorchDispatchModeTLS::get_mode(key).has_value() ? 1 : 0;
  }
  return found;
}

}  // namespace

AmbientState AmbientState::capture() {
  AmbientState state;
  state.note();
  return state;
}

void AmbientState::note() {
  flags_ = TorchFlags::current();
  device_ = current_accelerator_device();
  autocast_ = AutocastState::current();
  inside_autocast_ = autocast_nesting() > 0;
  if (inside_autocast_) {
    cast_cache_ = mark_of_cast_cache();
  }
  for (int64_t i = 0, n = PythonTorchFunctionTLS::stack_len(); i < n; ++i) {
    function_modes_.push_back(PythonTorchFunctionTLS::get_stack_at(i));
    has_default_device_ |= host().is_default_device_mode(*function_modes_.back());
  }
  if (TorchDispatchModeTLS::any_modes_set(/*skip_infra_modes=*/true)) {
    for (int64_t i = infra_modes(), n = TorchDispatchModeTLS::stack_len(); i < n; ++i) {
      dispatch_modes_.push_back(TorchDispatchModeTLS::get_stack_at(i));
    }
  }
}

namespace {

template <typename Mode>
bool same_mode(const Mode& a, const Mode& b) {
  return a->ptr(&a->pyinterpreter()) == b->ptr(&b->pyinterpreter());
}

template <typename TLS, typename Mode>
bool is_active(const Mode& mode) {
  for (int64_t i = 0, n = TLS::stack_len(); i < n; ++i) {
    if (same_mode(TLS::get_stack_at(i), mode)) {
      return true;
    }
  }
  return false;
}

// Takes this thread's modes that lie above those of `before`, which begin at `first`, off their
// stack, innermost first. None if others lie there now.
template <typename TLS, typename Modes>
void set_aside(int64_t first, const Modes& before, Modes& aside) {
  const int64_t begin = first + static_cast<int64_t>(before.size());
  for (int64_t i = first; i < begin; ++i) {
    if (i >= TLS::stack_len() ||
        !same_mode(TLS::get_stack_at(i), before[static_cast<size_t>(i - first)])) {
      return;
    }
  }
  while (TLS::stack_len() > begin) {
    aside.push_back(TLS::pop_stack());
  }
}

bool default_device_is_set() {
  for (int64_t i = 0, n = PythonTorchFunctionTLS::stack_len(); i < n; ++i) {
    if (host().is_default_device_mode(*PythonTorchFunctionTLS::get_stack_at(i))) {
      return true;
    }
  }
  return false;
}

}  // namespace

std::string AmbientState::settings_diff() const {
  if (flags_ == nullptr) {
    return {};
  }
  std::string text = flags_->diff(*TorchFlags::current());
  if (has_default_device_ != default_device_is_set()) {
    text += text.empty() ? "" : "\n";
    text += has_default_device_ ? "a default device was set in the forward, none is now"
                                : "no default device was set in the forward, one is now";
  }
  return text;
}

namespace {

constexpr char kKeyOfSettings = 0;  // its address is what a lease of the settings is of

// Makes no context for it.
void set_device(std::optional<c10::Device> device) {
  if (device.has_value()) {
    const auto* guard = guard_of(device->type());
    if (guard->getDevice() != *device) {
      guard->uncheckedSetDevice(*device);
    }
  }
}

}  // namespace

AmbientScope::AmbientScope(const AmbientState& state, bool inside_fn)
    : active_(state.flags_ != nullptr) {
  if (!active_) {
    return;
  }
  // First what may throw.
  const bool shares_casts =
      state.cast_cache_.defined() && state.cast_cache_.is_same(mark_of_cast_cache());
  const bool needs_cpu = !state.has_default_device_ && default_device_is_set();
  const auto cpu = needs_cpu ? host().cpu_device_mode() : nullptr;
  constexpr auto kSettings = Lease::Kind::kSettings;
  const auto changes = Lease::changes(kSettings);
  outer_flags_ = TorchFlags::current();
  if (state.flags_ != outer_flags_ || Lease::held_by_others(kSettings) ||
      Lease::changes(kSettings) != changes) {
    settings_.emplace(kSettings, Lease::Keys{&kKeyOfSettings},
                      [](size_t) { return std::string("the settings of torch"); });
    outer_flags_ = TorchFlags::current();
  }
  if (inside_fn) {
    set_aside<PythonTorchFunctionTLS>(0, state.function_modes_, own_function_modes_);
    set_aside<TorchDispatchModeTLS>(infra_modes(), state.dispatch_modes_, own_dispatch_modes_);
  }
  // fn may be the first to use an accelerator.
  outer_device_ = current_accelerator_device();
  set_device(state.device_);
  outer_autocast_ = state.autocast_.counterpart();
  if (state.flags_ != outer_flags_) {
    state.flags_->apply(*outer_flags_);
  }
  if (needs_cpu) {
    PythonTorchFunctionTLS::push_onto_stack(cpu);
    ++function_modes_;
  }
  begin_autocast(state, shares_casts, inside_fn);
  for (const auto& mode : state.function_modes_) {
    if (!is_active<PythonTorchFunctionTLS>(mode)) {
      PythonTorchFunctionTLS::push_onto_stack(mode);
      ++function_modes_;
    }
  }
  for (const auto& mode : state.dispatch_modes_) {
    if (!is_active<TorchDispatchModeTLS>(mode)) {
      TorchDispatchModeTLS::push_non_infra_mode_onto_stack(mode);
      ++dispatch_modes_;
    }
  }
}

// Note [Cached casts]
void AmbientScope::begin_autocast(const AmbientState& state, bool shares_casts, bool inside_fn) {
  outer_nesting_ = autocast_nesting();
  // Threads of a backward inside of a context are in none themselves.
  int nesting = state.inside_autocast_ ? std::max(outer_nesting_, 1) : 0;
  auto wanted = state.autocast_;
  if (!shares_casts) {
    // Autocast may be on without a context.
    const bool has_casts = outer_nesting_ > 0 || outer_autocast_.enabled != 0;
    if (has_casts && inside_fn) {
      wanted.cache = false;
      nesting = std::max(outer_nesting_, 1);
    } else {
      clears_casts_ = has_casts || state.inside_autocast_ || state.autocast_.enabled != 0;
      if (has_casts) {
        empty_cast_cache();
      }
    }
  }
  nests_ = nesting != outer_nesting_;
  if (nests_) {
    set_autocast_nesting(nesting);
  }
  wanted.apply(outer_autocast_);
}

AmbientScope::~AmbientScope() {
  if (!active_) {
    return;
  }
  for (; dispatch_modes_ > 0; --dispatch_modes_) {
    TorchDispatchModeTLS::pop_stack();
  }
  for (; function_modes_ > 0; --function_modes_) {
    PythonTorchFunctionTLS::pop_stack();
  }
  while (!own_dispatch_modes_.empty()) {
    TorchDispatchModeTLS::push_non_infra_mode_onto_stack(own_dispatch_modes_.pop_back_val());
  }
  while (!own_function_modes_.empty()) {
    PythonTorchFunctionTLS::push_onto_stack(own_function_modes_.pop_back_val());
  }
  outer_autocast_.apply(outer_autocast_.counterpart());
  if (nests_) {
    set_autocast_nesting(outer_nesting_);
  }
  if (clears_casts_) {
    empty_cast_cache();
  }
  set_device(outer_device_);
  const TorchFlags* now = TorchFlags::current();
  // What fn has changed; or another replay, whose turn it is and who will put it back.
  if (now != outer_flags_ &&
      (settings_.has_value() || !Lease::held_by_others(Lease::Kind::kSettings))) {
    outer_flags_->apply(*now);
  }
}

}  // namespace reprise
