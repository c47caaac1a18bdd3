// Tensors that a function reaches by itself: copied, exchanged for a replay, put back.
#include <ATen/ATen.h>

#include "check.h"
#include "effects/reached_state.h"

using reprise::Reached;
using reprise::ReachedState;
using reprise::StateScope;

namespace {

Reached state_of(const at::Tensor& tensor) {
  return {&tensor, Reached::Role::kState, /*checked=*/true, /*training=*/true,
          /*may_be_large=*/true};
}

bool has_problem(const ReachedState& state) {
  size_t from = 0;
  return state.first_problem(&from).tensor != nullptr;
}

}  // namespace

TEST(what_was_changed_holds_the_first_values_for_a_scope) {
  auto buffer = at::zeros({4});
  const auto view = buffer.slice(0, 0, 2);
  ReachedState state;
  state.note({state_of(buffer)});
  buffer.add_(1);
  state.settle();
  EXPECT_EQ(state.nbytes(), 16u);
  buffer.add_(1);  // later changes are no matter of a replay
  EXPECT(!has_problem(state));
  const auto version = buffer._version();
  const void* memory = buffer.data_ptr();
  for (int i = 0; i < 2; ++i) {
    const StateScope scope(state);
    EXPECT(at::equal(buffer, at::zeros({4})));
    EXPECT(at::equal(view, at::zeros({2})));
    buffer.sub_(7);
  }
  EXPECT(at::equal(buffer, at::full({4}, 2)));
  EXPECT(at::equal(view, at::full({2}, 2)));
  EXPECT_EQ(buffer._version(), version);
  EXPECT(buffer.data_ptr() == memory);
}

TEST(what_was_not_changed_is_not_kept) {
  const auto buffer = at::ones({4});
  ReachedState state;
  state.note({state_of(buffer)});
  state.settle();
  EXPECT_EQ(state.nbytes(), 0u);
  EXPECT(!has_problem(state));
  buffer.add_(1);
  EXPECT(has_problem(state));
}

TEST(a_change_without_a_version_is_seen_by_its_bytes) {
  const auto buffer = at::ones({4});
  ReachedState state;
  state.note({state_of(buffer)});
  buffer.data_ptr<float>()[2] = 5;
  state.settle();
  EXPECT_EQ(state.nbytes(), 16u);
  const StateScope scope(state);
  EXPECT(at::equal(buffer, at::ones({4})));
}

TEST(views_of_one_storage_are_copied_once) {
  const auto buffer = at::zeros({8});
  const auto a = buffer.slice(0, 0, 4), b = buffer.slice(0, 4, 8);
  ReachedState state;
  state.note({state_of(a), state_of(b)});
  a.add_(1);
  state.settle();
  EXPECT_EQ(state.nbytes(), 32u);
  const StateScope scope(state);
  EXPECT(at::equal(buffer, at::zeros({8})));
}

TEST(a_large_one_is_copied_until_it_is_known) {
  const auto constant = at::zeros({1 << 16}), changing = at::zeros({1 << 16});
  for (int i = 0; i < 3; ++i) {
    ReachedState state;
    state.note({state_of(constant), state_of(changing)});
    changing.add_(1);
    state.settle();
    EXPECT_EQ(state.nbytes(), changing.nbytes());
    EXPECT(!has_problem(state));
  }
  // A constant that is changed after all: what it was is lost, once.
  for (const bool lost : {true, false}) {
    ReachedState state;
    state.note({state_of(constant)});
    constant.add_(1);
    state.settle();
    EXPECT_EQ(has_problem(state), lost);
  }
}

TEST(a_storage_that_is_gone_is_passed_over) {
  ReachedState state;
  {
    const auto buffer = at::zeros({4});
    state.note({state_of(buffer)});
    buffer.add_(1);
    state.settle();
  }
  const StateScope scope(state);
}

TEST(during_the_forward_everything_counts_as_changed) {
  const auto buffer = at::zeros({4});
  ReachedState state;
  state.note({state_of(buffer)});
  buffer.add_(1);
  EXPECT(!has_problem(state));
  {
    const StateScope scope(state);
    EXPECT(at::equal(buffer, at::zeros({4})));
    buffer.add_(1);
  }
  EXPECT(at::equal(buffer, at::ones({4})));
}

TEST_MAIN()
