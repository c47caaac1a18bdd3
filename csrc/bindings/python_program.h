// A checkpointed Python callable with its arguments: the Program of a segment.
#pragma once

#include <Python.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/argument_objects.h"
#include "bindings/arguments.h"
#include "bindings/context_variables.h"
#include "bindings/python_object.h"
#include "bindings/reach.h"
#include "pool.h"
#include "segment/segment.h"

namespace reprise::bindings {

class PythonProgram final : public Program, public Pooled<PythonProgram> {
 public:
  // With the interpreter lock. Appends the tensor arguments to `inputs` and what else
  // among them is neither a container nor immutable to `others` (borrowed).
  // `replay_context`: entered around each replay, or null.
  // `debug_session`: a torch_reprise.debug session, or null.
  PythonProgram(PyObject* function, PyObject* args, PyObject* kwargs, PyObject* replay_context,
                PyObject* debug_session, std::vector<at::Tensor>& inputs,
                std::vector<PyObject*>& others);
  // From any thread; takes the interpreter lock. After the interpreter is gone
  // the references are leaked, there being nobody to give them back to.
  ~PythonProgram() override;

  // What else a replay finds as it is now: of what is reached the modules in training or
  // evaluation and the tensors that are their buffers, and, with `context_variables`, the
  // variables of contextvars.
  // `objects`: arguments that the function may change.
  // `bindings`: also what the function's names stand for.
  void hold(Reach& reach, const std::vector<PyObject*>& objects, bool context_variables,
            bool bindings);
  // After the forward.
  void settle();

  Outcome run(std::vector<at::Tensor> inputs, const std::atomic<bool>& stopped) override;
  std::vector<at::Tensor> run_for_outputs(std::vector<at::Tensor> inputs) override;
  std::string name() const override;
  std::string running_module() const override;
  std::string explain_mismatch() const override;
  std::string input_name(size_t index) const override;
  std::string where_reached(const c10::TensorImpl* tensor) const override;

 private:
  // One call of the function with `inputs`, which are dropped before it begins:
  // what fn frees early must be freed. Null with the error set, or suppressed.
  // `outputs`, if given, gets the tensors of the result.
  Ref call(std::vector<at::Tensor>&& inputs, bool* suppressed,
           std::vector<at::Tensor>* outputs = nullptr);

  // Strong references, given back under the interpreter lock.
  Ref function_;
  std::optional<Structure> args_;
  std::unique_ptr<Structure> kwargs_;  // null when there are none
  Ref replay_context_;
  Ref debug_session_;
  Reach::Modules modules_;
  std::vector<Reach::Buffer> buffers_;  // after the forward: stand-ins are also those it replaced
  std::vector<Binding> bindings_;       // after the forward: those that it left alone
  ArgumentObjects argument_objects_;
  ContextVariables context_variables_;
};

// Calls `function` inside `context` (null: none), as a with statement would.
// Null with the error set if it raised. `*suppressed`: the context swallowed an
// exception, so there is no result and no error.
Ref call_in_context(PyObject* context, PyObject* function, PyObject* args, PyObject* kwargs,
                    bool* suppressed);

}  // namespace reprise::bindings
