// Autocast is put in force for a scope and put back.
#include <ATen/ATen.h>

#include "ambient/ambient_state.h"
#include "ambient/cast_cache.h"
#include "check.h"
#include "test_host.h"

namespace autocast = at::autocast;
using reprise::AmbientScope;
using reprise::AmbientState;
using reprise::AutocastState;

TEST(autocast_is_restored_and_put_back) {
  TestHost::install();
  autocast::set_autocast_enabled(at::kCPU, true);
  autocast::set_autocast_dtype(at::kCPU, at::kHalf);
  autocast::set_autocast_cache_enabled(false);
  const auto inside = AmbientState::current();
  autocast::set_autocast_enabled(at::kCPU, false);
  autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  autocast::set_autocast_cache_enabled(true);
  const auto outer = AutocastState::current();
  {
    const AmbientScope scope(inside.get());
    EXPECT(autocast::is_autocast_enabled(at::kCPU));
    EXPECT(autocast::get_autocast_dtype(at::kCPU) == at::kHalf);
    EXPECT(!autocast::is_autocast_cache_enabled());
    EXPECT(at::matmul(at::ones({2, 2}), at::ones({2, 2})).scalar_type() == at::kHalf);
  }
  EXPECT(AutocastState::current() == outer);
}

TEST(autocast_that_is_on_now_is_off_in_a_scope_that_had_none) {
  TestHost::install();
  const auto inside = AmbientState::current();
  autocast::set_autocast_enabled(at::kCPU, true);
  const auto outer = AutocastState::current();
  {
    const AmbientScope scope(inside.get());
    EXPECT(!autocast::is_autocast_enabled(at::kCPU));
    EXPECT(at::matmul(at::ones({2, 2}), at::ones({2, 2})).scalar_type() == at::kFloat);
  }
  EXPECT(AutocastState::current() == outer);
  autocast::set_autocast_enabled(at::kCPU, false);
}

TEST(casts_that_a_scope_cached_do_not_outlive_it) {
  TestHost::install();
  autocast::set_autocast_enabled(at::kCPU, true);
  const auto inside = AmbientState::current();
  autocast::set_autocast_enabled(at::kCPU, false);
  auto weight = at::ones({2, 2}).set_requires_grad(true);
  const auto held = weight.use_count();
  {
    const AmbientScope scope(inside.get());
    at::matmul(weight, weight);
    EXPECT(weight.use_count() > held);  // the cache keeps the weight it cast
  }
  EXPECT_EQ(weight.use_count(), held);
}

TEST(the_mark_of_the_cache_lasts_as_long_as_what_is_cached) {
  TestHost::install();
  autocast::increment_nesting();
  const auto first = reprise::mark_of_cast_cache();
  EXPECT(first.defined());
  EXPECT(first.is_same(reprise::mark_of_cast_cache()));
  reprise::empty_cast_cache();
  const auto second = reprise::mark_of_cast_cache();
  EXPECT(second.defined());
  EXPECT(!second.is_same(first));
  autocast::set_autocast_cache_enabled(false);
  EXPECT(second.is_same(reprise::mark_of_cast_cache()));
  EXPECT(!autocast::is_autocast_cache_enabled());
  autocast::set_autocast_cache_enabled(true);
  EXPECT_EQ(autocast::decrement_nesting(), 0);
  reprise::empty_cast_cache();
}

TEST(a_scope_in_the_context_of_its_forward_keeps_its_casts) {
  TestHost::install();
  autocast::increment_nesting();
  autocast::set_autocast_enabled(at::kCPU, true);
  const auto inside = AmbientState::current();
  auto weight = at::ones({2, 2}).set_requires_grad(true);
  at::matmul(weight, weight);
  const auto cached = weight.use_count();
  {
    const AmbientScope scope(inside.get());
  }
  EXPECT_EQ(weight.use_count(), cached);
  autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(autocast::decrement_nesting(), 0);
  reprise::empty_cast_cache();  // the context ends

  autocast::increment_nesting();  // another one
  autocast::set_autocast_enabled(at::kCPU, true);
  const auto held = weight.use_count();
  at::matmul(weight, weight);
  EXPECT(weight.use_count() > held);
  {
    const AmbientScope scope(inside.get());
    EXPECT_EQ(weight.use_count(), held);
    at::matmul(weight, weight);
    EXPECT(weight.use_count() > held);
  }
  EXPECT_EQ(weight.use_count(), held);
  EXPECT_EQ(reprise::autocast_nesting(), 1);
  autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(autocast::decrement_nesting(), 0);
}

TEST_MAIN()
