#include "fingerprint/fingerprint.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/TensorIterator.h>
#include <ATen/quantized/QTensorImpl.h>
#include <ATen/quantized/Quantizer.h>
#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>

#include "fingerprint/element_hash.h"
#include "fingerprint/strided_words.h"
#include "fingerprint/word_sum.h"
#include "rng/stream_capture.h"
#include "unobserved.h"
#ifdef REPRISE_CUDA
#include "fingerprint/fingerprint_cuda.h"
#endif

namespace reprise {

using element_hash::combine;
using element_hash::seal;

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

// What a thread takes at a time, in bytes of the values, and how many of these have to be there
// before another thread is worth waking.
constexpr int64_t kChunk = 32 * 1024;
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kWordSize = 8;

// The sum of body(first, end) over ranges of [0, chunks), on torch's threads.
//
// at::parallel_for would run on one thread: it is a template that looks for OpenMP in the
// file that includes it, and this library neither needs OpenMP otherwise nor wants to
// guess which of its runtimes torch was built with. A TensorIterator calls parallel_for
// from within torch. It goes over a tensor of one byte per chunk, none of which is read:
// a byte's address tells the number of its chunk.
using Body = c10::function_ref<uint64_t(int64_t first, int64_t end)>;
uint64_t sum_over(int64_t chunks, Body body) {
  if (chunks <= kChunksPerThread || at::get_num_threads() == 1 || at::in_parallel_region()) {
    return body(0, chunks);
  }
  const at::TensorBase numbers = at::detail::empty_cpu({chunks}, at::TensorOptions(at::kByte));
  const auto* zero = static_cast<const char*>(numbers.const_data_ptr());
  std::atomic<uint64_t> sum{0};
  auto iterator =
      at::TensorIteratorConfig().set_check_mem_overlap(false).add_const_input(numbers).build();
  iterator.for_each(
      [&](char** data, const int64_t* strides, int64_t count, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t first = data[0] + row * strides[1] - zero;
          sum.fetch_add(body(first, first + count), std::memory_order_relaxed);
        }
      },
      kChunksPerThread);
  return sum.load(std::memory_order_relaxed);
}

// --- CPU

// The sum of the words that the `nbytes` bytes at `data` begin with; `position`: of the first.
uint64_t sum_of_bytes(const unsigned char* data, uint64_t position, int64_t nbytes) {
  const auto words = static_cast<size_t>(nbytes / kWordSize);
  uint64_t sum = word_sum(data, position, words);
  if (const int64_t rest = nbytes % kWordSize; rest != 0) {
    uint64_t last = 0;
    std::memcpy(&last, data + words * kWordSize, static_cast<size_t>(rest));
    sum += element_hash::mix(position + words, last);
  }
  return sum;
}

// Puts elements first .. first + count - 1 one behind the other.
template <typename Unit>
void gather(const StridedWords& view, int64_t first, int64_t count, Unit* out) {
  std::array<int64_t, StridedWords::kMaxDims> at = {};
  const unsigned char* source = view.data;
  int64_t rest = first;
  for (int d = view.dims - 1; d >= 0; --d) {
    at[d] = rest % view.sizes[d];
    rest /= view.sizes[d];
    source += at[d] * view.strides[d];
  }
  const int inner = view.dims - 1;
  const int64_t stride = view.strides[inner];
  while (count > 0) {
    const int64_t run = std::min(count, view.sizes[inner] - at[inner]);
    if (stride == static_cast<int64_t>(sizeof(Unit))) {
      std::memcpy(out, source, static_cast<size_t>(run) * sizeof(Unit));
    } else {
      for (int64_t i = 0; i < run; ++i) {
        std::memcpy(out + i, source + i * stride, sizeof(Unit));
      }
    }
    out += run;
    count -= run;
    source += run * stride;
    at[inner] += run;
    for (int d = inner; d > 0 && at[d] == view.sizes[d]; --d) {
      source += view.strides[d - 1] - view.sizes[d] * view.strides[d];
      at[d] = 0;
      ++at[d - 1];
    }
  }
}

