#include "rng/generator_state.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/MT19937RNGEngine.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <optional>
#include <typeinfo>

#include "own_numbers.h"
#include "per_thread.h"
#include "pool.h"
#include "torch_compat.h"

namespace reprise {

// The words of an engine; immutable once made, shared between states.
// Pooled: asking malloc for 2.5 KB makes it tidy up all small blocks first, which costs a segment
// several times what is done with the state.
struct Mt19937Block final : c10::intrusive_ptr_target, Pooled<Mt19937Block> {
  explicit Mt19937Block(const at::mt19937_data_pod& now) {
    std::memcpy(&engine, &now, sizeof(now));
  }

  at::mt19937_data_pod engine;  // its position is that of the first capture
};

namespace {

using Block = c10::intrusive_ptr<Mt19937Block>;

// Somebody may register a CPU generator class of their own: that one is opaque.
bool is_cpu_generator(const c10::GeneratorImpl& impl) {
  return typeid(impl) == typeid(at::CPUGeneratorImpl);
}

// The words of an engine and what they came from, not how many of them are used up.
bool same_words(const at::mt19937_data_pod& a, const at::mt19937_data_pod& b) {
  return a.seed_ == b.seed_ && a.seeded_ == b.seeded_ &&
         std::memcmp(a.state_.data(), b.state_.data(), sizeof(a.state_)) == 0;
}

// The same for two that came about by draws from one marked state. A turn replaces every
// word, so that sixteen of them tell two turns apart.
bool same_turn(const at::mt19937_data_pod& a, const at::mt19937_data_pod& b) {
  return std::memcmp(a.state_.data(), b.state_.data(), 16 * sizeof(a.state_[0])) == 0;
}

// The three bytes between seeded_ and next_: see Note [Drawn and put back]. 0: no mark.
constexpr size_t kPadding = offsetof(at::mt19937_data_pod, seeded_) + sizeof(bool);
static_assert(offsetof(at::mt19937_data_pod, next_) == kPadding + 3);

uint32_t stamp_of(const at::mt19937_data_pod& data) {
  uint32_t stamp = 0;
  std::memcpy(&stamp, reinterpret_cast<const char*>(&data) + kPadding, 3);
  return stamp;
}

void set_stamp(at::mt19937_data_pod& data, uint32_t stamp) {
  std::memcpy(reinterpret_cast<char*>(&data) + kPadding, &stamp, 3);
}

// Never 0.
uint32_t new_stamp() { return own_number<Mt19937Block>() & 0xffffff; }

// The mark that a generator was given last. What else its padding has is no mark: a seed
// leaves there what was on the stack, which may be the same the next time. By address, so that
// generators may take each other's place: then one gets a new mark, and its state is kept.
// Callers hold the generator's mutex.
std::atomic<uint32_t>& given_stamp(const at::CPUGeneratorImpl& generator) {
  static std::array<std::atomic<uint32_t>, 256> stamps{};
  return stamps[(reinterpret_cast<uintptr_t>(&generator) >> 6) % stamps.size()];
}

uint32_t give_stamp(const at::CPUGeneratorImpl& generator, at::mt19937_data_pod& data) {
  const uint32_t stamp = new_stamp();
  given_stamp(generator).store(stamp, std::memory_order_relaxed);
  set_stamp(data, stamp);
  return stamp;
}

// Are these the words of the engine that had this mark when they were noted?
bool has_words(const at::mt19937_data_pod& now, const at::mt19937_data_pod& then, uint32_t stamp) {
  return stamp != 0 && stamp_of(now) == stamp ? same_turn(now, then) : same_words(now, then);
}

// The words that the last CPU generator had that was captured or set on this thread, and
// its mark.
struct LastBlock {
  Block block;
  uint32_t stamp = 0;
};

// Not cryptographic: it tells states of one generator apart, of which a program
// meets few.
uint64_t hash_bytes(const void* data, size_t size) {
  constexpr uint64_t kFactor = 0xff51afd7ed558ccdull;
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t hash = 0x9e3779b97f4a7c15ull ^ size;
  for (; size >= 8; size -= 8, bytes += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes, 8);
    hash = (hash ^ word) * kFactor;
    hash ^= hash >> 32;
  }
  for (; size > 0; --size, ++bytes) {
    hash = (hash ^ *bytes) * kFactor;
  }
  return hash;
}

// Tells the blocks of 624 words of an engine apart. Drawing on replaces every word,
// and so does a seed, so the first eight do.
uint64_t hash_block(const at::mt19937_data_pod& data) { return hash_bytes(data.state_.data(), 32); }

// --- Philox, see Note [Stream capture]. Callers hold the generator's mutex.

// What CUDA, XPU and MPS agree on: seed, then offset, as 64-bit integers.
constexpr size_t kPhiloxBytes = 16;

at::Tensor philox_tensor(uint64_t seed, uint64_t offset) {
  auto tensor = at::empty({kPhiloxBytes}, at::kByte);
  auto* bytes = static_cast<uint8_t*>(tensor.mutable_data_ptr());
  std::memcpy(bytes, &seed, 8);
  std::memcpy(bytes + 8, &offset, 8);
  return tensor;
}

PhiloxPosition position_in_capture(const c10::GeneratorImpl& impl) {
  const OnDevice there(impl.device());
  const CaptureId capture = capture_of(impl.device());
  try {
    const at::Tensor state(impl.get_state());
    uint64_t offset = 0;
    std::memcpy(&offset, static_cast<const uint8_t*>(state.const_data_ptr()) + 8, 8);
    return {impl.current_seed(), offset, capture};
  } catch (const c10::Error&) {
    return {impl.current_seed(), 0, kForeignCapture};
  }
}

// What the virtuals say.
PhiloxPosition position_outside_captures(const c10::GeneratorImpl& impl) {
  return {impl.current_seed(), impl.get_offset(), kNoCapture};
}

// Out of line, so that what happens always is short.
[[gnu::noinline, gnu::cold]] PhiloxPosition position_while_refused(const c10::GeneratorImpl& impl) {
  const auto type = impl.device().type();
  if (!is_captured(impl.device())) {
    // A stream of the current device is captured, which may be another device than
    // the generator's; or this is an error of another kind.
    if (!current_device_is_captured(type)) {
      return position_outside_captures(impl);
    }
    const OnDevice there(impl.device());
    if (!current_device_is_captured(type)) {
      return position_outside_captures(impl);
    }
  }
  return position_in_capture(impl);
}

PhiloxPosition position_of(HeldGenerator& generator) {
  auto& impl = generator.impl();
  if (const auto fields = compat::philox_fields(impl)) {
    return generator.is_captured() ? position_in_capture(impl)
                                   : PhiloxPosition{fields->seed, fields->offset, kNoCapture};
  }
  if (!is_captured_unnoticed(impl.device())) {
    try {
      return position_outside_captures(impl);
    } catch (const c10::Error&) {  // refused, or an error that comes again below
    }
  }
  return position_while_refused(impl);
}

// Does a generator that was at `then` stand there `now`? Of which its capture was asked.
bool is_same(const PhiloxPosition& then, const PhiloxPosition& now) {
  if (then.capture != kNotAsked) {
    return then == now;
  }
  return then.seed == now.seed && now.offset == (now.capture == kNoCapture ? then.offset : 0);
}

// ", offset 12", as the end of a description.
std::string describe_offset(uint64_t offset, CaptureId capture) {
  if (!is_in_capture(capture)) {
    return c10::str(", offset ", offset);
  }
  if (capture == kForeignCapture) {
    return ", in a stream capture that torch did not begin";
  }
  return c10::str(", offset ", offset, " from the launch of the graph of stream capture ", capture);
}

// False, and nothing is changed, if the device is in another capture now.
bool set_position(HeldGenerator& generator, const PhiloxPosition& position, bool keeps_rnn_state) {
  auto& impl = generator.impl();
  if (generator.is_captured()) {
    const OnDevice there(impl.device());
    const bool is_any = position.capture == kNotAsked;
    if (position.capture == kNoCapture ||
        (!is_any && position.capture != capture_of(impl.device()))) {
      return false;
    }
    const at::Tensor state = philox_tensor(position.seed, is_any ? 0 : position.offset);
    impl.set_state(*state.unsafeGetTensorImpl());
    return true;
  }
  if (is_in_capture(position.capture)) {
    return false;
  }
  constexpr uint64_t kMultiple = 4;  // torch refuses other offsets, in words of its own
  if (const auto fields = compat::philox_fields(impl);
      fields.has_value() && position.offset % kMultiple == 0) {
    fields->seed = position.seed;
    fields->offset = position.offset;
    if (keeps_rnn_state) {
      fields->keeps_rnn_state.test_and_set();
    } else {
      fields->keeps_rnn_state.clear();
    }
    return true;
  }
  const auto set = [&] {
    if (impl.current_seed() != position.seed) {
      impl.set_current_seed(position.seed);
    }
    impl.set_offset(position.offset);
  };
  try {
    set();
    return true;
  } catch (const c10::Error&) {  // as in position_while_refused()
    if (!current_device_is_captured(impl.device().type())) {
      throw;
    }
  }
  const OnDevice there(impl.device());
  if (current_device_is_captured(impl.device().type())) {
    return false;
  }
  set();
  return true;
}

}  // namespace

