// The state of one random generator, as small as it can be told exactly.
//
// Three kinds:
//   mt19937  torch's CPU generator: the engine (2,504 bytes) and its two cached
//            normal samples, copied natively. torch's own state tensor has
//            5,056 bytes and costs an allocation and a conversion each way.
//            The engine makes 624 words at a time and hands them out one by one, so
//            that states between two turns share a block of words, and going from one
//            to the other is setting a position.
//   philox   (seed, offset): all there is to know of a CUDA, XPU or MPS
//            generator. Read and written where they lie in torch's CUDA generator
//            (compat::philox_fields) and through virtuals of GeneratorImpl in others,
//            with no header of a device, no tensor and no synchronisation. While a
//            stream is captured a third part says what the offset counts from:
//            Note [Stream capture] in stream_capture.h.
//   opaque   whatever get_state() returns, for every other backend: get_offset
//            of some throws or does not describe the whole state.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "rng/stream_capture.h"
#include "torch_compat.h"

namespace reprise {

struct PhiloxPosition {
  uint64_t seed;
  uint64_t offset;
  CaptureId capture;  // what the offset belongs to
  bool operator==(const PhiloxPosition&) const = default;
};

class GeneratorMark;

// How the state of a generator is told. Decided by device type, in the one table of
// generator_state.cpp.
enum class GeneratorKind : uint8_t { kMt19937, kPhilox, kOpaque };
GeneratorKind kind_of(const at::Generator& generator);

// A generator with its mutex held, as every reader of one must hold it: for several looks
// and changes at once. On a machine with eight devices the looks are what costs.
class HeldGenerator {
 public:
  explicit HeldGenerator(const at::Generator& generator);
  HeldGenerator(const HeldGenerator&) = delete;
  HeldGenerator& operator=(const HeldGenerator&) = delete;

  c10::GeneratorImpl& impl() const { return impl_; }
  GeneratorKind kind() const { return kind_; }
  // See stream_capture.h; asked once, for a stream is captured by the thread that looks.
  bool is_captured();

 private:
  c10::GeneratorImpl& impl_;
  const GeneratorKind kind_;
  std::optional<bool> captured_;
  std::lock_guard<std::mutex> lock_;
};

// Are what two generators draw from one sequence, as graphsafe_set_state() makes it?
bool share_state(const at::Generator& a, const at::Generator& b);

// Note [Clock]
//
//   def forward(self, x):
//       if not self.made:                   # a lazy module, in its first call
//           self.scale, self.made = torch.rand(4), True
//       return dropout(x * self.scale)      # the replay draws other numbers here
//
// A replay that is stopped early does not get to where the forward left a generator. But it
// must pass each saved tensor at the same point of the sequence: a number that draws change,
// compared there. Of the default generator of the tensor's device, if that is the CPU or a CUDA
// device; 0 for others.
using DrawClock = uint16_t;
DrawClock draw_clock(const at::Generator& generator);

class GeneratorState {
 public:
  using Kind = GeneratorKind;

  // Note [Drawn and put back]
  //
  //   with torch.random.fork_rng():
  //       noise = torch.rand(8)      # the generator stands where it stood, afterwards
  //
  // A forward that ends where it began may have drawn all the same, so equal
  // states do not show that its replay needs none. But an engine cannot come back
  // by drawing; somebody must set it. A mark in the padding of the engine's data
  // tells: copies and draws leave it alone, a seed or a state that is set does not
  // carry it. (The standard lets padding change at any copy. Then the state is
  // kept, which is always right.)
  //
  // capture() gives an engine without a mark one that no other has, so that a segment
  // which begins after a state was set, inside of another one, does not make that one
  // believe that nothing happened. (There are 2^24 marks, of which
  // a thread takes fifteen at once; then they begin again.) Padding
  // that is not the mark which the generator was given last is no mark.
  //
  // What is left: torch.get_rng_state() copies a marked engine to the stack, and a later
  // torch.manual_seed() could leave that very padding behind. It matters where the segment
  // began right after the same seed.
  //
  // is_untouched_since(): is the mark still the one that was there at the capture, and
  // the state this one? Always false for other kinds than mt19937.
  bool is_untouched_since(HeldGenerator& generator) const;
  bool is_untouched_since(const at::Generator& generator) const {
    HeldGenerator held(generator);
    return is_untouched_since(held);
  }

