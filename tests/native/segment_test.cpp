// The life of a segment without Python: forward, replay, early stop, release.
#include "segment/segment.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/variable.h>

#include <functional>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "segment/ledger.h"
#include "segment/reentrant.h"
#include "test_host.h"

using reprise::Ledger;
using reprise::Segment;

namespace {

using Tensors = std::vector<at::Tensor>;
using Function = std::function<Tensors(const Tensors&)>;

class FunctionProgram final : public reprise::Program {
 public:
  explicit FunctionProgram(Function function) : function_(std::move(function)) {}
  Outcome run(Tensors inputs, const std::atomic<bool>& stopped) override {
    try {
      function_(inputs);
    } catch (const EarlyStop&) {
      EXPECT(stopped.load());
      return Outcome::kStopped;
    }
    return Outcome::kFinished;
  }
  Tensors run_for_outputs(Tensors inputs) override { return function_(inputs); }
  std::string name() const override { return "function"; }

 private:
  Function function_;
};

struct NothingAlive {
  ~NothingAlive() {
    TestHost::install().drop_pairs();
    EXPECT_EQ(Ledger::get().live_segments(), 0u);
    EXPECT_EQ(Ledger::get().live_slots(), 0u);
    EXPECT_EQ(Ledger::get().stashed_bytes(), 0u);
  }
};

at::Tensor leaf(at::IntArrayRef sizes) { return at::randn(sizes).set_requires_grad(true); }

at::Tensor checkpoint(const Function& function, const Tensors& inputs,
                      reprise::SegmentOptions options = {}) {
  auto& host = TestHost::install();
  auto segment = Segment::begin(std::make_unique<FunctionProgram>(function), inputs, options,
                                reprise::current_depth());
  at::Tensor output;
  {
    reprise::compat::HookScope hooks(host.make_hook_pair(segment));
    output = function(inputs)[0];
  }
  segment->end_forward();
  return output;
}

at::Tensor checkpoint_reentrant(const Function& function, const Tensors& inputs) {
  TestHost::install();
  auto segment = Segment::begin(std::make_unique<FunctionProgram>(function), inputs, {}, 0);
  at::Tensor output;
  {
    const c10::AutoGradMode no_grad(false);
    output = function(inputs)[0];
  }
  segment->end_forward();
  return *reprise::join_graph(segment, inputs, {output})[0];
}

Tensors gradients(const at::Tensor& output, const Tensors& inputs, bool keep_graph = false,
                  bool create_graph = false) {
  torch::autograd::edge_list edges;
  for (const auto& input : inputs) {
    edges.push_back(torch::autograd::impl::gradient_edge(input));
  }
  return torch::autograd::Engine::get_default_engine().execute(
      {torch::autograd::impl::gradient_edge(output)}, {at::ones_like(output)}, keep_graph,
      create_graph, /*accumulate_grad=*/false, edges);
}

Tensors mixing(const Tensors& in) {
  auto h = at::tanh(at::matmul(in[0], in[1]));
  h = at::dropout(h, 0.5, /*train=*/true);
  return {at::sin(at::matmul(h, in[1])) * 2};
}

bool same(const Tensors& a, const Tensors& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!at::equal(a[i], b[i])) {
      return false;
    }
  }
  return a.size() == b.size();
}

at::Tensor cpu_state() {
  auto generator = at::globalContext().defaultGenerator(at::kCPU);
  return generator.get_state();
}

}  // namespace

TEST(both_forms_give_the_bits_of_the_plain_call) {
  const NothingAlive at_the_end;
  const Tensors inputs = {leaf({3, 4}), leaf({4, 4})};
  at::manual_seed(5);
  const auto plain = mixing(inputs)[0];
  const auto expected = gradients(plain, inputs);
  const auto state = cpu_state();
  for (const bool reentrant : {false, true}) {
    at::manual_seed(5);
    const auto output =
        reentrant ? checkpoint_reentrant(mixing, inputs) : checkpoint(mixing, inputs);
    EXPECT(at::equal(output, plain));
    const auto found = gradients(output, inputs);
    EXPECT(same(found, expected));
    EXPECT(at::equal(cpu_state(), state));
  }
}

TEST(one_replay_for_each_graph_task) {
  const NothingAlive at_the_end;
  const Tensors inputs = {leaf({3, 4}), leaf({4, 4})};
  const auto output = checkpoint(mixing, inputs);
  const auto before = Ledger::get().replays();
  const auto first = gradients(output, inputs, /*keep_graph=*/true);
  EXPECT_EQ(Ledger::get().replays() - before, 1u);
  const auto second = gradients(output, inputs);
  EXPECT_EQ(Ledger::get().replays() - before, 2u);
  EXPECT(same(first, second));
}

TEST(only_generators_that_moved_are_kept) {
  const NothingAlive at_the_end;
  const Tensors inputs = {leaf({3, 4}), leaf({4, 4})};
  const auto quiet = checkpoint(
      [](const Tensors& in) { return Tensors{at::sin(at::matmul(in[0], in[1]))}; }, inputs);
  EXPECT_EQ(Ledger::get().stashed_bytes(), 0u);
  const auto noisy = checkpoint(mixing, inputs);
  EXPECT(Ledger::get().stashed_bytes() > 2500 && Ledger::get().stashed_bytes() < 2600);
}