GeneratorKind kind_of(const at::Generator& generator) {
  using Kind = GeneratorKind;
  switch (generator.device().type()) {
    case c10::DeviceType::CPU:
      return is_cpu_generator(*generator.unsafeGetGeneratorImpl()) ? Kind::kMt19937 : Kind::kOpaque;
    case c10::DeviceType::CUDA:  // CUDAGeneratorImpl: philox seed and offset, nothing else
    case c10::DeviceType::XPU:   // XPUGeneratorImpl: the same two
    case c10::DeviceType::MPS:   // MPSGeneratorImpl: the same two
      return Kind::kPhilox;
    default:  // get_offset may throw or not tell the whole state
      return Kind::kOpaque;
  }
}

HeldGenerator::HeldGenerator(const at::Generator& generator)
    : impl_(*generator.unsafeGetGeneratorImpl()), kind_(kind_of(generator)), lock_(impl_.mutex_) {}

bool HeldGenerator::is_captured() {
  if (!captured_.has_value()) {
    captured_ = reprise::is_captured(impl_.device());
  }
  return *captured_;
}

bool share_state(const at::Generator& a, const at::Generator& b) {
  const auto owner = [](const at::Generator& generator) -> const void* {
    HeldGenerator held(generator);
    const auto fields = compat::philox_fields(held.impl());
    return fields.has_value() ? fields->owner : nullptr;
  };
  const void* of_a = owner(a);
  return of_a != nullptr && of_a == owner(b);
}

