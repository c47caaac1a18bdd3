// Who receives the tensors that autograd saves: a segment whose forward runs,
// or a replay that fills its slots. A recorder is put onto torch's hook stack
// through Host::make_hook_pair; the top of that stack decides, so nesting, user
// hooks inside a segment and the threads of a backward inside `fn` need no
// bookkeeping of ours: torch carries its stack to all of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <memory>

namespace reprise {

struct RnnState;

class Recorder : public c10::intrusive_ptr_target {
 public:
  // Called for each tensor that autograd is about to save, from any thread,
  // without the interpreter lock. The object may be dropped without its
  // call_pack_hook ever being called (wrapped numbers such as the 2 in x * 2).
  virtual std::unique_ptr<torch::autograd::SavedVariableHooks> make_hooks() = 0;

  // How many segments lie around what is recorded here; 0 for an outermost one.
  virtual int depth() const = 0;

  virtual bool is_replay() const = 0;

  // An RNN of what is recorded here is about to run with this dropout state (rnn_dropout.h).
  // Whoever wants a copy of its values and finds none in `state` makes it.
  virtual void meet_rnn_state(const at::Tensor& buffer, RnnState& state) = 0;
};

}  // namespace reprise
