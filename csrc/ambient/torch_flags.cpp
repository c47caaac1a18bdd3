#include "ambient/torch_flags.h"

#include <ATen/Context.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "interned.h"
#include "open_member.h"
#include "per_thread.h"

namespace reprise {
namespace {

using Precisions =
    std::unordered_map<std::pair<at::Float32Backend, at::Float32Op>, at::Float32Precision,
                       c10::hash<std::pair<at::Float32Backend, at::Float32Op>>>;

REPRISE_OPEN_MEMBER(Member_enabled_cudnn, at::Context, enabled_cudnn, bool)
REPRISE_OPEN_MEMBER(Member_deterministic_cudnn, at::Context, deterministic_cudnn, bool)
REPRISE_OPEN_MEMBER(Member_benchmark_cudnn, at::Context, benchmark_cudnn, bool)
REPRISE_OPEN_MEMBER(Member_benchmark_limit_cudnn, at::Context, benchmark_limit_cudnn, int)
REPRISE_OPEN_MEMBER(Member_allow_tf32_cudnn, at::Context, allow_tf32_cudnn, bool)
REPRISE_OPEN_MEMBER(Member_depthwise_kernel_cudnn, at::Context, depthwise_kernel_cudnn,
                    at::CuDNNDepthwiseKernel)
REPRISE_OPEN_MEMBER(Member_immediate_miopen, at::Context, immediate_miopen, bool)
REPRISE_OPEN_MEMBER(Member_enabled_mkldnn, at::Context, enabled_mkldnn, bool)
REPRISE_OPEN_MEMBER(Member_deterministic_mkldnn, at::Context, deterministic_mkldnn, bool)
REPRISE_OPEN_MEMBER(Member_allow_tf32_onednn, at::Context, allow_tf32_onednn, bool)
REPRISE_OPEN_MEMBER(Member_enabled_nnpack, at::Context, enabled_nnpack, bool)
REPRISE_OPEN_MEMBER(Member__deterministic_algorithms, at::Context, _deterministic_algorithms, bool)
REPRISE_OPEN_MEMBER(Member__deterministic_algorithms_warn_only, at::Context,
                    _deterministic_algorithms_warn_only, bool)
REPRISE_OPEN_MEMBER(Member__deterministic_fill_uninitialized_memory, at::Context,
                    _deterministic_fill_uninitialized_memory, bool)
REPRISE_OPEN_MEMBER(Member_sdp_priority_order, at::Context, sdp_priority_order,
                    std::array<at::SDPBackend, at::num_sdp_backends>)
REPRISE_OPEN_MEMBER(Member_enabled_flashSDP, at::Context, enabled_flashSDP, bool)
REPRISE_OPEN_MEMBER(Member_enabled_fa3SDP, at::Context, enabled_fa3SDP, bool)
REPRISE_OPEN_MEMBER(Member_enabled_mem_efficientSDP, at::Context, enabled_mem_efficientSDP, bool)
REPRISE_OPEN_MEMBER(Member_enabled_mathSDP, at::Context, enabled_mathSDP, bool)
REPRISE_OPEN_MEMBER(Member_enabled_cudnnSDP, at::Context, enabled_cudnnSDP, bool)
REPRISE_OPEN_MEMBER(Member_enabled_overrideable, at::Context, enabled_overrideable, bool)
REPRISE_OPEN_MEMBER(Member_allow_fp16_bf16_reduction_mathSDP, at::Context,
                    allow_fp16_bf16_reduction_mathSDP, bool)
REPRISE_OPEN_MEMBER(Member_float32_matmul_precision, at::Context, float32_matmul_precision,
                    at::Float32MatmulPrecision)
REPRISE_OPEN_MEMBER(Member_allow_fp16_reduction_cublas, at::Context, allow_fp16_reduction_cublas,
                    at::CuBLASReductionOption)
REPRISE_OPEN_MEMBER(Member_allow_bf16_reduction_cublas, at::Context, allow_bf16_reduction_cublas,
                    at::CuBLASReductionOption)
REPRISE_OPEN_MEMBER(Member_allow_fp16_accumulation_cublas, at::Context,
                    allow_fp16_accumulation_cublas, bool)
REPRISE_OPEN_MEMBER(Member_allow_fp16_reduction_cpu, at::Context, allow_fp16_reduction_cpu, bool)
REPRISE_OPEN_MEMBER(Member_linalg_preferred_backend, at::Context, linalg_preferred_backend,
                    at::LinalgBackend)
REPRISE_OPEN_MEMBER(Member_blas_preferred_backend, at::Context, blas_preferred_backend,
                    at::BlasBackend)
REPRISE_OPEN_MEMBER(Member_rocm_fa_preferred_backend, at::Context, rocm_fa_preferred_backend,
                    at::ROCmFABackend)
REPRISE_OPEN_MEMBER(Member_fp32_precision, at::Context, fp32_precision, Precisions)

struct Flag {
  std::string name;
  void* address;  // into torch's context, which is never destroyed
  size_t size;
  std::string (*text)(const std::byte* value);
};

template <typename T>
T read(const std::byte* value) {
  T result;
  std::memcpy(&result, value, sizeof(T));
  return result;
}

// A setting as its user would write it; numbers where torch's enum has no Python name.
template <typename T>
std::string text_of(const std::byte* value) {
  const T flag = read<T>(value);
  if constexpr (std::is_same_v<T, bool>) {
    return flag ? "True" : "False";
  } else if constexpr (std::is_same_v<T, at::Float32MatmulPrecision>) {
    return flag == at::Float32MatmulPrecision::HIGHEST ? "'highest'"
           : flag == at::Float32MatmulPrecision::HIGH  ? "'high'"
                                                       : "'medium'";
  } else if constexpr (std::is_same_v<T, at::Float32Precision>) {
    return flag == at::Float32Precision::DEFAULT ? "default" : at::precision2str(flag);
  } else if constexpr (std::is_same_v<T, std::array<at::SDPBackend, at::num_sdp_backends>>) {
    std::string text = "[";
    for (size_t i = 0; i < flag.size(); ++i) {
      text += (i == 0 ? "" : ", ") + std::to_string(static_cast<int>(flag[i]));
    }
    return text + "]";
  } else {
    return std::to_string(static_cast<int>(flag));
  }
}

template <typename Tag>
Flag flag(const char* name, Tag tag) {
  auto& value = at::globalContext().*member_of(tag);
  using T = std::remove_reference_t<decltype(value)>;
  static_assert(std::is_trivially_copyable_v<T> && std::has_unique_object_representations_v<T>);
  return {name, &value, sizeof(T), &text_of<T>};
}

std::vector<Flag> make_table() {
  std::vector<Flag> table = {
      flag("torch.backends.cudnn.enabled", Member_enabled_cudnn()),
      flag("torch.backends.cudnn.deterministic", Member_deterministic_cudnn()),
      flag("torch.backends.cudnn.benchmark", Member_benchmark_cudnn()),
      flag("torch.backends.cudnn.benchmark_limit", Member_benchmark_limit_cudnn()),
      flag("torch.backends.cudnn.allow_tf32", Member_allow_tf32_cudnn()),
      flag("the depthwise kernel of cuDNN", Member_depthwise_kernel_cudnn()),
      flag("torch.backends.miopen.immediate", Member_immediate_miopen()),
      flag("torch.backends.mkldnn.enabled", Member_enabled_mkldnn()),
      flag("torch.backends.mkldnn.deterministic", Member_deterministic_mkldnn()),
      flag("torch.backends.mkldnn.allow_tf32", Member_allow_tf32_onednn()),
      flag("torch.backends.nnpack", Member_enabled_nnpack()),
      flag("torch.use_deterministic_algorithms", Member__deterministic_algorithms()),
      flag("torch.use_deterministic_algorithms(warn_only=...)",
           Member__deterministic_algorithms_warn_only()),
      flag("torch.utils.deterministic.fill_uninitialized_memory",
           Member__deterministic_fill_uninitialized_memory()),
      flag("the priority of the SDPA backends", Member_sdp_priority_order()),
      flag("SDPA with flash attention", Member_enabled_flashSDP()),
      flag("SDPA with flash attention 3", Member_enabled_fa3SDP()),
      flag("SDPA with memory-efficient attention", Member_enabled_mem_efficientSDP()),
      flag("SDPA with math", Member_enabled_mathSDP()),
      flag("SDPA with cuDNN", Member_enabled_cudnnSDP()),
      flag("SDPA with an overriding backend", Member_enabled_overrideable()),
      flag("reduced precision in SDPA with math", Member_allow_fp16_bf16_reduction_mathSDP()),
      flag("torch.set_float32_matmul_precision", Member_float32_matmul_precision()),
      flag("torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
           Member_allow_fp16_reduction_cublas()),
      flag("torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
           Member_allow_bf16_reduction_cublas()),
      flag("torch.backends.cuda.matmul.allow_fp16_accumulation",
           Member_allow_fp16_accumulation_cublas()),
      flag("fp16 reductions on the CPU", Member_allow_fp16_reduction_cpu()),
      flag("torch.backends.cuda.preferred_linalg_library", Member_linalg_preferred_backend()),
      flag("torch.backends.cuda.preferred_blas_library", Member_blas_preferred_backend()),
      flag("torch.backends.cuda.preferred_rocm_fa_library", Member_rocm_fa_preferred_backend()),
  };
  // The map's entries are all made with the context, and its nodes stay where they are.
  for (auto& [key, precision] : at::globalContext().*member_of(Member_fp32_precision())) {
    const char* backend = key.first == at::Float32Backend::GENERIC ? ""
                          : key.first == at::Float32Backend::CUDA  ? "cuda."
                                                                   : "mkldnn.";
    const char* op = key.second == at::Float32Op::ALL    ? ""
                     : key.second == at::Float32Op::CONV ? "conv."
                     : key.second == at::Float32Op::RNN  ? "rnn."
                                                         : "matmul.";
    table.push_back({std::string("torch.backends.") + backend + op + "fp32_precision", &precision,
                     sizeof(precision), &text_of<at::Float32Precision>});
  }
  return table;
}

const std::vector<Flag>& table() {
  static const auto& flags = *new std::vector<Flag>(make_table());
  return flags;
}

// The flags that lie in the context itself, between the first and the last of them, and
// the values of its map. What lies between them and is no flag does no harm: it makes
// an equal state look changed, which is found out by reading it flag by flag.
struct Memory {
  const std::byte* begin;
  size_t size;
  std::vector<const at::Float32Precision*> precisions;

