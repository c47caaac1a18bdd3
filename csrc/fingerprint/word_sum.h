// The sum of mixed words of contiguous memory on the CPU (element_hash.h, Note [Words]).
#pragma once

#include <cstddef>
#include <cstdint>

namespace reprise {

// `words` words of 8 bytes at `data`, aligned or not, the first of which is the word
// `position` of its tensor. With the widest instructions that this processor has.
uint64_t word_sum(const void* data, uint64_t position, size_t words);

// The same, and the same value, with the instructions that every processor has.
uint64_t word_sum_portable(const void* data, uint64_t position, size_t words);

}  // namespace reprise