  // Where it stands now. Consecutive captures of a CPU generator give states that share their
  // memory as long as it makes no new words in between. Marks it: Note [Drawn and put back].
  static GeneratorState capture(HeldGenerator& generator);
  static GeneratorState capture(const at::Generator& generator) {
    HeldGenerator held(generator);
    return capture(held);
  }
  // The same, for a generator that most likely will not move. Where that is enough, a Philox
  // state is told from its fields alone, and is_still_of() needs no mutex for it; what it is in
  // a stream capture is settled when it is known whether there was one: kNotAsked.
  static GeneratorState glance(HeldGenerator& generator);
  static GeneratorState glance(const at::Generator& generator) {
    HeldGenerator held(generator);
    return glance(held);
  }
  // The same in the place of this one, whose memory it shares where it can.
  void look_again(HeldGenerator& generator);
  bool is_glance() const { return kind_ == Kind::kPhilox && philox_.capture == kNotAsked; }
  // Are both Philox states, told in the same way, and is there no difference?
  bool is_same_glance(const GeneratorState& other) const {
    return kind_ == Kind::kPhilox && other.kind_ == Kind::kPhilox && philox_ == other.philox_ &&
           kept_ == other.kept_ && keeps_rnn_state_ == other.keeps_rnn_state_;
  }
  // Is it one, at what is `state` outside of captures?
  bool is_glance_at(const GeneratorState& state) const {
    return is_glance() && state.kind_ == Kind::kPhilox && philox_.seed == state.philox_.seed &&
           philox_.offset == state.philox_.offset && state.philox_.capture == kNoCapture &&
           keeps_rnn_state_ == state.keeps_rnn_state_;
  }
  // What a glance has seen, if the generator is at `mark` since and nothing else than draws and
  // states that were set, in the same capture or in none, lies between.
  GeneratorState settled(const GeneratorMark& mark) const;
  // A state that was never noted but is known.
  static GeneratorState philox(uint64_t seed, uint64_t offset);
  // False, and nothing is done, for a Philox state of another stream capture than
  // the one that the generator's device is in now.
  // `new_to_rnns`: as torch's set_state() does, after which an RNN draws a new seed for its
  // dropout, whatever it did before this state was captured.
  bool apply(HeldGenerator& generator, bool new_to_rnns = false) const;
  bool apply(const at::Generator& generator) const {
    HeldGenerator held(generator);
    return apply(held);
  }

  // The same where the generator does not stand there already.
  bool set(const at::Generator& generator) const {
    HeldGenerator held(generator);
    return is_state_of(held) || apply(held);
  }

  // Does `generator` stand where this state was captured? Cheaper than a
  // capture: nothing is allocated for mt19937 and philox.
  bool is_state_of(HeldGenerator& generator) const;
  bool is_state_of(const at::Generator& generator) const {
    HeldGenerator held(generator);
    return is_state_of(held);
  }
  // The same, for a generator that stands at `mark`: no look at it is needed where
  // the mark is the whole state, which is so for philox, or tells that it is not.
  bool is_state_of(HeldGenerator& generator, const GeneratorMark& mark) const;

  // Is the generator that this was told from still there, and was it since, as far as that can be
  // told without its mutex? Whoever draws from it meanwhile does so before or after.
  bool is_still_of(const at::Generator& generator) const {
    return kind_ == Kind::kMt19937
               ? is_untouched(*generator.unsafeGetGeneratorImpl())
               : is_glance() && compat::at_philox(*generator.unsafeGetGeneratorImpl(), *kept_,
                                                  philox_.seed, philox_.offset, keeps_rnn_state_);
  }

  bool operator==(const GeneratorState& other) const;