  static const Memory& get() {
    static const auto& memory = *new Memory;
    return memory;
  }

 private:
  Memory() {
    const auto* context = reinterpret_cast<const std::byte*>(&at::globalContext());
    const std::byte* end = context;
    begin = context + sizeof(at::Context);
    for (const Flag& flag : table()) {
      const auto* address = static_cast<const std::byte*>(flag.address);
      if (address >= context && address < context + sizeof(at::Context)) {
        begin = std::min(begin, address);
        end = std::max(end, address + flag.size);
      } else {
        precisions.push_back(static_cast<const at::Float32Precision*>(flag.address));
      }
    }
    size = static_cast<size_t>(end - begin);
  }
};

// What the memory looked like when the flags were read last.
struct LastSeen {
  const TorchFlags* flags = nullptr;
  at::ScalarType default_dtype;
  c10::SmallVector<at::Float32Precision, 16> precisions;
  c10::SmallVector<std::byte, 256> bytes;

  bool still_so() const {
    const Memory& memory = Memory::get();
    if (flags == nullptr || default_dtype != c10::get_default_dtype_as_scalartype() ||
        std::memcmp(bytes.data(), memory.begin, memory.size) != 0) {
      return false;
    }
    for (size_t i = 0; i < precisions.size(); ++i) {
      if (precisions[i] != *memory.precisions[i]) {
        return false;
      }
    }
    return true;
  }