template <typename Unit>
uint64_t sum_gathered(const StridedWords& view) {
  constexpr int64_t kElements = kChunk / static_cast<int64_t>(sizeof(Unit));
  const int64_t chunks = (view.numel + kElements - 1) / kElements;
  return sum_over(chunks, [&](int64_t begin, int64_t end) {
    alignas(64) Unit buffer[kElements];
    uint64_t sum = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kElements;
      const int64_t count = std::min(kElements, view.numel - first);
      gather(view, first, count, buffer);
      sum += sum_of_bytes(reinterpret_cast<const unsigned char*>(buffer),
                          static_cast<uint64_t>(chunk * (kChunk / kWordSize)),
                          count * static_cast<int64_t>(sizeof(Unit)));
    }
    return sum;
  });
}

// The dimension along which memory is read when the innermost one leaps: the one of the
// shortest stride, as for the rows of a transposed matrix. -1 if the innermost is it, if
// there are too few elements to gain anything, or if rows do not begin with a word.
int dimension_across(const StridedWords& view) {
  const int inner = view.dims - 1;
  int across = -1;
  for (int d = 0; d < inner; ++d) {
    const int64_t shortest = across < 0 ? view.strides[inner] : view.strides[across];
    if (view.strides[d] > 0 && view.strides[d] < shortest && view.sizes[d] >= 8) {
      across = d;
    }
  }
  const bool whole_words = view.sizes[inner] * view.itemsize % kWordSize == 0;
  return whole_words ? across : -1;
}

// The same sum in another order: tiles of so many rows that whole cache lines are used
// at once. In the order of the indices each line would be fetched again for every element.
template <typename Unit>
uint64_t sum_tiled(const StridedWords& view, int across) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Unit));
  constexpr int64_t kRows = 128 / kSize;  // two cache lines
  constexpr int64_t kColumns = kChunk / 128;
  constexpr int64_t kPitch = kColumns + 64 / kSize;  // or the rows would share cache sets
  constexpr int64_t kAhead = 16;                     // columns
  const int inner = view.dims - 1;
  std::array<int64_t, StridedWords::kMaxDims> tiles = {};   // along each dimension
  std::array<int64_t, StridedWords::kMaxDims> places = {};  // of an index in the order of elements
  int64_t count = 1;
  int64_t place = 1;
  for (int d = inner; d >= 0; --d) {
    const int64_t length = d == inner ? kColumns : d == across ? kRows : 1;
    tiles[d] = (view.sizes[d] + length - 1) / length;
    places[d] = place;
    count *= tiles[d];
    place *= view.sizes[d];
  }
  return sum_over(count, [&](int64_t begin, int64_t end) {
    alignas(64) Unit buffer[kRows * kPitch];
    uint64_t sum = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      const unsigned char* source = view.data;
      int64_t first = 0;  // element
      int64_t rows = 0;
      int64_t columns = 0;
      int64_t rest = tile;
      for (int d = inner; d >= 0; --d) {
        int64_t index = rest % tiles[d];
        rest /= tiles[d];
        if (d == inner) {
          index *= kColumns;
          columns = std::min(kColumns, view.sizes[d] - index);
        } else if (d == across) {
          index *= kRows;
          rows = std::min(kRows, view.sizes[d] - index);
        }
        source += index * view.strides[d];
        first += index * places[d];
      }
      for (int64_t column = 0; column < columns; ++column) {
        const unsigned char* from = source + column * view.strides[inner];
        // No processor foresees these leaps. Past the end of the memory it does nothing.
        __builtin_prefetch(from + kAhead * view.strides[inner]);
        __builtin_prefetch(from + kAhead * view.strides[inner] + 64);
        for (int64_t row = 0; row < rows; ++row) {
          std::memcpy(buffer + row * kPitch + column, from + row * view.strides[across],
                      sizeof(Unit));
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        sum += word_sum(buffer + row * kPitch,
                        static_cast<uint64_t>((first + row * places[across]) * kSize / kWordSize),
                        static_cast<size_t>(columns * kSize / kWordSize));
      }
    }
    return sum;
  });
}

template <typename Unit>
uint64_t sum_strided(const StridedWords& view) {
  const int across = dimension_across(view);
  return across < 0 ? sum_gathered<Unit>(view) : sum_tiled<Unit>(view, across);
}

