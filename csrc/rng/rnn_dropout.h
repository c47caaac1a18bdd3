// What cuDNN draws from for the dropout between the layers of an RNN.
//
//   lstm = nn.LSTM(16, 16, num_layers=2, dropout=0.5).cuda()
//   checkpoint(lstm, x, use_reentrant=False)
//
// It is no generator: torch keeps one buffer per device, in that device's memory (6 MB on an H100),
// which each such operator in training reads and moves on. It is made anew, with a number drawn
// from the device's default generator, by the first operator after that generator was given a seed
// or a state: compat::PhiloxFields::keeps_rnn_state, which belongs to that generator's state here.
// Nobody hands the buffer out, but autograd saves it, right before the operator runs. Then the
// segments around it copy it, and a replay puts the copy there at the same point, and what was
// there back at its end.
//
// Not seen, since nothing is saved: an RNN under no_grad or under saved-tensor hooks of the
// user's, and all of the reentrant form. Nor which stream an RNN ran on: what is put back at the
// end is put back on the current one. And a buffer that an RNN outside of any segment made anew is
// known from the next one on that is inside.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

namespace reprise {

// Of one operator.
struct RnnState {
  at::Tensor values;          // a copy
  bool is_in_another_buffer;  // than the one before: made anew by it, as far as we have seen
};
using RnnStates = std::vector<RnnState>;  // in the order of the operators

// Autograd saves `tensor`. If it is such a buffer, the recorders on this thread are told, from
// the outermost one that it concerns to the innermost: Recorder::meet_rnn_state().
void meet_if_rnn_state(const at::Tensor& tensor);
at::Tensor copy_of_rnn_state(const at::Tensor& buffer);
// For tests without cuDNN: what it would say of a device.
void set_rnn_state_size(c10::DeviceIndex device, int64_t bytes);

// Of one replay, of a segment that keeps `states`; those must outlive it.
class RnnRewind {
 public:
  explicit RnnRewind(const RnnStates& states);
  ~RnnRewind() { put_back(); }
  RnnRewind(const RnnRewind&) = delete;
  RnnRewind& operator=(const RnnRewind&) = delete;

  // The next operator is about to run with `buffer`.
  void rewind(const at::Tensor& buffer);

 private:
  void put_back() noexcept;

  // Of a device.
  struct Outer {
    at::Tensor buffer;  // the one that is in use
    at::Tensor values;  // what it held before the replay
  };
  std::vector<Outer> outer_;
  const RnnStates& states_;
  size_t next_ = 0;
};

}  // namespace reprise
