// How a GPU adds up the words of a tensor: every thread takes words that lie a whole grid
// apart, so that neighbours read neighbouring memory; a warp adds its sums by shuffles,
// a block its warps' in shared memory, and one atomic addition per block makes the total.
// All of it is addition modulo 2^64, so neither the grid nor the order of the blocks shows.
//
// This file is compiled wherever CUDA is found. What a thread computes (sum_of_words on
// ContiguousWords and StridedWords) is tested on the host, where
// tests/native/fingerprint_test.cpp divides the words as the grid does; the whole on a GPU, by
// tests/cuda/test_fingerprint.py, which CI cannot run. docs/limits.md says where it has run.
#include <cuda_runtime.h>

#include "fingerprint/fingerprint_cuda.h"

namespace reprise {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Words of a thread before the grid gets larger, and where it stops: enough blocks to
// fill any device of today.
constexpr uint64_t kWordsPerThread = 8;
constexpr uint64_t kMaxBlocks = 4096;

__device__ uint64_t sum_of_warp(uint64_t value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xFFFFFFFF, static_cast<unsigned long long>(value), distance);
  }
  return value;  // in lane 0
}

template <typename Words>
__global__ void __launch_bounds__(kThreads) add_words(Words words, unsigned long long* sum) {
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * kThreads;
  uint64_t value = element_hash::sum_of_words(words, first, words.count(), step);

  __shared__ uint64_t of_warps[kThreads / kWarp];
  value = sum_of_warp(value);
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    value = sum_of_warp(threadIdx.x < kThreads / kWarp ? of_warps[threadIdx.x] : 0);
    if (threadIdx.x == 0) {
      atomicAdd(sum, static_cast<unsigned long long>(value));
    }
  }
}

template <typename Words>
cudaError_t launch(const Words& words, uint64_t* sum, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(sum, 0, sizeof(*sum), stream);
  if (error != cudaSuccess || words.count() == 0) {
    return error;
  }
  constexpr uint64_t kPerBlock = kThreads * kWordsPerThread;
  const uint64_t wanted = (words.count() + kPerBlock - 1) / kPerBlock;
  const auto blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  add_words<<<blocks, kThreads, 0, stream>>>(words, reinterpret_cast<unsigned long long*>(sum));
  return cudaGetLastError();
}

bool is_aligned(const void* data, int64_t to) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(to) == 0;
}

}  // namespace

const char* launch_word_sum(const StridedWords& view, uint64_t* sum, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (view.is_contiguous() && is_aligned(view.data, 8)) {
    error = launch(ContiguousWords{view.data, view.nbytes()}, sum, cuda_stream);
  } else {
    StridedWords words = view;
    if (!is_aligned(view.data, view.itemsize < 8 ? view.itemsize : 8) &&
        !words.split_into_bytes()) {
      return "unaligned memory with too many dimensions";
    }
    error = launch(words, sum, cuda_stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace reprise
