// Fingerprints: equal for equal values however they lie in memory and whoever adds them up, and
// different for every difference that a test can think of.
#include "fingerprint/fingerprint.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <unordered_set>
#include <vector>

#include "check.h"
#include "fingerprint/element_hash.h"
#include "fingerprint/strided_words.h"
#include "fingerprint/word_sum.h"

using reprise::fingerprint;
namespace element_hash = reprise::element_hash;

namespace {

uint64_t of(const at::Tensor& tensor) {
  const auto found = fingerprint(tensor);
  EXPECT(found.has_value());
  return found.value_or(0);
}

// What the definition says, word by word: Note [Words] in element_hash.h.
uint64_t by_definition(const void* data, size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t sum = 0;
  for (size_t i = 0; i * 8 < nbytes; ++i) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i * 8, std::min<size_t>(8, nbytes - i * 8));
    sum += element_hash::mix(i, word);
  }
  return element_hash::seal(sum, nbytes);
}

uint64_t by_definition(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.contiguous();
  return by_definition(whole.const_data_ptr(), whole.nbytes());
}

std::vector<unsigned char> random_bytes(size_t count, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::vector<unsigned char> bytes(count);
  std::generate(bytes.begin(), bytes.end(),
                [&] { return static_cast<unsigned char>(engine() >> 56); });
  return bytes;
}

// Any bits at all, in the memory of a tensor.
at::Tensor random_bits(at::IntArrayRef sizes, c10::ScalarType dtype, uint64_t seed = 1) {
  at::Tensor tensor = at::empty(sizes, dtype);
  auto bytes = random_bytes(tensor.nbytes(), seed);
  if (dtype == at::kBool) {  // copies make every other value a 1
    std::for_each(bytes.begin(), bytes.end(), [](unsigned char& byte) { byte &= 1; });
  }
  if (!bytes.empty()) {
    std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  }
  return tensor;
}

const std::array kDtypes = {
    at::kByte,        at::kChar,          at::kShort,           at::kInt,
    at::kLong,        at::kUInt16,        at::kUInt32,          at::kUInt64,
    at::kHalf,        at::kBFloat16,      at::kFloat,           at::kDouble,
    at::kComplexHalf, at::kComplexFloat,  at::kComplexDouble,   at::kBool,
    at::kFloat8_e5m2, at::kFloat8_e4m3fn, at::kFloat8_e5m2fnuz, at::kFloat8_e4m3fnuz};

// A view of memory of `sizes` with the dimensions in reverse order.
at::Tensor reversed(const at::Tensor& tensor) {
  std::vector<int64_t> dims(static_cast<size_t>(tensor.dim()));
  std::iota(dims.rbegin(), dims.rend(), 0);
  return tensor.permute(dims);
}

reprise::StridedWords words_of(const at::Tensor& tensor) {
  reprise::StridedWords words;
  words.data = static_cast<const unsigned char*>(tensor.const_data_ptr());
  words.numel = tensor.numel();
  words.itemsize = static_cast<int32_t>(tensor.element_size());
  for (const auto d : c10::irange(tensor.dim())) {
    EXPECT(words.push(tensor.size(d), tensor.stride(d) * tensor.element_size()));
  }
  return words;
}

// Adds up the words as a grid of so many threads would, the last thread first.
template <typename Words>
uint64_t sum_by_grid(const Words& words, uint64_t threads) {
  uint64_t sum = 0;
  for (uint64_t thread = threads; thread-- > 0;) {
    sum += element_hash::sum_of_words(words, thread, words.count(), threads);
  }
  return sum;
}

struct Threads {
  explicit Threads(int count) : before(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before); }
  int before;
};

template <typename Float, typename Bits>
at::Tensor from_bits(Bits bits, c10::ScalarType dtype) {
  static_assert(sizeof(Float) == sizeof(Bits));
  at::Tensor tensor = at::zeros({5}, dtype);
  std::memcpy(static_cast<Bits*>(tensor.mutable_data_ptr()) + 2, &bits, sizeof(bits));
  return tensor;
}

