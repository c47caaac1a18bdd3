// 64 bits that stand for the values of a tensor: what the "bitwise" determinism check
// notes of a tensor in the forward and compares with the recomputed one.
//
// Equal for equal bits, whatever the strides, the threads, or the device: -0.0 is not
// 0.0, and NaNs differ in their payload. element_hash.h says what else is guaranteed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace reprise {

// Of the values alone; the caller compares sizes, dtype and device (TensorMeta).
// Makes no history, is not seen by modes, autocast or the dispatcher's other
// wrappers, and does not take the interpreter lock.
//
// Read where they are, without a copy: plain, strided, expanded and quantized tensors on
// the CPU, and on CUDA in a build with REPRISE_CUDA. There it waits for the current
// stream, since the sum (8 bytes) has to be read back: some 10 us, and the host no
// longer runs ahead. On other devices, or without REPRISE_CUDA, the tensor is copied to
// the CPU as it is. A conjugate or negative view is resolved first, which takes a copy,
// and so does a tensor of more than 16 dimensions that cannot be merged.
// Sparse and nested tensors are the sum of their parts: indices and values as they lie (so
// that a coalesced tensor differs from an uncoalesced one), or components.
//
// Nothing, if there are no values that could be read:
//  - subclasses with __torch_dispatch__, jagged nested tensors among them. Where their parts
//    are, only Python knows (value_notes.h asks it): fingerprint what __tensor_flatten__ names, and
//    put it together with element_hash::combine;
//  - tensors inside of functorch's transforms or functionalization, fake and meta tensors,
//    symbolic sizes;
//  - memory that was freed behind the tensor's back (storage().resize_(0));
//  - a device whose current stream is being captured: nothing has been computed yet.
std::optional<uint64_t> fingerprint(const at::Tensor& tensor);

}  // namespace reprise