  void look() {
    const Memory& memory = Memory::get();
    default_dtype = c10::get_default_dtype_as_scalartype();
    bytes.assign(memory.begin, memory.begin + memory.size);
    precisions.clear();
    for (const auto* precision : memory.precisions) {
      precisions.push_back(*precision);
    }
  }
};

}  // namespace

TorchFlags TorchFlags::read() {
  TorchFlags flags;
  flags.bytes_[0] = static_cast<std::byte>(c10::get_default_dtype_as_scalartype());
  size_t next = 1;
  for (const Flag& flag : table()) {
    TORCH_INTERNAL_ASSERT(next + flag.size <= kBytes);
    std::memcpy(&flags.bytes_[next], flag.address, flag.size);
    next += flag.size;
  }
  return flags;
}

const TorchFlags* TorchFlags::current() {
  LastSeen& last = per_thread<LastSeen>();
  if (!last.still_so()) {
    last.look();
    last.flags = the_one_equal_to<TorchFlags>(read());
  }
  return last.flags;
}

void TorchFlags::apply(const TorchFlags& now) const {
  if (this == &now) {
    return;
  }
  if (bytes_[0] != now.bytes_[0]) {
    c10::set_default_dtype(c10::scalarTypeToTypeMeta(static_cast<at::ScalarType>(bytes_[0])));
  }
  size_t next = 1;
  for (const Flag& flag : table()) {
    if (std::memcmp(&bytes_[next], &now.bytes_[next], flag.size) != 0) {
      std::memcpy(flag.address, &bytes_[next], flag.size);
    }
    next += flag.size;
  }
}

std::string TorchFlags::diff(const TorchFlags& now) const {
  std::ostringstream text;
  const char* separator = "";
  const auto add = [&](const std::string& name, const std::string& then, const std::string& is) {
    text << separator << name << " was " << then << " in the forward, is " << is << " now";
    separator = "\n";
  };
  if (bytes_[0] != now.bytes_[0]) {
    const auto name = [](std::byte dtype) {
      return std::string(c10::getDtypeNames(static_cast<at::ScalarType>(dtype)).first);
    };
    add("default dtype", name(bytes_[0]), name(now.bytes_[0]));
  }
  size_t next = 1;
  for (const Flag& flag : table()) {
    if (std::memcmp(&bytes_[next], &now.bytes_[next], flag.size) != 0) {
      add(flag.name, flag.text(&bytes_[next]), flag.text(&now.bytes_[next]));
    }
    next += flag.size;
  }
  return text.str();
}

}  // namespace reprise