// As if a mode was active, and autocast. There is none: an operator that asks it fails.
struct Observer {
  c10::impl::IncludeDispatchKeyGuard autocast{c10::DispatchKey::AutocastCPU};
  c10::impl::IncludeDispatchKeyGuard mode{c10::DispatchKey::Python};
  c10::impl::IncludeDispatchKeyGuard mode_snapshot{c10::DispatchKey::PythonTLSSnapshot};
};

}  // namespace

TEST(contiguous_tensors_follow_the_definition) {
  for (const int64_t n :
       {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 65, 1000, 4099, 70001, 1 << 20}) {
    const at::Tensor bytes = random_bits({n}, at::kByte);
    EXPECT_EQ(of(bytes), by_definition(bytes));
    for (const int64_t offset : {1, 3, 8}) {  // memory that is aligned to nothing
      const at::Tensor rest = bytes.slice(0, std::min(offset, n));
      EXPECT_EQ(of(rest), by_definition(rest.clone()));
    }
  }
}

TEST(known_values) {
  // By Python's integers: all other expectations here come out of the same compiler.
  EXPECT_EQ(of(at::arange(10, at::kFloat)), uint64_t{0xf87bb1f2316b720d});
  EXPECT_EQ(of(at::empty({0})), uint64_t{0x48218226ff3cd4bf});
  EXPECT_EQ(by_definition("torch-reprise", 13), uint64_t{0x689c4d5e2694fc24});
  EXPECT_EQ(element_hash::combine(1, 2), uint64_t{0xc4b2b7e0ebf04950});
}

TEST(both_instruction_sets_agree) {
  const auto bytes = random_bytes(4096, 3);
  for (size_t words = 0; words < 200; ++words) {
    for (const size_t offset : {0, 1, 5, 8}) {
      const uint64_t position = words * 977 + (uint64_t{1} << 40);
      EXPECT_EQ(reprise::word_sum(bytes.data() + offset, position, words),
                reprise::word_sum_portable(bytes.data() + offset, position, words));
    }
  }
}

TEST(every_dtype_and_layout) {
  for (const auto dtype : kDtypes) {
    for (const auto& sizes : std::vector<std::vector<int64_t>>{
             {}, {1}, {7}, {3, 5}, {16, 24}, {2, 3, 4, 5}, {1, 9, 1, 8}, {130, 300}, {257, 131}}) {
      const at::Tensor values = random_bits(sizes, dtype);
      const uint64_t expected = of(values);
      EXPECT_EQ(expected, by_definition(values));
      const at::Tensor other_way = reversed(reversed(values).clone(at::MemoryFormat::Contiguous));
      EXPECT_EQ(of(other_way), expected);
      if (!sizes.empty()) {
        std::vector<int64_t> wide = sizes;
        for (auto& size : wide) {
          size = 2 * size + 1;
        }
        at::Tensor sparse_view = random_bits(wide, dtype, 2);
        for (const auto d : c10::irange(values.dim())) {
          sparse_view = sparse_view.slice(d, 1, wide[static_cast<size_t>(d)], 2);
        }
        EXPECT(values.dim() == 0 || values.numel() == 1 || !sparse_view.is_contiguous());
        sparse_view.copy_(values);
        // copy_ of some dtypes goes through arithmetic: what arrived is what counts.
        EXPECT_EQ(of(sparse_view), by_definition(sparse_view));
        EXPECT_EQ(of(reversed(sparse_view)), by_definition(reversed(sparse_view)));
      }
    }
  }
}

TEST(large_strided_tensors) {
  const at::Tensor a = at::randn({16, 40, 9, 24});
  EXPECT_EQ(of(a.contiguous(at::MemoryFormat::ChannelsLast)), of(a));
  for (const auto& dims : std::vector<std::vector<int64_t>>{
           {0, 2, 1, 3}, {0, 1, 3, 2}, {3, 2, 1, 0}, {2, 3, 0, 1}, {1, 0, 3, 2}, {3, 0, 1, 2}}) {
    const at::Tensor view = a.permute(dims);
    EXPECT_EQ(of(view), by_definition(view));
    EXPECT_EQ(of(view.slice(3, 1)), by_definition(view.slice(3, 1)));
    EXPECT_EQ(of(view.slice(0, 1)), by_definition(view.slice(0, 1)));
  }
  const at::Tensor windows = at::randn({5000}).unfold(0, 100, 7);  // overlapping
  EXPECT_EQ(of(windows), by_definition(windows));
  EXPECT_EQ(of(windows.t()), by_definition(windows.t()));
}

