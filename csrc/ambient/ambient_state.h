// Everything besides its arguments and random numbers that decides what `fn`
// computes. Noted when a segment begins, put in force for its replay, and the
// outer state put back after.
//
//   autocast        of every device type
//   modes           TorchFunction and TorchDispatch modes that are active in the forward
//                   and not around the replay. Pushed as they are, their __enter__ is
//                   not called again: re-entering a mode object would overwrite what its
//                   own __exit__ restores. Modes that are active around the replay stay:
//                   they are observers (profilers, counters) who want to see it.
//                   But those that fn itself has entered before a backward inside of it
//                   are not around the replay, which enters them again.
//   torch function  switched off, for tensor subclasses or altogether: so runs a backward that
//                   is called on a tensor subclass, which its forward did not.
//   default device  is a TorchFunction mode of torch's. One that is active around the
//                   replay alone is no observer: the CPU's is pushed on top of it.
//   device          the current one of an accelerator: torch.cuda.device(1). Its current
//                   stream is left alone.
//   settings        of the process (torch_flags.h). Replays that change some take turns.
//
// Python's context variables are the program's (bindings/python_program.h). What is left
// alone, and why, is in docs/replay.md.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/Device.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "ambient/torch_flags.h"
#include "lease.h"

namespace reprise {

constexpr size_t kAutocastDevices =
    std::tuple_size_v<std::remove_cv_t<decltype(at::autocast::_AUTOCAST_SUPPORTED_DEVICES)>>;

struct AutocastState {
  uint32_t enabled = 0;  // bit i: device i of _AUTOCAST_SUPPORTED_DEVICES
  uint32_t noted = 0;    // whose dtypes are: those that a tensor can be on, or that are enabled
  bool cache = true;
  std::array<at::ScalarType, kAutocastDevices> dtypes{};  // 0 of the others

  static AutocastState current();
  // The same, to be compared with `this`: dtypes of the same devices.
  AutocastState counterpart() const { return of(noted); }
  // Sets what differs from `now`, the current state.
  void apply(const AutocastState& now) const {
    if (*this != now) {
      apply_what_differs(now);
    }
  }
  bool operator==(const AutocastState& other) const {
    return enabled == other.enabled && noted == other.noted && cache == other.cache &&
           std::memcmp(dtypes.data(), other.dtypes.data(), sizeof(dtypes)) == 0;
  }

 private:
  void apply_what_differs(const AutocastState& now) const;
  static AutocastState of(uint32_t devices_noted);  // by bits, those that are enabled as well
};

// What is there whether or not anything was entered.
struct AmbientSettings {
  const TorchFlags* flags = nullptr;
  std::optional<c10::Device> device;
  at::impl::TorchFunctionDisabledState torch_function =
      at::impl::TorchFunctionDisabledState::ENABLED;
  AutocastState autocast;

  static AmbientSettings current();
  bool operator==(const AmbientSettings&) const = default;
};

class AmbientState {
 public:
  // Most segments begin where no mode and no autocast is active. Such states are few: equal ones
  // are one object, which stays for ever. The others belong to whom they are given.
  struct Release {
    void operator()(const AmbientState* state) const {
      if (!state->is_bare_) {
        delete state;
      }
    }
  };
  using Ref = std::unique_ptr<const AmbientState, Release>;
  static Ref current();

  // What of the settings that no context manager ends (of the process, default device)
  // is another now, a line each; empty if nothing is.
  std::string settings_diff() const;

  // Without anything that was entered.
  explicit AmbientState(const AmbientSettings& settings) : settings_(settings) {}
  bool operator==(const AmbientSettings& settings) const { return settings_ == settings; }

 private:
  friend class AmbientScope;
  using FunctionMode = std::shared_ptr<c10::SafePyObject>;
  using DispatchMode = std::shared_ptr<c10::impl::PyObject_TorchDispatchMode>;

  void note_what_was_entered();
  bool is_in_force() const;

  AmbientSettings settings_;
  bool is_bare_ = true;  // nothing was entered: what follows is empty
  bool has_default_device_ = false;
  bool inside_autocast_ = false;  // in a context of autocast, be it on or off
  at::Tensor cast_cache_;         // which one that was, see cast_cache.h
  // Strong references, dropped with the segment; outermost first.
  c10::SmallVector<FunctionMode, 0> function_modes_;
  c10::SmallVector<DispatchMode, 0> dispatch_modes_;
};

// Puts a state in force for a scope. Most find it in force.
class AmbientScope {
 public:
  // `state`: null for a scope that changes nothing. `inside_fn`: the forward that began in this
  // state is still running, and what it has entered since is set aside.
  explicit AmbientScope(const AmbientState* state, bool inside_fn = false);
  ~AmbientScope();
  AmbientScope(const AmbientScope&) = delete;
  AmbientScope& operator=(const AmbientScope&) = delete;

 private:
  // What is done where it is not in force.
  struct Change {
    std::optional<Lease> lease;  // while the settings of the process are other ones than around it
    AmbientSettings outer;
    bool clears_casts = false;
    bool nests = false;
    int outer_nesting = 0;   // of contexts of autocast
    int function_modes = 0;  // how many were pushed
    int dispatch_modes = 0;
    // fn's own, innermost first.
    c10::SmallVector<AmbientState::FunctionMode, 0> own_function_modes;
    c10::SmallVector<AmbientState::DispatchMode, 0> own_dispatch_modes;
  };
  void enter(bool inside_fn);
  void begin_autocast(bool shares_casts, bool inside_fn);
  void leave_modes();

  const AmbientState* const state_;
  std::optional<Change> change_;
};

}  // namespace reprise
