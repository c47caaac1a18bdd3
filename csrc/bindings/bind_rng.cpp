#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/python_object.h"
#include "rng/rng_snapshot.h"

namespace py = pybind11;

namespace reprise::bindings {
namespace {

// torch initialises these lazily and says so in their Python module; asking the
// driver would initialise it, and break a later fork.
bool initialised_in_python(const char* module_name) {
  WithInterpreter lock;
  const py::object module = py::module_::import("torch").attr(module_name);
  return module.attr("is_initialized")().cast<bool>();
}

bool is_initialised(c10::DeviceType type) {
  // Once yes, always yes, so that a segment pays one load.
  static std::array<std::atomic<bool>, c10::COMPILE_TIME_MAX_DEVICE_TYPES> known{};
  auto& yes = known[static_cast<size_t>(type)];
  if (yes.load(std::memory_order_relaxed)) {
    return true;
  }
  bool now = false;
  switch (type) {
    case c10::DeviceType::CUDA:
      now = initialised_in_python("cuda");
      break;
    case c10::DeviceType::XPU:
      now = initialised_in_python("xpu");
      break;
    case c10::DeviceType::MTIA:
      now = initialised_in_python("mtia");
      break;
    default:
      now = accelerator_has_context(type);
      break;
  }
  if (now) {
    yes.store(true, std::memory_order_relaxed);
  }
  return now;
}

}  // namespace

void bind_rng(py::module_& module) {
  set_initialised_query(&is_initialised);
  module.def("default_generator_names", [] {
    std::vector<std::string> names;
    for (const auto& generator : default_generators()) {
      names.push_back(generator_name(generator));
    }
    return names;
  });
}

}  // namespace reprise::bindings