TEST(expanded_tensors) {
  for (const auto dtype : {at::kByte, at::kHalf, at::kFloat, at::kDouble, at::kComplexDouble}) {
    const at::Tensor column = random_bits({300, 1}, dtype);
    EXPECT_EQ(of(column.expand({300, 77})), by_definition(column.expand({300, 77})));
    EXPECT_EQ(of(column.t().expand({77, 300})), by_definition(column.t().expand({77, 300})));
    const at::Tensor one = random_bits({}, dtype);
    EXPECT_EQ(of(one.expand({3, 1, 41})), by_definition(one.expand({3, 1, 41})));
  }
}

TEST(more_dimensions_than_a_view_has) {
  const at::Tensor view = reversed(at::randn(std::vector<int64_t>(18, 2)));
  EXPECT_EQ(of(view), by_definition(view));
}

TEST(a_flipped_bit_always_shows) {
  std::mt19937_64 engine(5);
  for (const size_t n : {1, 2, 7, 8, 9, 63, 64, 65, 200, 4096 + 3, 300000 + 5}) {
    at::Tensor tensor = random_bits({static_cast<int64_t>(n)}, at::kByte);
    auto* bytes = static_cast<unsigned char*>(tensor.mutable_data_ptr());
    const uint64_t before = of(tensor);
    const size_t trials = n <= 200 ? 8 * n : 200;
    for (size_t trial = 0; trial < trials; ++trial) {
      // All bits of small tensors; of large ones the last 64, and some anywhere.
      const size_t bit = n <= 200 ? trial : trial < 64 ? 8 * n - 1 - trial : engine() % (8 * n);
      bytes[bit / 8] ^= static_cast<unsigned char>(1U << (bit % 8));
      EXPECT(of(tensor) != before);
      bytes[bit / 8] ^= static_cast<unsigned char>(1U << (bit % 8));
    }
    EXPECT_EQ(of(tensor), before);
  }
}

TEST(two_flipped_bits_do_not_cancel) {
  // What a linear sum would miss: two signs, or the same bit in two places, of zeros.
  const at::Tensor zeros = at::zeros({64}, at::kFloat);
  auto* bits = static_cast<uint32_t*>(zeros.mutable_data_ptr());
  std::unordered_set<uint64_t> seen = {of(zeros)};
  size_t cases = 1;
  for (const uint32_t flip : {0x80000000U, 0x40000000U, 1U}) {
    for (size_t i = 0; i < 64; ++i) {
      for (size_t j = 0; j < i; ++j) {
        bits[i] = bits[j] = flip;
        seen.insert(of(zeros));
        ++cases;
        bits[i] = bits[j] = 0;
      }
    }
  }
  EXPECT_EQ(seen.size(), cases);
  const at::Tensor values = at::randn({1 << 12});
  EXPECT(of(values) != of(-values));
}

TEST(permuted_values_differ) {
  const at::Tensor values = at::randn({33});
  std::unordered_set<uint64_t> seen = {of(values)};
  size_t cases = 1;
  for (int64_t i = 0; i < 33; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      at::Tensor swapped = values.clone();
      swapped[i].copy_(values[j]);
      swapped[j].copy_(values[i]);
      seen.insert(of(swapped));
      ++cases;
    }
  }
  EXPECT_EQ(seen.size(), cases);
  EXPECT(of(values.flip({0})) != of(values));
  EXPECT(of(values.roll(1)) != of(values));
  const at::Tensor square = at::arange(64, at::kLong).view({8, 8});
  EXPECT(of(square.t()) != of(square));
}

TEST(length_counts_though_the_tail_is_zero) {
  std::unordered_set<uint64_t> seen;
  for (int64_t n = 0; n < 100; ++n) {
    seen.insert(of(at::zeros({n}, at::kByte)));
  }
  EXPECT_EQ(seen.size(), size_t{100});
  EXPECT_EQ(of(at::zeros({0})), of(at::zeros({3, 0, 2}, at::kHalf)));
}