uint64_t sum_on_cpu(const StridedWords& view) {
  if (view.is_contiguous()) {
    const int64_t nbytes = view.nbytes();
    const int64_t chunks = (nbytes + kChunk - 1) / kChunk;
    return sum_over(chunks, [&](int64_t begin, int64_t end) {
      return sum_of_bytes(view.data + begin * kChunk,
                          static_cast<uint64_t>(begin * (kChunk / kWordSize)),
                          std::min(end * kChunk, nbytes) - begin * kChunk);
    });
  }
  switch (view.itemsize) {
    case 1:
      return sum_strided<uint8_t>(view);
    case 2:
      return sum_strided<uint16_t>(view);
    case 4:
      return sum_strided<uint32_t>(view);
    case 8:
      return sum_strided<uint64_t>(view);
    default:
      return sum_strided<std::array<uint64_t, 2>>(view);
  }
}

// --- CUDA

#ifdef REPRISE_CUDA
uint64_t sum_on_cuda(const StridedWords& view, c10::Device device) {
  const OnDevice there(device);
  const auto* guard = c10::impl::getDeviceGuardImpl(device.type());
  const at::Tensor sum = at::empty({1}, at::TensorOptions(at::kLong).device(device));
  const char* error = launch_word_sum(view, static_cast<uint64_t*>(sum.mutable_data_ptr()),
                                      guard->getStreamNativeHandle(guard->getStream(device)));
  TORCH_CHECK(error == nullptr, "torch_reprise: no fingerprint of a tensor on ", device, ": ",
              error);
  return static_cast<uint64_t>(sum.item<int64_t>());
}
#endif

bool is_read_in_place(c10::DeviceType type) {
#ifdef REPRISE_CUDA
  return type == c10::DeviceType::CPU || type == c10::DeviceType::CUDA;
#else
  return type == c10::DeviceType::CPU;
#endif
}

// --- Tensors with memory

// Elements of less than a byte lie several to a byte.
int64_t elements_per_byte(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::QUInt4x2:
      return 2;
    case c10::ScalarType::QUInt2x4:
      return 4;
    default:
      return 1;
  }
}

enum class View { kFine, kNoMemory, kTooManyDims };

View view_of(const at::Tensor& tensor, StridedWords& view) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const int64_t per_byte = elements_per_byte(tensor.scalar_type());
  view.itemsize = static_cast<int32_t>(impl->itemsize());
  view.numel = (impl->numel() + per_byte - 1) / per_byte;
  int64_t last = 0;  // offset of the last element in bytes
  bool room = true;
  if (impl->is_contiguous() || per_byte > 1) {
    last = (view.numel - 1) * view.itemsize;
    room = view.push(view.numel, view.itemsize);
  } else {
    const auto sizes = impl->sizes();
    const auto strides = impl->strides();
    for (size_t d = 0; d < sizes.size(); ++d) {
      last += (sizes[d] - 1) * strides[d] * view.itemsize;
      room = room && view.push(sizes[d], strides[d] * view.itemsize);
    }
  }
  if (!impl->has_storage()) {
    return View::kNoMemory;
  }
  const c10::Storage& storage = impl->storage();
  const int64_t begin = impl->storage_offset() * view.itemsize;
  if (storage.data() == nullptr ||
      begin + last + view.itemsize > static_cast<int64_t>(storage.nbytes())) {
    return View::kNoMemory;
  }
  view.data = static_cast<const unsigned char*>(storage.data()) + begin;
  return room ? View::kFine : View::kTooManyDims;
}

std::optional<uint64_t> of_memory(const at::Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->numel() == 0) {
    return seal(0, 0);
  }
  StridedWords view;
  switch (view_of(tensor, view)) {
    case View::kNoMemory:
      return std::nullopt;
    case View::kTooManyDims: {
      const Unobserved quietly;
      return of_memory(tensor.contiguous());
    }
    case View::kFine:
      break;
  }
#ifdef REPRISE_CUDA
  if (tensor.is_cuda()) {
    const Unobserved quietly;
    return seal(sum_on_cuda(view, tensor.device()), static_cast<uint64_t>(view.nbytes()));
  }
#endif
  return seal(sum_on_cpu(view), static_cast<uint64_t>(view.nbytes()));
}

// --- Tensors that are something else

std::optional<uint64_t> combined(std::optional<uint64_t> first, std::optional<uint64_t> second) {
  if (!first.has_value() || !second.has_value()) {
    return std::nullopt;
  }
  return combine(*first, *second);
}