struct GeneratorState::Mt19937 {
  // How many words of a block are used up. A new block is made when one more is asked for.
  static uint64_t position(int left, uint32_t next) { return left == 1 ? 624 : next; }

  static const at::mt19937_data_pod& words(const GeneratorState& state) {
    return static_cast<const Mt19937Block&>(*state.kept_).engine;
  }

  static bool same_samples(const Samples& a, const Samples& b) {
    return a.has_double == b.has_double && a.has_float == b.has_float &&
           std::memcmp(&a.for_double, &b.for_double, sizeof(a.for_double)) == 0 &&
           std::memcmp(&a.for_float, &b.for_float, sizeof(a.for_float)) == 0;
  }

  // The rest with the generator's mutex held.

  static Samples samples(at::CPUGeneratorImpl& generator) {
    const auto& for_double = compat::double_sample(generator);
    const auto& for_float = compat::float_sample(generator);
    return {for_double.value_or(0), for_float.value_or(0), for_double.has_value(),
            for_float.has_value()};
  }

  static bool stands_at(at::CPUGeneratorImpl& generator, const at::mt19937_data_pod& now,
                        const GeneratorState& state) {
    // The position decides nearly always.
    return now.left_ == state.left_ && now.next_ == state.next_ &&
           has_words(now, words(state), state.stamp_) &&
           same_samples(samples(generator), state.samples_);
  }