TEST(early_stop_skips_what_nobody_needs) {
  const NothingAlive at_the_end;
  int calls = 0;
  const Function function = [&calls](const Tensors& in) {
    auto h = at::sin(in[0]);  // the last tensor that is saved
    ++calls;
    return Tensors{h + 1};
  };
  const Tensors inputs = {leaf({4})};
  gradients(checkpoint(function, inputs), inputs);
  EXPECT_EQ(calls, 1);
  reprise::SegmentOptions options;
  options.early_stop = false;
  gradients(checkpoint(function, inputs, options), inputs);
  EXPECT_EQ(calls, 3);
}

TEST(nested_segments_and_higher_derivatives) {
  const NothingAlive at_the_end;
  const Function inner = [](const Tensors& in) { return Tensors{at::sin(in[0] * in[0])}; };
  const Function plain = [&](const Tensors& in) {
    return Tensors{at::exp(inner({at::tanh(in[0])})[0])};
  };
  const Function outer = [&](const Tensors& in) {
    return Tensors{at::exp(checkpoint(inner, {at::tanh(in[0])}))};
  };
  const Tensors inputs = {leaf({5})};
  Tensors results[2];
  for (const bool nested : {false, true}) {
    const auto output = nested ? checkpoint(outer, inputs) : plain(inputs)[0];
    const auto first = gradients(output, inputs, true, /*create_graph=*/true);
    results[nested] = gradients(first[0].sum(), inputs);
    results[nested].push_back(first[0].detach());
  }
  EXPECT(same(results[0], results[1]));
}

TEST(a_mismatch_names_position_line_and_shapes) {
  const NothingAlive at_the_end;
  int64_t width = 4;
  const Function function = [&width](const Tensors& in) {
    return Tensors{at::sin(in[0].narrow(0, 0, width)).sum()};
  };
  const Tensors inputs = {leaf({4})};
  const auto output = checkpoint(function, inputs);
  width = 3;
  std::string message;
  try {
    gradients(output, inputs, /*keep_graph=*/true);
  } catch (const CheckpointError& error) {
    message = error.what();
  }
  for (const char* part : {"position 0", "test.cpp:", "float32 [4] on cpu", "float32 [3] on cpu",
                           "SinBackward0", "replay of function"}) {
    if (message.find(part) == std::string::npos) {
      check::fail(__FILE__, __LINE__) << "'" << part << "' is not in: " << message << '\n';
    }
  }
  width = 4;
  EXPECT_EQ(gradients(output, inputs).size(), 1u);  // nothing was broken by the error
}

TEST(an_error_in_the_replay_leaves_everything_as_it_was) {
  const NothingAlive at_the_end;
  bool fail = false;
  const Function function = [&fail](const Tensors& in) {
    auto h = at::dropout(at::sin(in[0]), 0.5, true);
    if (fail) {
      throw std::out_of_range("fn failed");
    }
    return Tensors{at::exp(h)};
  };
  const Tensors inputs = {leaf({4})};
  const auto output = checkpoint(function, inputs);
  const auto state = cpu_state();
  fail = true;
  EXPECT_THROWS(gradients(output, inputs, /*keep_graph=*/true), std::exception);
  EXPECT(at::equal(cpu_state(), state));
  EXPECT(reprise::compat::top_pack_hook() == nullptr);
  fail = false;
  EXPECT_EQ(gradients(output, inputs).size(), 1u);
}

TEST(a_recording_has_a_row_for_each_segment) {
  const NothingAlive at_the_end;
  const Tensors inputs = {leaf({3, 4}), leaf({4, 4})};
  const auto recording = Ledger::get().start_recording();
  gradients(checkpoint(mixing, inputs), inputs);
  Ledger::get().stop_recording(recording);
  gradients(checkpoint(mixing, inputs), inputs);
  EXPECT_EQ(recording->rows.size(), 1u);
  const auto& row = *recording->rows[0];
  EXPECT_EQ(row.replays, 1u);
  EXPECT(row.slots > 4);
  EXPECT(row.generators == std::vector<std::string>{"cpu"});
}

TEST(memory_that_runs_out_in_a_replay_leaves_nothing_behind) {
  const NothingAlive at_the_end;
  const Tensors inputs = {leaf({3, 4}), leaf({4, 4})};
  for (int fail_at = 2; fail_at < 4; ++fail_at) {
    int calls = 0;
    const Function function = [&calls, fail_at](const Tensors& in) {
      if (++calls == fail_at) {
        at::rand({3});
        throw std::bad_alloc();
      }
      return mixing(in);
    };
    at::manual_seed(5);
    const auto output = checkpoint(function, inputs);
    const auto state = cpu_state();
    bool failed = false;
    for (int i = 0; i < 3; ++i) {
      try {
        gradients(output, inputs, /*keep_graph=*/true);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      EXPECT(at::equal(cpu_state(), state));
    }
    EXPECT(failed);
    at::manual_seed(5);
    const auto expected = gradients(mixing(inputs)[0], inputs);
    EXPECT(same(gradients(output, inputs, /*keep_graph=*/true), expected));
  }
}

TEST_MAIN()
