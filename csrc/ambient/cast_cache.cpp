#include "ambient/cast_cache.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/ones.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "host.h"
#include "torch_compat.h"

namespace reprise {

namespace {

// Neither modes nor transforms nor autograd nor profilers see what runs in it, and the
// cache is used also in a context that does without (cache_enabled=False).
class Unseen {
 public:
  Unseen() : keys_(included, excluded), cache_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(true);
  }
  ~Unseen() { at::autocast::set_autocast_cache_enabled(cache_); }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;

 private:
  static constexpr auto included = c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
  static constexpr auto excluded =
      c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  at::DisableRecordFunctionGuard quiet_;
  compat::NoInferenceMode inference_;
  c10::impl::ForceDispatchKeyGuard keys_;
  bool cache_;
};

// A weight of ours, of one element.
const at::Tensor& probe() {
  static const auto* weight = new at::Tensor(at::ones({1}, at::kFloat).set_requires_grad(true));
  return *weight;  // never destroyed: the cache may hold it for longer
}

}  // namespace

int autocast_nesting() {
  at::autocast::increment_nesting();
  return at::autocast::decrement_nesting();
}

void set_autocast_nesting(int depth) {
  int now = autocast_nesting();
  for (; now < depth; ++now) {
    at::autocast::increment_nesting();
  }
  for (; now > depth; --now) {
    at::autocast::decrement_nesting();
  }
}

at::Tensor mark_of_cast_cache() {
  // A cast in another thread may need the interpreter while it holds the cache's lock.
  const InterpreterReleased released;
  const Unseen unseen;
  const auto dtype = at::autocast::get_autocast_dtype(at::kCPU);
  at::Tensor cast = at::autocast::cached_cast(dtype, probe(), at::kCPU);
  return cast.is_same(probe()) ? at::Tensor() : cast;  // the same if it was asked for float32
}

void empty_cast_cache() {
  const InterpreterReleased released;
  at::autocast::clear_cache();
}

}  // namespace reprise
