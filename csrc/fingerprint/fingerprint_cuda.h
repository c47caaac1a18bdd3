// The sum of mixed words of memory on a CUDA device. Neither torch nor CUDA headers are
// needed to include this. Only there in a build with REPRISE_CUDA.
#pragma once

#include <cstdint>

#include "fingerprint/strided_words.h"

namespace reprise {

// Sets *sum, which lies on the device, to the sum of the view's words, in the order of
// `stream` (a cudaStream_t); the current device is that of the memory. Does not wait.
// Null, or what CUDA says is wrong.
const char* launch_word_sum(const StridedWords& view, uint64_t* sum, void* stream);

}  // namespace reprise