TEST(signs_of_zero_and_payloads_of_nan) {
  EXPECT(of(from_bits<float>(uint32_t{0}, at::kFloat)) !=
         of(from_bits<float>(uint32_t{0x80000000}, at::kFloat)));
  EXPECT(of(from_bits<float>(uint32_t{0x7FC00000}, at::kFloat)) !=
         of(from_bits<float>(uint32_t{0x7FC00001}, at::kFloat)));
  EXPECT_EQ(of(from_bits<float>(uint32_t{0x7FC00001}, at::kFloat)),
            of(from_bits<float>(uint32_t{0x7FC00001}, at::kFloat)));
  EXPECT(of(from_bits<double>(uint64_t{0x7FF8000000000000}, at::kDouble)) !=
         of(from_bits<double>(uint64_t{0xFFF8000000000000}, at::kDouble)));
  EXPECT(of(from_bits<c10::Half>(uint16_t{0x7E00}, at::kHalf)) !=
         of(from_bits<c10::Half>(uint16_t{0x7E01}, at::kHalf)));
}

TEST(threads_do_not_show) {
  const at::Tensor flat = random_bits({(1 << 22) + 5}, at::kByte);
  const at::Tensor matrix = at::randn({1030, 1026});
  const at::Tensor odd = random_bits({1031, 1027}, at::kByte);
  const std::array tensors = {flat,
                              matrix,
                              matrix.t(),
                              odd.t(),
                              matrix.slice(1, 0, 1025),
                              at::randn({1, 3000}).expand({700, 3000})};
  for (const auto& tensor : tensors) {
    const uint64_t expected = by_definition(tensor);
    for (const int threads : {1, 2, 3, 4, 7}) {
      const Threads some(threads);
      EXPECT_EQ(of(tensor), expected);
    }
  }
}

TEST(a_grid_gives_the_same_sum) {
  for (const auto dtype : {at::kByte, at::kHalf, at::kFloat, at::kDouble, at::kComplexDouble}) {
    const at::Tensor values = random_bits({37, 11, 13}, dtype);
    for (const uint64_t threads : {1, 3, 32, 256, 1000, 4096 * 256}) {
      const reprise::ContiguousWords flat{
          static_cast<const unsigned char*>(values.const_data_ptr()),
          static_cast<int64_t>(values.nbytes())};
      EXPECT_EQ(element_hash::seal(sum_by_grid(flat, threads), values.nbytes()), of(values));
      for (const at::Tensor& view :
           {values, values.permute({2, 0, 1}), values.slice(1, 1, 11, 3), values.slice(2, 0, 5),
            values.slice(0, 0, 1).expand({4, 11, 13}), values.select(2, 3)}) {
        EXPECT_EQ(element_hash::seal(sum_by_grid(words_of(view), threads), view.nbytes()),
                  of(view));
        auto bytes = words_of(view);  // what is done where memory is not aligned
        EXPECT(bytes.split_into_bytes());
        EXPECT_EQ(element_hash::seal(sum_by_grid(bytes, threads), view.nbytes()), of(view));
      }
    }
  }
}

TEST(any_partition_gives_the_same_sum) {
  std::mt19937_64 engine(11);
  const auto bytes = random_bytes(8 * 10000, 7);
  const reprise::ContiguousWords words{bytes.data(), static_cast<int64_t>(bytes.size())};
  const uint64_t expected = reprise::word_sum(bytes.data(), 0, 10000);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<uint64_t> cuts = {0, 10000};
    for (int i = 0; i < 30; ++i) {
      cuts.push_back(engine() % 10001);
    }
    std::sort(cuts.begin(), cuts.end());
    std::vector<size_t> order(cuts.size() - 1);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), engine);
    uint64_t sum = 0;
    for (const size_t block : order) {
      sum += block % 2 == 0 ? element_hash::sum_of_words(words, cuts[block], cuts[block + 1], 1)
                            : reprise::word_sum(bytes.data() + 8 * cuts[block], cuts[block],
                                                cuts[block + 1] - cuts[block]);
    }
    EXPECT_EQ(sum, expected);
  }
}