  // torch's own form of a state: what get_state() of such a generator returns.
  at::Tensor to_tensor() const;
  static GeneratorState from_tensor(const at::Generator& generator, const at::Tensor& tensor);

  Kind kind() const { return kind_; }
  // Of a CUDA generator: it was not given a seed or a state since an RNN drew the seed of its
  // dropout from it (rnn_dropout.h). False where that is unknown, as torch leaves it.
  bool keeps_rnn_state() const { return keeps_rnn_state_; }
  // Of a default generator that stands here; nothing where clocks do not tell.
  std::optional<DrawClock> clock() const;
  // Bytes this state keeps alive; the same address() means the same bytes.
  size_t nbytes() const;
  const void* address() const;
  // "seed 3, offset 12", for messages.
  std::string describe() const;
  // How far it is from here to `mark`: 32-bit words of mt19937, Philox offsets.
  // None if the mark is not ahead, is very far, or the state is opaque.
  std::optional<uint64_t> draws_until(const GeneratorMark& mark) const;

 private:
  friend class GeneratorMark;
  friend DrawClock draw_clock(const at::Generator& generator);
  bool is_untouched(c10::GeneratorImpl& cpu) const;
  // Of a Philox generator that stands here, outside of captures: is its flag this one's as well?
  bool has_flag_of(HeldGenerator& generator) const;
  struct Mt19937;  // what concerns that kind alone

  // What is left of pairs of normal samples.
  struct Samples {
    double for_double;
    float for_float;
    bool has_double;
    bool has_float;
  };

  // 48 bytes, whatever the kind: the stash of a segment on eight devices is copied, filled
  // and compared more often than anything else here.
  Kind kind_ = Kind::kPhilox;
  bool keeps_rnn_state_ = false;  // philox
  // mt19937: how many words of the block are left, which is next, the engine's mark.
  uint16_t left_ = 0;
  uint16_t next_ = 0;
  uint32_t stamp_ = 0;
  union {
    PhiloxPosition philox_ = {0, 0, kNoCapture};
    Samples samples_;  // mt19937
  };
  // mt19937: the Mt19937Block; opaque: a tensor; a glance: the owner of the fields. Shared.
  c10::intrusive_ptr<c10::intrusive_ptr_target> kept_;
};

// Where a generator stands, to be compared and told but not restored: what a
// replay is checked against. 48 bytes for every kind.
class GeneratorMark {
 public:
  static GeneratorMark of(HeldGenerator& generator);
  static GeneratorMark of(const at::Generator& generator) {
    HeldGenerator held(generator);
    return of(held);
  }
  // Of a generator that stands where a glance has seen it, and that no capture concerns.
  static GeneratorMark of(const GeneratorState& glance);

  bool operator==(const GeneratorMark& other) const;
  // Is this further on than `other`? Unknown for opaque states, after a new
  // seed, and for mt19937 unless both stand in the same block of 624 words.
  bool is_beyond(const GeneratorMark& other) const;
  // Do the two belong to different stream captures, or only one to any?
  bool is_elsewhere(const GeneratorMark& other) const {
    return kind_ == GeneratorKind::kPhilox && block_ != other.block_;
  }
  // Did the generator come here from `begin` by draws alone? False where unknown.
  bool only_drawn_since(const GeneratorState& begin) const {
    return stamp_ != 0 && stamp_ == begin.stamp_;
  }
  std::string describe() const;

 private:
  friend class GeneratorState;

  GeneratorState::Kind kind_ = GeneratorState::Kind::kPhilox;
  uint64_t seed_ = 0;
  uint64_t position_ = 0;  // philox: offset; mt19937: word of the block
  // mt19937: hash of the 624 words; opaque: of all bytes; philox: the stream capture
  // that position_ belongs to.
  uint64_t block_ = 0;
  uint64_t cached_ = 0;  // mt19937: hash of the cached normal samples
  uint32_t stamp_ = 0;   // mt19937: how it came here, not where it is: not compared
};

}  // namespace reprise
