// A Host without an interpreter, so that the core can be run alone: hook pairs
// are plain structs, source locations are numbers, early stop is a C++ exception.
#pragma once

#include <c10/core/impl/PyInterpreter.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "host.h"
#include "segment/recorder.h"
#include "torch_compat.h"

struct EarlyStop {};  // no std::exception, as EarlyStop in Python is no Exception

struct CheckpointError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class TestHost final : public reprise::Host {
 public:
  TestHost() : interpreter_(nullptr) { interpreter_.disarm(); }

  reprise::HookPair make_hook_pair(c10::intrusive_ptr<reprise::Recorder> recorder) override {
    pairs_.push_back(std::make_unique<Pair>(Pair{std::move(recorder)}));
    auto* object = reinterpret_cast<PyObject*>(pairs_.back().get());
    return {c10::SafePyObject(object, &interpreter_), c10::SafePyObject(object, &interpreter_)};
  }

  reprise::Recorder* recorder_of(PyObject* pack_hook) noexcept override {
    for (const auto& pair : pairs_) {
      if (reinterpret_cast<PyObject*>(pair.get()) == pack_hook) {
        return pair->recorder.get();
      }
    }
    return nullptr;
  }

  reprise::SourceLocation current_location() noexcept override { return {this, ++line_}; }

  std::string describe(const reprise::SourceLocation& where) override {
    return "test.cpp:" + std::to_string(where.instruction);
  }

  void take_back(reprise::HookPair) noexcept override {}
  int acquire_interpreter() noexcept override { return 0; }
  void release_acquired(int) noexcept override {}
  void* release_interpreter() noexcept override { return nullptr; }
  void reacquire_interpreter(void*) noexcept override {}
  bool is_default_device_mode(const c10::SafePyObject&) noexcept override { return false; }
  std::shared_ptr<c10::SafePyObject> cpu_device_mode() override { return nullptr; }
  std::optional<uint64_t> fingerprint_of_parts(const at::Tensor&) noexcept override { return {}; }
  reprise::HookPair as_function_and_data(
      std::unique_ptr<torch::autograd::SavedVariableHooks>) override {
    throw std::logic_error("there is no compiled autograd here");
  }
  bool reports_its_end(PyObject*) noexcept override { return true; }
  bool is_distributed() noexcept override { return false; }
  bool is_alone() noexcept override { return true; }
  bool stop_after_operator() noexcept override { return false; }
  [[noreturn]] void throw_early_stop() override { throw EarlyStop(); }
  [[noreturn]] void throw_checkpoint_error(const std::string& message) override {
    throw CheckpointError(message);
  }

  // A disarmed interpreter counts no references: pairs that left the stack are
  // dropped here.
  void drop_pairs() { pairs_.clear(); }

  static TestHost& install() {
    static TestHost* host = [] {
      auto* made = new TestHost;
      reprise::set_host(made);
      reprise::compat::install_native_hooks();
      return made;
    }();
    return *host;
  }

 private:
  struct Pair {
    c10::intrusive_ptr<reprise::Recorder> recorder;
  };
  c10::impl::PyInterpreter interpreter_;
  std::vector<std::unique_ptr<Pair>> pairs_;
  int line_ = 0;
};
