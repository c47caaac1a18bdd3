// Operators of ours run as if nobody was there.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace reprise {

// The values are behind something that only its own dispatch key can look through.
inline constexpr c10::DispatchKeySet kWrapped({c10::DispatchKey::Python, c10::DispatchKey::Fake,
                                               c10::DispatchKey::Functionalize,
                                               c10::DispatchKey::FuncTorchBatched,
                                               c10::DispatchKey::FuncTorchGradWrapper});

// No history, no autocast, no modes. On the thread that makes it, for its lifetime.
struct Unobserved {
  at::AutoDispatchBelowADInplaceOrView no_history;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  c10::impl::ExcludeDispatchKeyGuard no_modes{
      kWrapped |
      c10::DispatchKeySet({c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::PythonDispatcher,
                           c10::DispatchKey::PreDispatch, c10::DispatchKey::FuncTorchVmapMode,
                           c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                           c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                           c10::DispatchKey::DeferredInit})};
};

}  // namespace reprise
