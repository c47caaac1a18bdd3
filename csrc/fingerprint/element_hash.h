// The arithmetic of a fingerprint, the same on the host and on a GPU. No torch here.
//
// Note [Words]
//
//   a = torch.randn(1024, 1024)
//   b = a.t().contiguous().t()     # equal to a, laid out the other way round
//
// Both have to give the same fingerprint, and so do any number of threads or blocks.
// So it is defined on the values in the order of their indices, not of their
// addresses: the bytes that a.contiguous() would have, filled up with zeros to a
// multiple of 8 and cut into words of 8 bytes,
//
//   fingerprint = seal(sum of mix(i, word[i]) modulo 2^64, number of bytes).
//
// A sum may be taken in any order. Words rather than elements: half-precision
// elements would cost four times as much one by one. The price is that a strided
// tensor has to put its words together first.
//
// What is guaranteed, for tensors of as many bytes:
//  - Equal bits give equal fingerprints.
//  - A difference within one word, so of a single bit or element of up to 8 bytes,
//    always gives another one: mix(i, .) and seal(., n) are bijections.
//  - Two words that change places give another one unless they differ by exactly their
//    distance d times kStep, modulo 2^64. For d up to 2^30 (8 GiB apart) that takes a
//    difference of 2^64 / (3 d) or more, since no number is worse to approximate by
//    fractions than the golden ratio: indices in int64 below 5e9 never have it.
//  - All other differences go unseen with a probability of about 2^-64 each. That is what
//    the mixing function is known for, not a theorem, and none of this is
//    made to withstand somebody who looks for collisions.
// Neither sizes nor dtype enter, except as the number of bytes.
//
// mix is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
// generators", OOPSLA 2014) with the word as the seed and its position as the number
// of steps; its finaliser is variant 13 of David Stafford's, "Better bit mixing", 2011.
// Rejected:
//  - One multiplication by an odd key of the position: linear, so that two changed
//    signs cancel (2^63 times an odd number is 2^63).
//  - NH and its kin, products of two halves that each have a key added: where one
//    factor is zero the other has no effect, so a changed bit is not seen for certain.
//  - A chained hash: every word would wait for the one before.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define REPRISE_HOST_DEVICE __host__ __device__
#else
#define REPRISE_HOST_DEVICE
#endif

namespace reprise::element_hash {

inline constexpr uint64_t kStep = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio, odd

// A bijection. Word: uint64_t, or a vector of it (by reference, since passing vectors
// by value depends on the instruction set).
template <typename Word>
REPRISE_HOST_DEVICE constexpr void scramble(Word& x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9;
  x ^= x >> 27;
  x *= 0x94D049BB133111EB;
  x ^= x >> 31;
}

// What is added to the word at `position` before it is scrambled.
REPRISE_HOST_DEVICE constexpr uint64_t key_of(uint64_t position) { return (position + 1) * kStep; }

REPRISE_HOST_DEVICE constexpr uint64_t mix(uint64_t position, uint64_t word) {
  uint64_t x = word + key_of(position);
  scramble(x);
  return x;
}

// The fingerprint of `nbytes` bytes of which the mixed words add up to `sum`.
REPRISE_HOST_DEVICE constexpr uint64_t seal(uint64_t sum, uint64_t nbytes) {
  uint64_t x = sum + mix(0, nbytes);
  scramble(x);
  return x;
}

// The fingerprint of something that has parts. Not commutative; a bijection of either
// argument while the other stays.
REPRISE_HOST_DEVICE constexpr uint64_t combine(uint64_t first, uint64_t second) {
  return mix(mix(1, first), second);
}

// The words first, first + step, ... below `end`: the share of one thread of a GPU.
// Load: uint64_t(uint64_t position).
template <typename Load>
REPRISE_HOST_DEVICE inline uint64_t sum_of_words(const Load& load, uint64_t first, uint64_t end,
                                                 uint64_t step) {
  uint64_t sum = 0;
  for (uint64_t i = first; i < end; i += step) {
    sum += mix(i, load(i));
  }
  return sum;
}

}  // namespace reprise::element_hash