TEST(indices_beyond_32_bits) {
  const unsigned char one = 7;
  reprise::StridedWords words;
  words.data = &one;
  words.numel = int64_t{5} << 32;
  EXPECT(words.push(5, 0));
  EXPECT(words.push(int64_t{1} << 32, 0));
  EXPECT_EQ(words.dims, 1);  // expanded dimensions merge
  EXPECT_EQ(words(words.count() - 1), 0x0707070707070707u);
  const std::array<unsigned char, 5> rows = {1, 2, 3, 4, 5};
  words = {};
  words.data = rows.data();
  words.numel = int64_t{5} << 32;
  EXPECT(words.push(5, 1));
  EXPECT(words.push(int64_t{1} << 32, 0));
  EXPECT_EQ(words.dims, 2);
  EXPECT_EQ(words((uint64_t{3} << 29)), 0x0404040404040404u);
  EXPECT_EQ(words((uint64_t{3} << 29) - 1), 0x0303030303030303u);
}

TEST(conjugate_and_negative_views_are_resolved) {
  for (const auto dtype : {at::kComplexFloat, at::kComplexDouble}) {
    const at::Tensor values = at::randn({6, 7}, dtype);
    EXPECT(values.conj().is_conj());
    EXPECT_EQ(of(values.conj()), of(values.conj().resolve_conj()));
    EXPECT_EQ(of(values.conj().t()), of(values.conj().t().resolve_conj()));
    EXPECT(of(values.conj()) != of(values));
    const at::Tensor negative = at::imag(values.conj());
    EXPECT(negative.is_neg());
    EXPECT_EQ(of(negative), of(negative.resolve_neg()));
    EXPECT(of(negative) != of(at::imag(values)));
    EXPECT_EQ(of(at::real(values)), of(at::real(values).contiguous()));
  }
}

TEST(sparse_tensors) {
  const at::Tensor dense = at::randn({9, 8}).clamp_min(0);
  const at::Tensor coo = dense.to_sparse();
  const uint64_t before = of(coo);
  EXPECT_EQ(of(dense.to_sparse()), before);
  at::Tensor other = coo.clone();
  other._values()[0].add_(1);
  EXPECT(of(other) != before);
  at::Tensor moved = coo.clone();
  moved._indices().select(1, 0).add_(1);
  EXPECT(of(moved) != before);
  const at::Tensor twice =
      at::_sparse_coo_tensor_unsafe(at::zeros({1, 2}, at::kLong), at::ones({2}), {4});
  EXPECT(of(twice) != of(twice.coalesce()));

  std::vector<at::Tensor> compressed = {dense.to_sparse_csr(), dense.to_sparse_csc(),
                                        dense.to_sparse_bsr({3, 2}), dense.to_sparse_bsc({3, 2})};
  for (const auto& tensor : compressed) {
    const uint64_t found = of(tensor);
    EXPECT_EQ(of(tensor.clone()), found);
    at::Tensor changed = tensor.clone();
    changed.values().view({-1})[0].add_(1);
    EXPECT(of(changed) != found);
  }
}

TEST(nested_tensors) {
  const std::vector<at::Tensor> parts = {at::randn({2, 3}), at::randn({4, 3}), at::randn({1, 3})};
  const at::Tensor nested = at::_nested_tensor_from_tensor_list(parts);
  const uint64_t found = of(nested);
  EXPECT_EQ(of(at::_nested_tensor_from_tensor_list(parts)), found);
  EXPECT(of(at::_nested_tensor_from_tensor_list({parts[1], parts[0], parts[2]})) != found);
  const at::Tensor transposed = nested.transpose(1, 2);
  EXPECT_EQ(of(transposed.transpose(1, 2)), found);
  EXPECT(of(transposed) != found);
}

TEST(quantized_tensors) {
  const at::Tensor values = at::randn({10, 4});
  const at::Tensor quantized = at::quantize_per_tensor(values, 0.1, 3, at::kQInt8);
  const uint64_t found = of(quantized);
  EXPECT_EQ(of(at::quantize_per_tensor(values, 0.1, 3, at::kQInt8)), found);
  const at::Tensor integers = quantized.int_repr();
  EXPECT(of(at::_make_per_tensor_quantized_tensor(integers, 0.2, 3)) != found);
  EXPECT(of(at::_make_per_tensor_quantized_tensor(integers, 0.1, 4)) != found);
  EXPECT_EQ(of(at::_make_per_tensor_quantized_tensor(integers, 0.1, 3)), found);
  const at::Tensor scales = at::rand({4}, at::kDouble) + 0.1;
  const at::Tensor zeros = at::zeros({4}, at::kLong);
  const at::Tensor by_channel = at::quantize_per_channel(values, scales, zeros, 1, at::kQInt8);
  EXPECT_EQ(of(by_channel), of(at::quantize_per_channel(values, scales, zeros, 1, at::kQInt8)));
  EXPECT(of(by_channel) !=
         of(at::_make_per_channel_quantized_tensor(by_channel.int_repr(), scales * 2, zeros, 1)));
}

