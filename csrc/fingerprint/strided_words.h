// A tensor's memory as a sequence of words, whatever its strides: what is summed up on
// a GPU, and what the CPU gathers from. No torch here. See element_hash.h, Note [Words].
#pragma once

#include <cstdint>

#include "fingerprint/element_hash.h"

namespace reprise {

namespace element_hash {

// The first `count` bytes at `bytes`, the rest zero. The byte order is that of every
// machine that torch has wheels for.
REPRISE_HOST_DEVICE inline uint64_t partial_word(const unsigned char* bytes, int64_t count) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) {
    word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  }
  return word;
}

}  // namespace element_hash

// Words of contiguous memory that is aligned to them. The last one may be incomplete.
struct ContiguousWords {
  const unsigned char* data;  // borrowed
  int64_t nbytes;

  REPRISE_HOST_DEVICE uint64_t count() const { return static_cast<uint64_t>(nbytes + 7) / 8; }

  REPRISE_HOST_DEVICE uint64_t operator()(uint64_t position) const {
    const int64_t left = nbytes - static_cast<int64_t>(position * 8);
    if (left < 8) {
      return element_hash::partial_word(data + position * 8, left);
    }
    return reinterpret_cast<const uint64_t*>(data)[position];
  }
};

// Elements of 1, 2, 4, 8 or 16 bytes, aligned to their size (16: to 8), in row-major
// order. Passed to kernels by value.
struct StridedWords {
  static constexpr int kMaxDims = 16;  // after merging; torch itself stops at 64

  const unsigned char* data = nullptr;  // borrowed
  int64_t numel = 0;
  int32_t itemsize = 1;
  int32_t dims = 0;
  int64_t sizes[kMaxDims] = {};    // more than 1 each, outermost first
  int64_t strides[kMaxDims] = {};  // in bytes, not negative, 0 where expanded

  REPRISE_HOST_DEVICE int64_t nbytes() const { return numel * itemsize; }
  REPRISE_HOST_DEVICE uint64_t count() const { return static_cast<uint64_t>(nbytes() + 7) / 8; }

  REPRISE_HOST_DEVICE bool is_contiguous() const {
    return dims == 0 || (dims == 1 && strides[0] == itemsize);
  }

  // Adds a dimension inside of those there are; false if there is no room for it.
  REPRISE_HOST_DEVICE bool push(int64_t size, int64_t stride) {
    if (size == 1) {
      return true;
    }
    if (dims > 0 && strides[dims - 1] == size * stride) {
      sizes[dims - 1] *= size;
      strides[dims - 1] = stride;
      return true;
    }
    if (dims == kMaxDims) {
      return false;
    }
    sizes[dims] = size;
    strides[dims] = stride;
    ++dims;
    return true;
  }

  // The same bytes as elements of one byte, for memory that is not aligned.
  bool split_into_bytes() {
    const int64_t size = itemsize;
    numel *= size;
    itemsize = 1;
    return push(size, 1);
  }

  REPRISE_HOST_DEVICE const unsigned char* address(int64_t index) const {
    int64_t offset = 0;
    if (numel <= 0xFFFFFFFF) {  // GPUs divide 32 bits several times as fast
      auto rest = static_cast<uint32_t>(index);
      for (int d = dims - 1; d >= 0; --d) {
        const auto size = static_cast<uint32_t>(sizes[d]);
        offset += static_cast<int64_t>(rest % size) * strides[d];
        rest /= size;
      }
    } else {
      int64_t rest = index;
      for (int d = dims - 1; d >= 0; --d) {
        offset += rest % sizes[d] * strides[d];
        rest /= sizes[d];
      }
    }
    return data + offset;
  }

  REPRISE_HOST_DEVICE uint64_t operator()(uint64_t position) const {
    if (itemsize == 16) {
      const auto* element = address(static_cast<int64_t>(position / 2));
      return reinterpret_cast<const uint64_t*>(element)[position % 2];
    }
    const int64_t per_word = 8 / itemsize;
    const int64_t first = static_cast<int64_t>(position) * per_word;
    const int64_t count = numel - first < per_word ? numel - first : per_word;
    uint64_t word = 0;
    for (int64_t i = 0; i < count; ++i) {
      word |= bits(address(first + i)) << (8 * itemsize * i);
    }
    return word;
  }

 private:
  REPRISE_HOST_DEVICE uint64_t bits(const unsigned char* element) const {
    switch (itemsize) {
      case 1:
        return *element;
      case 2:
        return *reinterpret_cast<const uint16_t*>(element);
      case 4:
        return *reinterpret_cast<const uint32_t*>(element);
      default:
        return *reinterpret_cast<const uint64_t*>(element);
    }
  }
};

}  // namespace reprise
