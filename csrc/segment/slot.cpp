#include "segment/slot.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <sstream>

namespace reprise {

bool has_plain_sizes(const at::Tensor& tensor) {
  auto* impl = tensor.unsafeGetTensorImpl();
  return !impl->is_nested() && !impl->has_symbolic_sizes_strides() && !impl->is_python_dispatch();
}

bool Slot::matches(const at::Tensor& tensor, c10::IntArrayRef all_sizes) const {
  const auto sizes = tensor.sizes();
  return dtype == tensor.scalar_type() && device == tensor.device() && dim == sizes.size() &&
         std::equal(sizes.begin(), sizes.end(), all_sizes.begin() + first_size);
}

TensorMeta TensorMeta::of(const at::Tensor& tensor) {
  TensorMeta meta;
  meta.dtype = tensor.scalar_type();
  meta.device = tensor.device();
  auto* impl = tensor.unsafeGetTensorImpl();
  if (impl->is_nested() && impl->layout() == at::kStrided) {
    // Strided nested tensors have no sizes; their number of dimensions is exact.
    meta.sizes.assign(static_cast<size_t>(impl->dim()), Slot::kSymbolic);
  } else if (impl->has_symbolic_sizes_strides() || impl->is_python_dispatch()) {
    for (const auto& size : tensor.sym_sizes()) {
      meta.sizes.push_back(size.maybe_as_int().value_or(Slot::kSymbolic));
    }
  } else {
    const auto sizes = tensor.sizes();
    meta.sizes.assign(sizes.begin(), sizes.end());
  }
  return meta;
}

TensorMeta TensorMeta::of(const Slot& slot, c10::IntArrayRef sizes) {
  TensorMeta meta;
  meta.dtype = slot.dtype;
  meta.device = slot.device;
  const auto own = sizes.slice(slot.first_size, slot.dim);
  meta.sizes.assign(own.begin(), own.end());
  return meta;
}

bool TensorMeta::operator==(const TensorMeta& other) const {
  return dtype == other.dtype && device == other.device && sizes == other.sizes;
}

std::string TensorMeta::describe() const {
  std::ostringstream out;
  std::string name = c10::toString(dtype);
  // Users know "float32", not "Float".
  const auto names = c10::getDtypeNames(dtype);
  out << (names.first.empty() ? name : names.first) << " [";
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i == 0 ? "" : ", ");
    if (sizes[i] == Slot::kSymbolic) {
      out << "symbolic";
    } else {
      out << sizes[i];
    }
  }
  out << "] on " << device.str();
  return out.str();
}

}  // namespace reprise