  static void capture(at::CPUGeneratorImpl& generator, GeneratorState& state) {
    at::mt19937_data_pod& now = compat::mt19937_data(generator);
    LastBlock& last = per_thread<LastBlock>();
    if (!last.block || !has_words(now, last.block->engine, last.stamp)) {
      last.block = c10::make_intrusive<Mt19937Block>(now);
    }
    last.stamp = stamp_of(now);
    if (last.stamp != given_stamp(generator).load(std::memory_order_relaxed) || last.stamp == 0) {
      last.stamp = give_stamp(generator, now);
    }
    if (state.kept_.get() != last.block.get()) {  // counts cost more than all else here
      state.kept_ = last.block;
    }
    state.stamp_ = last.stamp;
    state.left_ = static_cast<uint16_t>(now.left_);
    state.next_ = static_cast<uint16_t>(now.next_);
    state.samples_ = samples(generator);
  }

  static void apply(at::CPUGeneratorImpl& generator, const GeneratorState& state) {
    at::mt19937_data_pod& data = compat::mt19937_data(generator);
    LastBlock& last = per_thread<LastBlock>();
    const uint32_t stamp = stamp_of(data);
    const bool has_them =
        stamp != 0 &&
        (stamp == state.stamp_ || (stamp == last.stamp && last.block.get() == state.kept_.get())) &&
        same_turn(data, words(state));
    if (!has_them) {
      std::memcpy(&data, &words(state), sizeof(data));
    }
    data.left_ = state.left_;
    data.next_ = state.next_;
    const Samples& samples = state.samples_;
    compat::double_sample(generator) =
        samples.has_double ? std::optional<double>(samples.for_double) : std::nullopt;
    compat::float_sample(generator) =
        samples.has_float ? std::optional<float>(samples.for_float) : std::nullopt;
    // It is set, not drawn to: another mark than any before.
    if (last.block.get() != state.kept_.get()) {
      last.block = c10::static_intrusive_pointer_cast<Mt19937Block>(state.kept_);
    }
    last.stamp = give_stamp(generator, data);
  }
};

namespace {

at::CPUGeneratorImpl& cpu_of(const HeldGenerator& mt19937) {
  return static_cast<at::CPUGeneratorImpl&>(mt19937.impl());
}

// An opaque state, which is a byte tensor in host memory (at::Generator's contract).
const c10::TensorImpl& bytes_of(const c10::intrusive_ptr<c10::intrusive_ptr_target>& kept) {
  return static_cast<const c10::TensorImpl&>(*kept);
}

size_t size_of(const c10::TensorImpl& bytes) {
  return static_cast<size_t>(bytes.numel()) * bytes.itemsize();
}

}  // namespace

bool GeneratorState::is_untouched_since(HeldGenerator& generator) const {
  return kind_ == Kind::kMt19937 && is_untouched(generator.impl());
}

bool GeneratorState::is_untouched(c10::GeneratorImpl& generator) const {
  auto& cpu = static_cast<at::CPUGeneratorImpl&>(generator);
  const at::mt19937_data_pod& now = compat::mt19937_data(cpu);
  return stamp_of(now) == stamp_ && Mt19937::stands_at(cpu, now, *this);
}

GeneratorState GeneratorState::capture(HeldGenerator& generator) {
  GeneratorState state;
  state.kind_ = generator.kind();
  switch (state.kind_) {
    case Kind::kMt19937:
      Mt19937::capture(cpu_of(generator), state);
      break;
    case Kind::kPhilox:
      state.philox_ = position_of(generator);
      if (const auto fields = compat::philox_fields(generator.impl())) {
        state.keeps_rnn_state_ = fields->keeps_rnn_state.test();
      }
      break;
    case Kind::kOpaque:
      state.kept_ = generator.impl().get_state();
      break;
  }
  return state;
}

namespace {

// The seed and offset of a generator of which nothing was drawn in any capture.
std::optional<compat::PhiloxFields> fields_at_a_glance(const HeldGenerator& generator) {
  if (generator.kind() == GeneratorKind::kPhilox) {
    const auto fields = compat::philox_fields(generator.impl());
    if (fields.has_value() && !fields->drawn_in_capture) {
      return fields;
    }
  }
  return std::nullopt;
}

}  // namespace

