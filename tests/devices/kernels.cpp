// Tensors, copies and random ops of the test device. Everything else goes to the
// CPU by torch's boxed fallback.
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <numbers>
#include <optional>
#include <tuple>

#include "generator.h"
#include "runtime.h"

namespace testdev {
namespace {

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// --- tensors

c10::Device checked_options(std::optional<at::Layout> layout, std::optional<at::Device> device,
                            std::optional<bool> pin_memory) {
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided && !pin_memory.value_or(false),
              "testdev has strided, unpinned tensors only");
  return {kType, checked(device.has_value() ? device->index() : c10::DeviceIndex{-1})};
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout> layout, std::optional<at::Device> device,
                 std::optional<bool> pin_memory, std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(checked_options(layout, device, pin_memory));
  return at::detail::empty_generic(size, allocator(), kKeys, c10::dtype_or_default(dtype),
                                   memory_format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                         std::optional<at::Device> device, std::optional<bool> pin_memory) {
  const c10::DeviceGuard guard(checked_options(layout, device, pin_memory));
  return at::detail::empty_strided_generic(size, stride, allocator(), kKeys,
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size,
                          std::optional<at::MemoryFormat> memory_format) {
  TORCH_CHECK(memory_format.value_or(at::MemoryFormat::Contiguous) == at::MemoryFormat::Contiguous,
              "testdev resizes to contiguous tensors only");
  const c10::Storage& storage = self.storage();
  const size_t bytes = at::detail::computeStorageNbytesContiguous(
      size, self.itemsize(), static_cast<size_t>(self.storage_offset()));
  if (bytes > storage.nbytes()) {
    const c10::DeviceGuard guard(self.device());
    c10::DataPtr grown = allocator()->allocate(bytes);
    if (storage.nbytes() > 0) {
      allocator()->copy_data(grown.get(), storage.data(), storage.nbytes());
    }
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

// --- copies

// The same memory as a CPU tensor, for as long as `tensor` lives.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) {
    return tensor;
  }
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       at::device(at::kCPU).dtype(tensor.dtype()));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool) {
  on_host(dst).copy_(on_host(self));
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  if (!self.sizes().equals(dst.sizes())) {
    dst.resize_(self.sizes());
  }
  return copy_from(self, dst, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) { return on_host(self).item(); }

at::Tensor& fill_(at::Tensor& self, const at::Scalar& value) {
  on_host(self).fill_(value);
  return self;
}

at::Tensor& zero_(at::Tensor& self) {
  on_host(self).zero_();
  return self;
}

// --- random ops

Draw draw_for(const at::Tensor& tensor, const std::optional<at::Generator>& given) {
  const bool is_given = given.has_value() && given->defined();
  at::Generator generator = is_given ? *given : default_generator(tensor.device().index());
  TORCH_CHECK_VALUE(generator.device() == tensor.device(), "generator: expected one of ",
                    tensor.device(), ", the tensor's device, got one of ", generator.device());
  std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get<TestGenerator>()->draw(static_cast<uint64_t>(tensor.numel()));
}

// Fills `self`, whatever its strides and dtype, with value(i, draw) in the order
// of its elements.
template <typename Value>
at::Tensor& fill_random(at::Tensor& self, const std::optional<at::Generator>& generator,
                        const Value& value) {
  if (self.numel() == 0) {
    return self;  // no number is drawn
  }
  const Draw draw = draw_for(self, generator);
  at::Tensor values = at::empty(self.sizes(), at::device(at::kCPU).dtype(at::kDouble));
  double* data = values.mutable_data_ptr<double>();
  for (int64_t i = 0; i < self.numel(); ++i) {
    data[i] = value(static_cast<uint64_t>(i), draw);
  }
  on_host(self).copy_(values);
  return self;
}

at::Tensor& bernoulli_float_(at::Tensor& self, double p, std::optional<at::Generator> generator) {
  return fill_random(self, generator,
                     [p](uint64_t i, const Draw& draw) { return draw.unit(i) < p ? 1.0 : 0.0; });
}

at::Tensor& bernoulli_tensor_(at::Tensor& self, const at::Tensor& p,
                              std::optional<at::Generator> generator) {
  const at::Tensor limits = on_host(p).expand(self.sizes()).to(at::kDouble).contiguous();
  const double* limit = limits.const_data_ptr<double>();
  return fill_random(self, generator, [limit](uint64_t i, const Draw& draw) {
    return draw.unit(i) < limit[i] ? 1.0 : 0.0;
  });
}

at::Tensor& uniform_(at::Tensor& self, double from, double to,
                     std::optional<at::Generator> generator) {
  return fill_random(self, generator, [from, to](uint64_t i, const Draw& draw) {
    return from + (to - from) * draw.unit(i);
  });
}

// Box and Muller, "A note on the generation of random normal deviates", 1958.
at::Tensor& normal_(at::Tensor& self, double mean, double std,
                    std::optional<at::Generator> generator) {
  return fill_random(self, generator, [mean, std](uint64_t i, const Draw& draw) {
    const double radius = std::sqrt(-2.0 * std::log1p(-draw.unit(2 * i)));
    return mean + std * radius * std::cos(2.0 * std::numbers::pi * draw.unit(2 * i + 1));
  });
}

// What F.dropout calls on a backend of this kind. It has no generator argument.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p,
                                                  std::optional<bool> train) {
  at::Tensor mask = at::empty(input.sizes(), input.options().dtype(at::kBool));
  if (!train.value_or(true)) {
    return {input.clone(), mask.fill_(true)};
  }
  bernoulli_float_(mask, 1.0 - p, std::nullopt);
  return {input * mask * (p == 1.0 ? 0.0 : 1.0 / (1.0 - p)), mask};
}

// --- the rest

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !op.hasTag(at::Tag::nondeterministic_seeded), op.operator_name(),
      ": testdev has no kernel for it, and the CPU's would draw from the CPU's generator");
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);

  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("fill_.Scalar", &fill_);
  m.impl("zero_", &zero_);

  m.impl("bernoulli_.float", &bernoulli_float_);
  m.impl("bernoulli_.Tensor", &bernoulli_tensor_);
  m.impl("uniform_", &uniform_);
  m.impl("normal_", &normal_);
  m.impl("native_dropout", &native_dropout);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace testdev
