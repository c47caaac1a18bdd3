#include "ambient/ambient_state.h"

#include <ATen/Context.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "ambient/cast_cache.h"
#include "host.h"
#include "interned.h"
#include "open_member.h"
#include "per_thread.h"
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

void AutocastState::apply_what_differs(const AutocastState& now) const {
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

namespace {

REPRISE_OPEN_MEMBER(FunctionStack, PythonTorchFunctionTLS, stack_,
                    std::vector<std::shared_ptr<c10::SafePyObject>>)
REPRISE_OPEN_MEMBER(FunctionSwitch, PythonTorchFunctionTLS, disabled_state_,
                    at::impl::TorchFunctionDisabledState)
REPRISE_OPEN_MEMBER(DispatchStack, TorchDispatchModeTLS, stack_,
                    std::vector<std::shared_ptr<c10::impl::PyObject_TorchDispatchMode>>)

// What a thread asks before and after every segment, found once: each call into torch is a place
// of its own in a library of hundreds of megabytes.
struct OfThread {
  const PythonTorchFunctionTLS& functions = PythonTorchFunctionTLS::get_state();
  const TorchDispatchModeTLS& dispatch = TorchDispatchModeTLS::get_state();
  const AmbientState* last = nullptr;  // that was noted

  // No mode, no context of autocast. Autocast that is on without one counts as entered.
  bool nothing_is_entered() const {
    return (functions.*member_of(FunctionStack())).empty() &&
           (dispatch.*member_of(DispatchStack())).empty() && autocast_nesting() == 0;
  }
  at::impl::TorchFunctionDisabledState torch_function() const {
    return functions.*member_of(FunctionSwitch());
  }
};

}  // namespace

AmbientSettings AmbientSettings::current() {
  return {TorchFlags::current(), current_accelerator_device(),
          per_thread<OfThread>().torch_function(), AutocastState::current()};
}

AmbientState::Ref AmbientState::current() {
  const auto settings = AmbientSettings::current();
  auto& of_thread = per_thread<OfThread>();
  if (settings.autocast.enabled == 0 && of_thread.nothing_is_entered()) {
    if (of_thread.last == nullptr || !(*of_thread.last == settings)) {
      of_thread.last = the_one_equal_to<AmbientState>(settings);
    }
    return Ref(of_thread.last);
  }
  auto* state = new AmbientState(settings);
  state->is_bare_ = false;
  Ref owned(state);
  state->note_what_was_entered();
  return owned;
}

void AmbientState::note_what_was_entered() {
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

// Is this one of `modes` not on its stack as often as among those up to it? A mode may be entered
// in itself.
template <typename TLS, typename Modes>
bool is_missing(const Modes& modes, const typename Modes::value_type& mode) {
  int64_t missing = 0;
  for (const auto* other = modes.begin(); other <= &mode; ++other) {
    missing += same_mode(*other, mode) ? 1 : 0;
  }
  for (int64_t i = 0, n = TLS::stack_len(); i < n; ++i) {
    missing -= same_mode(TLS::get_stack_at(i), mode) ? 1 : 0;
  }
  return missing > 0;
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
  std::string text = settings_.flags->diff(*TorchFlags::current());
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
void set_device(c10::Device device) {
  const auto* guard = guard_of(device.type());
  if (guard->getDevice() != device) {
    guard->uncheckedSetDevice(device);
  }
}

}  // namespace

// Where nothing is entered now either, a state is in force if the settings are its own.
bool AmbientState::is_in_force() const {
  if (!is_bare_) {
    return false;
  }
  const auto& of_thread = per_thread<OfThread>();
  return TorchFlags::current() == settings_.flags &&
         current_accelerator_device() == settings_.device &&
         of_thread.torch_function() == settings_.torch_function &&
         settings_.autocast.counterpart() == settings_.autocast && of_thread.nothing_is_entered();
}

namespace {

// Says what `look` finds, and whether another replay may have put it in force for itself.
template <typename Look>
auto unless_anothers(const Look& look) {
  constexpr auto kSettings = Lease::Kind::kSettings;
  const auto changes = Lease::changes(kSettings);
  const auto found = look();
  const bool is_anothers = Lease::held_by_others(kSettings) || Lease::changes(kSettings) != changes;
  return std::pair(found, is_anothers);
}

}  // namespace

AmbientScope::AmbientScope(const AmbientState* state, bool inside_fn) : state_(state) {
  if (state == nullptr) {
    return;
  }
  if (!inside_fn) {
    const auto [in_force, is_anothers] = unless_anothers([&] { return state->is_in_force(); });
    if (in_force && !is_anothers) {
      return;
    }
  }
  change_.emplace();
  enter(inside_fn);
}

void AmbientScope::enter(bool inside_fn) {
  const AmbientState& state = *state_;
  const AmbientSettings& wanted = state.settings_;
  Change& change = *change_;
  // First what may throw.
  const bool shares_casts =
      state.cast_cache_.defined() && state.cast_cache_.is_same(mark_of_cast_cache());
  const bool needs_cpu = !state.has_default_device_ && default_device_is_set();
  const auto cpu = needs_cpu ? host().cpu_device_mode() : nullptr;
  const auto [flags, is_anothers] = unless_anothers(TorchFlags::current);
  change.outer.flags = flags;
  if (wanted.flags != flags || is_anothers) {
    change.lease.emplace(Lease::Kind::kSettings, Lease::Keys{&kKeyOfSettings},
                         [](size_t) { return std::string("the settings of torch"); });
    change.outer.flags = TorchFlags::current();
  }
  if (inside_fn) {
    set_aside<PythonTorchFunctionTLS>(0, state.function_modes_, change.own_function_modes);
    set_aside<TorchDispatchModeTLS>(infra_modes(), state.dispatch_modes_,
                                    change.own_dispatch_modes);
  }
  // fn may be the first to use an accelerator.
  change.outer.device = current_accelerator_device();
  if (wanted.device.has_value()) {
    set_device(*wanted.device);
  }
  change.outer.torch_function = PythonTorchFunctionTLS::get_disabled_state();
  PythonTorchFunctionTLS::set_disabled_state(wanted.torch_function);
  change.outer.autocast = wanted.autocast.counterpart();
  if (wanted.flags != change.outer.flags) {
    wanted.flags->apply(*change.outer.flags);
  }
  if (needs_cpu) {
    PythonTorchFunctionTLS::push_onto_stack(cpu);
    ++change.function_modes;
  }
  begin_autocast(shares_casts, inside_fn);
  for (const auto& mode : state.function_modes_) {
    if (is_missing<PythonTorchFunctionTLS>(state.function_modes_, mode)) {
      PythonTorchFunctionTLS::push_onto_stack(mode);
      ++change.function_modes;
    }
  }
  for (const auto& mode : state.dispatch_modes_) {
    if (is_missing<TorchDispatchModeTLS>(state.dispatch_modes_, mode)) {
      TorchDispatchModeTLS::push_non_infra_mode_onto_stack(mode);
      ++change.dispatch_modes;
    }
  }
}

// Note [Cached casts]
void AmbientScope::begin_autocast(bool shares_casts, bool inside_fn) {
  Change& change = *change_;
  change.outer_nesting = autocast_nesting();
  // Threads of a backward inside of a context are in none themselves.
  int nesting = state_->inside_autocast_ ? std::max(change.outer_nesting, 1) : 0;
  auto wanted = state_->settings_.autocast;
  if (!shares_casts) {
    // Autocast may be on without a context.
    const bool has_casts = change.outer_nesting > 0 || change.outer.autocast.enabled != 0;
    if (has_casts && inside_fn) {
      wanted.cache = false;
      nesting = std::max(change.outer_nesting, 1);
    } else {
      change.clears_casts = has_casts || state_->inside_autocast_ || wanted.enabled != 0;
      if (has_casts) {
        empty_cast_cache();
      }
    }
  }
  change.nests = nesting != change.outer_nesting;
  if (change.nests) {
    set_autocast_nesting(nesting);
  }
  wanted.apply(change.outer.autocast);
}

void AmbientScope::leave_modes() {
  Change& change = *change_;
  for (; change.dispatch_modes > 0; --change.dispatch_modes) {
    TorchDispatchModeTLS::pop_stack();
  }
  for (; change.function_modes > 0; --change.function_modes) {
    PythonTorchFunctionTLS::pop_stack();
  }
  while (!change.own_dispatch_modes.empty()) {
    TorchDispatchModeTLS::push_non_infra_mode_onto_stack(change.own_dispatch_modes.pop_back_val());
  }
  while (!change.own_function_modes.empty()) {
    PythonTorchFunctionTLS::push_onto_stack(change.own_function_modes.pop_back_val());
  }
}

// Where nothing was changed on entry, fn may have changed the settings.
AmbientScope::~AmbientScope() {
  if (state_ == nullptr) {
    return;
  }
  const AmbientSettings& outer = change_ ? change_->outer : state_->settings_;
  if (change_) {
    leave_modes();
  }
  PythonTorchFunctionTLS::set_disabled_state(outer.torch_function);
  outer.autocast.apply(outer.autocast.counterpart());
  if (change_ && change_->nests) {
    set_autocast_nesting(change_->outer_nesting);
  }
  if (change_ && change_->clears_casts) {
    empty_cast_cache();
  }
  if (outer.device.has_value()) {
    set_device(*outer.device);
  }
  const TorchFlags* now = TorchFlags::current();
  // What fn has changed; or another replay, whose turn it is and who will put it back.
  const bool is_our_turn = change_ && change_->lease.has_value();
  if (now != outer.flags && (is_our_turn || !Lease::held_by_others(Lease::Kind::kSettings))) {
    outer.flags->apply(*now);
  }
}

}  // namespace reprise