// What the integers of a quantized tensor mean.
std::optional<uint64_t> of_quantizer(const at::Tensor& tensor) {
  const at::QuantizerPtr quantizer = at::get_qtensorimpl(tensor)->quantizer();
  switch (quantizer->qscheme()) {
    case at::kPerTensorAffine: {
      const auto& affine = static_cast<const at::PerTensorAffineQuantizer&>(*quantizer);
      return combine(std::bit_cast<uint64_t>(affine.scale()),
                     static_cast<uint64_t>(affine.zero_point()));
    }
    case at::kPerChannelAffine:
    case at::kPerChannelAffineFloatQParams: {
      const auto& affine = static_cast<const at::PerChannelAffineQuantizer&>(*quantizer);
      return combined(combined(fingerprint(affine.scales()), fingerprint(affine.zero_points())),
                      static_cast<uint64_t>(affine.axis()));
    }
    default:
      return std::nullopt;
  }
}

std::optional<uint64_t> of_components(const at::Tensor& nested) {
  const Unobserved quietly;
  std::optional<uint64_t> all = seal(0, 0);
  for (const at::Tensor& component : nested.unbind()) {
    all = combined(all, fingerprint(component));
  }
  return all;
}

// Anything but a plain tensor in memory that is read in place.
std::optional<uint64_t> of_special(const at::Tensor& tensor) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const DispatchKeySet keys = impl->key_set();
  if (keys.has_any(kWrapped) || tensor.device().is_meta()) {
    return std::nullopt;
  }
  if (!tensor.device().is_cpu() && is_captured(tensor.device())) {
    return std::nullopt;
  }
  if (impl->is_nested()) {
    return impl->layout() == at::kStrided ? of_components(tensor) : std::nullopt;
  }
  if (impl->has_symbolic_sizes_strides()) {
    return std::nullopt;
  }
  switch (impl->layout()) {
    case at::kSparse: {
      const auto* sparse = static_cast<const at::SparseTensorImpl*>(impl);
      return combined(fingerprint(sparse->indices()), fingerprint(sparse->values()));
    }
    case at::kSparseCsr:
    case at::kSparseCsc:
    case at::kSparseBsr:
    case at::kSparseBsc: {
      const auto* sparse = at::sparse_csr::get_sparse_csr_impl(tensor);
      return combined(
          combined(fingerprint(sparse->compressed_indices()), fingerprint(sparse->plain_indices())),
          fingerprint(sparse->values()));
    }
    case at::kMkldnn: {
      const Unobserved quietly;
      return fingerprint(tensor.to_dense());
    }
    case at::kStrided:
      break;
    default:
      return std::nullopt;
  }
  if (keys.has(DispatchKey::ZeroTensor)) {  // has no memory, and stands for zeros
    const Unobserved quietly;
    const at::Tensor zero = at::zeros({}, at::TensorOptions(tensor.scalar_type()).device(at::kCPU));
    return fingerprint(zero.expand(tensor.sizes()));
  }
  if (tensor.is_conj() || tensor.is_neg()) {
    const Unobserved quietly;
    return fingerprint(tensor.resolve_conj().resolve_neg());
  }
  if (tensor.is_quantized()) {
    return combined(of_memory(tensor), of_quantizer(tensor));
  }
  if (!is_read_in_place(tensor.device().type())) {
    const Unobserved quietly;
    return fingerprint(tensor.to(at::kCPU));
  }
  return of_memory(tensor);
}

}  // namespace

std::optional<uint64_t> fingerprint(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return std::nullopt;
  }
  // Every kind that of_special() knows of has one of these keys, is no longer strided, or has
  // sizes of its own.
  constexpr DispatchKeySet special =
      kWrapped | DispatchKeySet({DispatchKey::Conjugate, DispatchKey::Negative,
                                 DispatchKey::ZeroTensor, DispatchKey::NestedTensor});
  auto* impl = tensor.unsafeGetTensorImpl();
  const bool plain = !impl->key_set().has_any(special) && impl->device_type() == at::kCPU &&
                     impl->layout() == at::kStrided && !tensor.is_quantized() &&
                     !impl->has_symbolic_sizes_strides();
  return plain ? of_memory(tensor) : of_special(tensor);
}

}  // namespace reprise
