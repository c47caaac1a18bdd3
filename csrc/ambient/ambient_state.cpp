#include "ambient/ambient_state.h"

#include <algorithm>

namespace reprise {

using at::impl::PythonTorchFunctionTLS;
using c10::impl::TorchDispatchModeTLS;

AutocastState AutocastState::current() {
  AutocastState state;
  const auto& devices = at::autocast::_AUTOCAST_SUPPORTED_DEVICES;
  for (size_t i = 0; i < devices.size(); ++i) {
    state.enabled |= at::autocast::is_autocast_enabled(devices[i]) ? 1u << i : 0u;
    state.dtypes[i] = at::autocast::get_autocast_dtype(devices[i]);
  }
  state.cache = at::autocast::is_autocast_cache_enabled();
  return state;
}

void AutocastState::apply() const {
  const auto& devices = at::autocast::_AUTOCAST_SUPPORTED_DEVICES;
  for (size_t i = 0; i < devices.size(); ++i) {
    const bool on = (enabled >> i & 1u) != 0;
    if (at::autocast::is_autocast_enabled(devices[i]) != on) {
      at::autocast::set_autocast_enabled(devices[i], on);
    }
    if (at::autocast::get_autocast_dtype(devices[i]) != dtypes[i]) {
      at::autocast::set_autocast_dtype(devices[i], dtypes[i]);
    }
  }
  if (at::autocast::is_autocast_cache_enabled() != cache) {
    at::autocast::set_autocast_cache_enabled(cache);
  }
}

AmbientState AmbientState::capture() {
  AmbientState state;
  state.autocast_ = AutocastState::current();
  for (int64_t i = 0, n = PythonTorchFunctionTLS::stack_len(); i < n; ++i) {
    state.function_modes_.push_back(PythonTorchFunctionTLS::get_stack_at(i));
  }
  if (TorchDispatchModeTLS::any_modes_set(/*skip_infra_modes=*/true)) {
    // get_stack_at counts the infra modes (fake, proxy, functional) first.
    int64_t infra = 0;
    for (auto key : {c10::impl::TorchDispatchModeKey::FAKE, c10::impl::TorchDispatchModeKey::PROXY,
                     c10::impl::TorchDispatchModeKey::FUNCTIONAL}) {
      infra += TorchDispatchModeTLS::get_mode(key).has_value() ? 1 : 0;
    }
    for (int64_t i = infra, n = TorchDispatchModeTLS::stack_len(); i < n; ++i) {
      state.dispatch_modes_.push_back(TorchDispatchModeTLS::get_stack_at(i));
    }
  }
  return state;
}

namespace {

template <typename TLS, typename Mode>
bool is_active(const Mode& mode) {
  for (int64_t i = 0, n = TLS::stack_len(); i < n; ++i) {
    const auto& active = TLS::get_stack_at(i);
    if (active->ptr(&active->pyinterpreter()) == mode->ptr(&mode->pyinterpreter())) {
      return true;
    }
  }
  return false;
}

}  // namespace

AmbientScope::AmbientScope(const AmbientState& state) : outer_autocast_(AutocastState::current()) {
  if (state.autocast_.enabled != 0) {
    // As entering autocast does: casts cached inside do not outlive the scope.
    at::autocast::increment_nesting();
    autocast_nested_ = true;
  }
  state.autocast_.apply();
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

AmbientScope::~AmbientScope() {
  for (; dispatch_modes_ > 0; --dispatch_modes_) {
    TorchDispatchModeTLS::pop_stack();
  }
  for (; function_modes_ > 0; --function_modes_) {
    PythonTorchFunctionTLS::pop_stack();
  }
  outer_autocast_.apply();
  if (autocast_nested_ && at::autocast::decrement_nesting() == 0) {
    at::autocast::clear_cache();
  }
}

}  // namespace reprise