GeneratorState GeneratorState::glance(HeldGenerator& generator) {
  const auto fields = fields_at_a_glance(generator);
  if (!fields.has_value()) {
    return capture(generator);
  }
  GeneratorState state;
  state.philox_ = {fields->seed, fields->offset, kNotAsked};
  state.keeps_rnn_state_ = fields->keeps_rnn_state.test();
  state.kept_ = c10::intrusive_ptr<c10::intrusive_ptr_target>::reclaim_copy(fields->owner);
  return state;
}

void GeneratorState::look_again(HeldGenerator& generator) {
  if (kind_ == Kind::kMt19937 && generator.kind() == kind_) {
    Mt19937::capture(cpu_of(generator), *this);
    return;
  }
  *this = glance(generator);
}

GeneratorState GeneratorState::settled(const GeneratorMark& mark) const {
  if (!is_glance()) {
    return *this;
  }
  GeneratorState state;
  const CaptureId capture = mark.block_;
  state.philox_ = {philox_.seed, capture == kNoCapture ? philox_.offset : 0, capture};
  state.keeps_rnn_state_ = keeps_rnn_state_;
  return state;
}

GeneratorState GeneratorState::philox(uint64_t seed, uint64_t offset) {
  GeneratorState state;
  state.philox_ = {seed, offset, kNoCapture};
  return state;
}

bool GeneratorState::apply(HeldGenerator& generator, bool new_to_rnns) const {
  switch (kind_) {
    case Kind::kMt19937:
      Mt19937::apply(cpu_of(generator), *this);
      break;
    case Kind::kPhilox:
      return set_position(generator, philox_, keeps_rnn_state_ && !new_to_rnns);
    case Kind::kOpaque:
      generator.impl().set_state(bytes_of(kept_));
      break;
  }
  return true;
}

bool GeneratorState::is_state_of(HeldGenerator& generator) const {
  switch (kind_) {
    case Kind::kMt19937: {
      auto& cpu = cpu_of(generator);
      return Mt19937::stands_at(cpu, compat::mt19937_data(cpu), *this);
    }
    case Kind::kPhilox: {
      const PhiloxPosition now = position_of(generator);
      return is_same(philox_, now) && (now.capture != kNoCapture || has_flag_of(generator));
    }
    case Kind::kOpaque:
      return *this == capture(generator);
  }
  return false;
}

bool GeneratorState::is_state_of(HeldGenerator& generator, const GeneratorMark& mark) const {
  if (kind_ == Kind::kMt19937 && mark.position_ != Mt19937::position(left_, next_)) {
    return false;
  }
  if (kind_ != Kind::kPhilox) {
    return is_state_of(generator);
  }
  return mark.kind_ == kind_ && is_same(philox_, {mark.seed_, mark.position_, mark.block_}) &&
         (mark.block_ != kNoCapture || has_flag_of(generator));
}

bool GeneratorState::has_flag_of(HeldGenerator& generator) const {
  const auto fields = compat::philox_fields(generator.impl());
  return !fields.has_value() || fields->keeps_rnn_state.test() == keeps_rnn_state_;
}

bool GeneratorState::operator==(const GeneratorState& other) const {
  if (kind_ != other.kind_) {
    return false;
  }
  switch (kind_) {
    case Kind::kMt19937:
      return left_ == other.left_ && next_ == other.next_ &&
             (kept_ == other.kept_ || same_words(Mt19937::words(*this), Mt19937::words(other))) &&
             Mt19937::same_samples(samples_, other.samples_);
    case Kind::kPhilox:
      return philox_ == other.philox_;
    case Kind::kOpaque: {
      const c10::TensorImpl &bytes = bytes_of(kept_), &others = bytes_of(other.kept_);
      return size_of(bytes) == size_of(others) &&
             std::memcmp(bytes.data(), others.data(), size_of(bytes)) == 0;
    }
  }
  return false;
}

