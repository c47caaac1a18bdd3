// Autocast is put in force for a scope and put back.
#include <ATen/ATen.h>

#include "ambient/ambient_state.h"
#include "check.h"

namespace autocast = at::autocast;
using reprise::AmbientScope;
using reprise::AmbientState;
using reprise::AutocastState;

TEST(autocast_is_restored_and_put_back) {
  autocast::set_autocast_enabled(at::kCPU, true);
  autocast::set_autocast_dtype(at::kCPU, at::kHalf);
  autocast::set_autocast_cache_enabled(false);
  const auto inside = AmbientState::capture();
  autocast::set_autocast_enabled(at::kCPU, false);
  autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  autocast::set_autocast_cache_enabled(true);
  const auto outer = AutocastState::current();
  {
    const AmbientScope scope(inside);
    EXPECT(autocast::is_autocast_enabled(at::kCPU));
    EXPECT(autocast::get_autocast_dtype(at::kCPU) == at::kHalf);
    EXPECT(!autocast::is_autocast_cache_enabled());
    EXPECT(at::matmul(at::ones({2, 2}), at::ones({2, 2})).scalar_type() == at::kHalf);
  }
  EXPECT(AutocastState::current() == outer);
}

TEST(autocast_that_is_on_now_is_off_in_a_scope_that_had_none) {
  const auto inside = AmbientState::capture();
  autocast::set_autocast_enabled(at::kCPU, true);
  const auto outer = AutocastState::current();
  {
    const AmbientScope scope(inside);
    EXPECT(!autocast::is_autocast_enabled(at::kCPU));
    EXPECT(at::matmul(at::ones({2, 2}), at::ones({2, 2})).scalar_type() == at::kFloat);
  }
  EXPECT(AutocastState::current() == outer);
  autocast::set_autocast_enabled(at::kCPU, false);
}

TEST(casts_that_a_scope_cached_do_not_outlive_it) {
  autocast::set_autocast_enabled(at::kCPU, true);
  const auto inside = AmbientState::capture();
  autocast::set_autocast_enabled(at::kCPU, false);
  auto weight = at::ones({2, 2}).set_requires_grad(true);
  const auto held = weight.use_count();
  {
    const AmbientScope scope(inside);
    at::matmul(weight, weight);
    EXPECT(weight.use_count() > held);  // the cache keeps the weight it cast
  }
  EXPECT_EQ(weight.use_count(), held);
}

TEST_MAIN()