TEST(zeros_without_memory) {
  const at::Tensor none = at::_efficientzerotensor({3, 5}, at::kFloat);
  EXPECT_EQ(of(none), of(at::zeros({3, 5})));
}

TEST(nothing_to_read_is_no_fingerprint) {
  EXPECT(!fingerprint(at::Tensor()).has_value());
  EXPECT(!fingerprint(at::empty({3}, at::TensorOptions(at::kMeta))).has_value());
  at::Tensor freed = at::randn({8});
  freed.storage().unsafeGetStorageImpl()->set_nbytes(0);
  EXPECT(!fingerprint(freed).has_value());
  EXPECT(!fingerprint(freed.t()).has_value());
}

TEST(nobody_notices) {
  at::Tensor leaf = at::randn({6, 4}).set_requires_grad(true);
  const at::Tensor values = at::randn({6, 4}, at::kComplexFloat).set_requires_grad(true);
  const at::Tensor view = values.conj();
  const at::Tensor sparse = at::eye(4).to_sparse();
  const auto version = leaf._version();
  const uint64_t expected = of(view);
  {
    const Observer observer;
    EXPECT_THROWS(leaf.add(1), c10::Error);
    EXPECT_EQ(of(view), expected);
    EXPECT(fingerprint(leaf).has_value());
    EXPECT(fingerprint(sparse).has_value());
  }
  EXPECT_EQ(leaf._version(), version);
  EXPECT(leaf.is_leaf());
}

TEST(no_collisions_among_small_inputs) {
  std::unordered_set<uint64_t> seen;
  size_t cases = 0;
  for (int a = 0; a < 256; ++a) {
    for (int b = 0; b < 256; ++b) {
      const std::array<unsigned char, 2> two = {static_cast<unsigned char>(a),
                                                static_cast<unsigned char>(b)};
      seen.insert(by_definition(two.data(), two.size()));
      ++cases;
    }
  }
  // Small integers as floats, in three words: many equal words, few bits set.
  std::array<float, 6> values = {};
  for (int code = 0; code < 117649; ++code) {  // 7^6
    int rest = code;
    for (auto& value : values) {
      value = static_cast<float>(rest % 7 - 3);
      rest /= 7;
    }
    seen.insert(by_definition(values.data(), sizeof(values)));
    ++cases;
  }
  std::mt19937_64 engine(2);
  for (int i = 0; i < 300000; ++i) {
    const std::array<uint64_t, 2> words = {engine(), engine()};
    seen.insert(by_definition(words.data(), sizeof(words)));
    ++cases;
  }
  EXPECT_EQ(seen.size(), cases);
}

TEST(every_bit_of_the_fingerprint_moves) {
  // Each output bit changes for about half of the flipped input bits.
  const auto bytes = random_bytes(64, 9);
  const uint64_t before = by_definition(bytes.data(), bytes.size());
  std::array<int, 64> changed = {};
  for (size_t bit = 0; bit < 512; ++bit) {
    auto flipped = bytes;
    flipped[bit / 8] ^= static_cast<unsigned char>(1U << (bit % 8));
    const uint64_t difference = before ^ by_definition(flipped.data(), flipped.size());
    for (size_t out = 0; out < 64; ++out) {
      changed[out] += static_cast<int>(difference >> out & 1);
    }
  }
  for (const int count : changed) {
    EXPECT(count > 190 && count < 322);  // six standard deviations
  }
}

TEST(parts_are_put_together_in_order) {
  EXPECT(element_hash::combine(1, 2) != element_hash::combine(2, 1));
  EXPECT(element_hash::combine(1, 2) != element_hash::combine(1, 3));
  EXPECT(element_hash::combine(0, 0) != 0);
}

TEST_MAIN()