at::Tensor GeneratorState::to_tensor() const {
  switch (kind_) {
    case Kind::kMt19937: {
      auto generator = at::detail::createCPUGenerator();
      apply(generator);
      return generator.get_state();
    }
    case Kind::kPhilox:
      return philox_tensor(philox_.seed, philox_.offset);
    case Kind::kOpaque:
      return at::Tensor(c10::static_intrusive_pointer_cast<c10::TensorImpl>(kept_)).clone();
  }
  return at::Tensor();
}

GeneratorState GeneratorState::from_tensor(const at::Generator& generator,
                                           const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == at::kByte && tensor.device().is_cpu() && tensor.is_contiguous(),
      "a generator state must be a contiguous byte tensor on the CPU, got ", tensor.scalar_type(),
      " on ", tensor.device());
  GeneratorState state;
  state.kind_ = kind_of(generator);
  switch (state.kind_) {
    case Kind::kMt19937: {
      auto scratch = at::detail::createCPUGenerator();
      scratch.set_state(tensor);  // checks size and contents
      return capture(scratch);
    }
    case Kind::kPhilox:
      TORCH_CHECK_VALUE(tensor.numel() == kPhiloxBytes, "a state of a ", generator.device().type(),
                        " generator has ", kPhiloxBytes, " bytes, got ", tensor.numel());
      std::memcpy(&state.philox_, tensor.const_data_ptr(), kPhiloxBytes);
      if (is_captured(generator.device())) {  // torch's form does not say so
        state.philox_.capture = capture_of(generator.device());
      }
      break;
    case Kind::kOpaque:
      state.kept_ = tensor.clone().getIntrusivePtr();
      break;
  }
  return state;
}

namespace {

constexpr DrawClock clock_of_offset(uint64_t offset) { return static_cast<DrawClock>(offset / 4); }

}  // namespace

DrawClock draw_clock(const at::Generator& generator) {
  auto& impl = *generator.unsafeGetGeneratorImpl();
  switch (kind_of(generator)) {
    case GeneratorKind::kMt19937: {
      // Without its mutex: two words, of which others may change one while they are read.
      const auto& engine = compat::mt19937_data(static_cast<at::CPUGeneratorImpl&>(impl));
      return static_cast<DrawClock>(
          GeneratorState::Mt19937::position(__atomic_load_n(&engine.left_, __ATOMIC_RELAXED),
                                            __atomic_load_n(&engine.next_, __ATOMIC_RELAXED)));
    }
    case GeneratorKind::kPhilox: {
      const HeldGenerator held(generator);
      const auto fields = compat::philox_fields(impl);
      return fields.has_value() ? clock_of_offset(fields->offset) : 0;
    }
    case GeneratorKind::kOpaque:
      break;
  }
  return 0;
}

std::optional<DrawClock> GeneratorState::clock() const {
  switch (kind_) {
    case Kind::kMt19937:
      return static_cast<DrawClock>(Mt19937::position(left_, next_));
    case Kind::kPhilox:
      return philox_.capture == kNoCapture ? std::optional(clock_of_offset(philox_.offset))
                                           : std::nullopt;
    case Kind::kOpaque:
      break;
  }
  return std::nullopt;
}

size_t GeneratorState::nbytes() const {
  switch (kind_) {
    case Kind::kMt19937:
      return sizeof(Mt19937Block);
    case Kind::kPhilox:
      return kPhiloxBytes + (is_in_capture(philox_.capture) ? sizeof(philox_.capture) : 0);
    case Kind::kOpaque:
      return size_of(bytes_of(kept_));
  }
  return 0;
}

const void* GeneratorState::address() const {
  return kind_ == Kind::kPhilox ? static_cast<const void*>(this) : kept_.get();
}

