#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "bindings/python_object.h"
#include "lease.h"
#include "rng/rng_snapshot.h"
#include "rng/rnn_dropout.h"
#include "torch_compat.h"

namespace py = pybind11;

namespace reprise::bindings {
namespace {

// What the Python module of a device type says, which also knows of forks.
bool is_initialised_in_python(c10::DeviceType type) {
  std::string name = c10::DeviceTypeName(type, /*lower_case=*/true);
  WithInterpreter lock;
  return py::module_::import("torch").attr(name.c_str()).attr("is_initialized")().cast<bool>();
}

// A turn with the generators of Python and NumPy, which replays rewind in Python.
class HostGeneratorsTurn {
 public:
  void take() {
    static const char key = 0;
    lease_.emplace(Lease::Kind::kHostGenerators, Lease::Keys{&key},
                   [](size_t) { return std::string("the generators of Python and NumPy"); });
  }
  void give_back() { lease_.reset(); }

 private:
  std::optional<Lease> lease_;
};

std::vector<at::Generator> in_order(const RngSnapshot& snapshot) {
  const auto generators = snapshot.generators();
  return {generators.begin(), generators.end()};
}

// By content, whatever the order.
bool equal(const RngSnapshot& a, const RngSnapshot& b) {
  const auto& others = b.entries();
  return a.size() == b.size() &&
         std::all_of(a.entries().begin(), a.entries().end(), [&others](const auto& entry) {
           return std::any_of(others.begin(), others.end(), [&entry](const auto& other) {
             return entry.generator == other.generator && entry.state == other.state;
           });
         });
}

void bind_snapshot(py::module_& module) {
  py::class_<HostGeneratorsTurn>(module, "HostGeneratorsTurn")
      .def(py::init<>())
      .def("take", &HostGeneratorsTurn::take)
      .def("give_back", &HostGeneratorsTurn::give_back);
  py::class_<RngSnapshot>(module, "RngSnapshot")
      .def_static("capture",
                  [](const std::vector<at::Generator>& generators) {
                    return RngSnapshot::capture(generators);
                  })
      .def_static("capture_defaults", [] { return RngSnapshot::capture(default_generators()); })
      .def_static(
          "from_tensors",
          [](const std::vector<at::Generator>& generators, const std::vector<at::Tensor>& tensors) {
            std::vector<std::pair<at::Generator, GeneratorState>> states;
            for (size_t i = 0; i < generators.size(); ++i) {
              states.emplace_back(generators[i],
                                  GeneratorState::from_tensor(generators[i], tensors.at(i)));
            }
            return RngSnapshot::of(std::move(states));
          })
      .def("restore", [](RngSnapshot& self) { self.restore_moved(); })
      .def("equal", &equal)
      .def("names", &RngSnapshot::names)
      .def("generators", &in_order)
      .def("nbytes",
           [](const RngSnapshot& self) {
             std::unordered_set<const void*> seen;
             return self.nbytes(seen);
           })
      .def("tensors",
           [](const RngSnapshot& self) {
             std::vector<at::Tensor> tensors;
             for (size_t i = 0; i < self.size(); ++i) {
               tensors.push_back(self.state(i).to_tensor());
             }
             return tensors;
           })
      .def("describe", [](const RngSnapshot& self) {
        std::vector<std::string> lines;
        for (size_t i = 0; i < self.size(); ++i) {
          lines.push_back(self.state(i).describe());
        }
        return lines;
      });
}

}  // namespace

void bind_rng(py::module_& module) {
  set_initialised_query(&is_initialised_in_python);
  bind_snapshot(module);
  module.def("default_generators", [] {
    const auto generators = default_generators();
    return std::vector<at::Generator>(generators.begin(), generators.end());
  });
  module.def("generator_name", &generator_name);
  module.def("enable_philox_fields", &compat::enable_philox_fields);
  module.def("philox_fields", [](const at::Generator& generator) {
    std::optional<std::tuple<uint64_t, uint64_t, bool>> found;
    auto* impl = generator.unsafeGetGeneratorImpl();
    std::lock_guard<std::mutex> lock(impl->mutex_);
    if (const auto fields = compat::philox_fields(*impl)) {
      found.emplace(fields->seed, fields->offset, fields->keeps_rnn_state.test());
    }
    return found;
  });
  // As the first RNN with dropout does.
  module.def("keep_rnn_state", [](const at::Generator& generator) {
    auto* impl = generator.unsafeGetGeneratorImpl();
    std::lock_guard<std::mutex> lock(impl->mutex_);
    if (const auto fields = compat::philox_fields(*impl)) {
      fields->keeps_rnn_state.test_and_set();
    }
  });
  module.def("set_rnn_state_size", &set_rnn_state_size);
  module.def("set_lease_wait_limit", [](double seconds) {
    Lease::set_wait_limit(std::chrono::milliseconds(static_cast<int64_t>(seconds * 1e3)));
  });
}

}  // namespace reprise::bindings
