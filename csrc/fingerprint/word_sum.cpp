#include "fingerprint/word_sum.h"

#include <cstring>

#include "fingerprint/element_hash.h"

namespace reprise {

using element_hash::key_of;
using element_hash::kStep;
using element_hash::scramble;

namespace {

inline uint64_t load(const char* bytes, size_t word) {
  uint64_t bits;
  std::memcpy(&bits, bytes + word * sizeof(bits), sizeof(bits));
  return bits;
}

}  // namespace

uint64_t word_sum_portable(const void* data, uint64_t position, size_t words) {
  const auto* bytes = static_cast<const char*>(data);
  uint64_t sum = 0;
  uint64_t key = key_of(position);
  for (size_t i = 0; i < words; ++i, key += kStep) {
    uint64_t x = load(bytes, i) + key;
    scramble(x);
    sum += x;
  }
  return sum;
}

#if defined(__x86_64__)

namespace {

// Written with vectors rather than left to the compiler: gcc 12 at -O3 turns eight
// scalar lanes in arrays into code with a wrong result.
//
// 64 bits of a product take three multiplications of 32 here. The loop is still faster than one
// core reads memory, so a version for AVX-512, which multiplies 64 bits, has nothing to gain.
__attribute__((target("avx2"))) uint64_t word_sum_avx2(const void* data, uint64_t position,
                                                       size_t words) {
  using Lanes = uint64_t __attribute__((vector_size(32)));
  constexpr size_t kLanes = sizeof(Lanes) / sizeof(uint64_t);
  constexpr size_t kStride = 2 * kLanes;  // two independent chains hide the latency
  const auto* bytes = static_cast<const char*>(data);
  Lanes even_key = {key_of(position), key_of(position + 1), key_of(position + 2),
                    key_of(position + 3)};
  Lanes odd_key = even_key + kLanes * kStep;
  Lanes even_sum = {};
  Lanes odd_sum = {};
  size_t i = 0;
  for (; i + kStride <= words; i += kStride) {
    Lanes even;
    Lanes odd;
    std::memcpy(&even, bytes + i * sizeof(uint64_t), sizeof(even));
    std::memcpy(&odd, bytes + (i + kLanes) * sizeof(uint64_t), sizeof(odd));
    even += even_key;
    odd += odd_key;
    scramble(even);
    scramble(odd);
    even_sum += even;
    odd_sum += odd;
    even_key += kStride * kStep;
    odd_key += kStride * kStep;
  }
  const Lanes sum = even_sum + odd_sum;
  return sum[0] + sum[1] + sum[2] + sum[3] +
         word_sum_portable(bytes + i * sizeof(uint64_t), position + i, words - i);
}

}  // namespace

uint64_t word_sum(const void* data, uint64_t position, size_t words) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  return has_avx2 ? word_sum_avx2(data, position, words) : word_sum_portable(data, position, words);
}

#else

uint64_t word_sum(const void* data, uint64_t position, size_t words) {
  return word_sum_portable(data, position, words);
}

#endif

}  // namespace reprise