std::optional<uint64_t> GeneratorState::draws_until(const GeneratorMark& mark) const {
  if (kind_ != mark.kind_ || kind_ == Kind::kOpaque) {
    return std::nullopt;
  }
  if (kind_ == Kind::kPhilox) {
    return philox_.seed == mark.seed_ && philox_.capture == mark.block_ &&
                   mark.position_ >= philox_.offset
               ? std::optional<uint64_t>(mark.position_ - philox_.offset)
               : std::nullopt;
  }
  // Goes through the blocks: a microsecond for each 624 draws, in an error only.
  constexpr uint64_t kMostBlocks = 100'000;
  at::mt19937_data_pod data = Mt19937::words(*this);
  const uint64_t begin = Mt19937::position(left_, next_);
  uint64_t draws = 0;
  for (uint64_t block = 0; block < kMostBlocks; ++block) {
    const uint64_t first = block == 0 ? begin : 0;
    if (hash_block(data) == mark.block_ && mark.position_ >= first) {
      return draws + mark.position_ - first;
    }
    draws += 624 - first;
    at::mt19937 engine;
    data.left_ = 1;
    engine.set_data(data);
    engine();  // makes the next block
    data = engine.data();
  }
  return std::nullopt;
}

GeneratorMark GeneratorMark::of(HeldGenerator& generator) {
  GeneratorMark mark;
  mark.kind_ = generator.kind();
  switch (mark.kind_) {
    case GeneratorKind::kMt19937: {
      auto& cpu = cpu_of(generator);
      const at::mt19937_data_pod& engine = compat::mt19937_data(cpu);
      mark.seed_ = engine.seed_;
      mark.stamp_ = stamp_of(engine);
      mark.position_ = GeneratorState::Mt19937::position(engine.left_, engine.next_);
      mark.block_ = hash_block(engine);
      if (const auto samples = GeneratorState::Mt19937::samples(cpu);
          samples.has_double || samples.has_float) {
        mark.cached_ = hash_bytes(&samples.for_double, sizeof(samples.for_double)) +
                       3 * hash_bytes(&samples.for_float, sizeof(samples.for_float)) +
                       2 * samples.has_double + samples.has_float;
      }
      break;
    }
    case GeneratorKind::kPhilox: {
      const auto position = position_of(generator);
      mark.seed_ = position.seed;
      mark.position_ = position.offset;
      mark.block_ = position.capture;
      break;
    }
    case GeneratorKind::kOpaque: {
      const at::Tensor state(generator.impl().get_state());
      mark.block_ = hash_bytes(state.const_data_ptr(), state.nbytes());
      break;
    }
  }
  return mark;
}

GeneratorMark GeneratorMark::of(const GeneratorState& glance) {
  GeneratorMark mark;
  mark.seed_ = glance.philox_.seed;
  mark.position_ = glance.philox_.offset;
  mark.block_ = kNoCapture;
  return mark;
}

bool GeneratorMark::operator==(const GeneratorMark& other) const {
  return kind_ == other.kind_ && seed_ == other.seed_ && position_ == other.position_ &&
         block_ == other.block_ && cached_ == other.cached_;
}

bool GeneratorMark::is_beyond(const GeneratorMark& other) const {
  return kind_ == other.kind_ && kind_ != GeneratorKind::kOpaque && seed_ == other.seed_ &&
         block_ == other.block_ && position_ > other.position_;
}

std::string GeneratorMark::describe() const {
  switch (kind_) {
    case GeneratorKind::kMt19937:
      return c10::str("seed ", seed_, ", word ", position_, " of 624 in block ", block_ >> 40,
                      cached_ != 0 ? ", a normal sample left over" : "");
    case GeneratorKind::kPhilox:
      return c10::str("seed ", seed_, describe_offset(position_, block_));
    case GeneratorKind::kOpaque:
      return c10::str("state ", block_ >> 32);
  }
  return {};
}

std::string GeneratorState::describe() const {
  switch (kind_) {
    case Kind::kMt19937:
      return c10::str("mt19937 seed ", Mt19937::words(*this).seed_, ", word ", next_, " of 624");
    case Kind::kPhilox:
      return c10::str("philox seed ", philox_.seed,
                      describe_offset(philox_.offset, philox_.capture));
    case Kind::kOpaque:
      return c10::str("opaque state of ", nbytes(), " bytes");
  }
  return {};
}

}  // namespace reprise
