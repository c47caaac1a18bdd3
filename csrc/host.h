// What the core asks of the language that runs `fn`.
//
// The core knows no Python: no Python.h, no pybind11. Everything that needs an
// interpreter (the pair on torch's stack of saved-tensor hooks, the source line
// that is executing, exceptions that user code may see, the interpreter lock)
// goes through this one interface. The bindings implement it once; the native
// tests have a small implementation of their own.
//
// Rejected: a callback per need handed around as std::function. One object with
// named virtuals is cheaper to call and is the whole list in one place.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SafePyObject.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace reprise {

class Recorder;

// A place in a program: an opaque code object and an offset into it. Noted once
// per saved tensor, so it is two words and turned into text only for an error.
// The host guarantees that `code` stays valid for the life of the process.
struct SourceLocation {
  const void* code = nullptr;
  int32_t instruction = -1;
};

using HookPair = std::pair<c10::SafePyObject, c10::SafePyObject>;

class Host {
 public:
  virtual ~Host() = default;

  // A pair of saved-tensor hooks to be pushed onto torch's stack, which stands
  // for `recorder` and keeps it alive. With the interpreter lock.
  virtual HookPair make_hook_pair(c10::intrusive_ptr<Recorder> recorder) = 0;

  // The pair has left the stack: the recorder is let go, and the pair may be used
  // again if nobody else has it. With the interpreter lock.
  virtual void take_back(HookPair pair) noexcept = 0;

  // The recorder a pack hook stands for, or null for anybody else's hook.
  // Called once per saved tensor, without the interpreter lock; the caller
  // knows that the hook is alive, for it lies on this thread's stack.
  virtual Recorder* recorder_of(PyObject* pack_hook) noexcept = 0;

  // The innermost line of user code that this thread is executing. Nanoseconds;
  // works with and without the interpreter lock.
  virtual SourceLocation current_location() noexcept = 0;

  // "file.py:12 in forward", or an empty string.
  virtual std::string describe(const SourceLocation& where) = 0;

  // Takes the interpreter lock, which this thread may hold already, if the interpreter has
  // not ended; what it returns is for release_acquired(). Around several things that need it.
  virtual int acquire_interpreter() noexcept = 0;
  virtual void release_acquired(int token) noexcept = 0;

  // Gives the interpreter lock up if this thread holds it; reacquire() takes
  // it back. Waiting for another thread happens between the two.
  virtual void* release_interpreter() noexcept = 0;
  virtual void reacquire_interpreter(void* token) noexcept = 0;

  // Is this TorchFunction mode the one by which torch.set_default_device and
  // `with torch.device(...)` work? And one of these for the CPU, which is torch's
  // behaviour without any.
  virtual bool is_default_device_mode(const c10::SafePyObject& mode) noexcept = 0;
  virtual std::shared_ptr<c10::SafePyObject> cpu_device_mode() = 0;

  // The fingerprint of a tensor subclass that only its own language can take apart
  // (jagged nested tensors), from those of its parts; nothing if that is not possible.
  virtual std::optional<uint64_t> fingerprint_of_parts(const at::Tensor& tensor) noexcept = 0;

  // A function of the host's language, and what it takes, that together do what
  // `hooks->call_unpack_hook()` does. For compiled autograd, which calls from a graph.
  virtual HookPair as_function_and_data(
      std::unique_ptr<torch::autograd::SavedVariableHooks> hooks) = 0;

  // Will the end of this GraphExecGroup be told to end_group()?
  virtual bool reports_its_end(PyObject* group) noexcept = 0;

  // Does this process work together with others, which may wait for what fn does (a
  // collective)? Called without any lock held.
  virtual bool is_distributed() noexcept = 0;

  // Is no other thread running user code? Then nobody else can have drawn from a
  // generator that the whole process shares.
  virtual bool is_alone() noexcept = 0;

  // Ends a replay as soon as the operator that this thread executes returns to the
  // function that called it, by the exception of throw_early_stop(), raised there.
  // False if that cannot be done: then it has to be thrown. True also if the
  // operator is all there is to end.
  virtual bool stop_after_operator() noexcept = 0;

  // Ends a replay from inside an operator. The exception passes through user
  // code, so it is one that `except Exception` does not catch.
  [[noreturn]] virtual void throw_early_stop() = 0;

  // See the function of this name below.
  [[noreturn]] virtual void throw_checkpoint_error(const std::string& message) = 0;
};

// Set once, when the extension is loaded, before any segment exists.
void set_host(Host* host) noexcept;

namespace detail {
extern Host* g_host;
}
inline Host& host() noexcept { return *detail::g_host; }

// Raises torch_reprise.CheckpointError. No virtual, so that compilers believe that it does not
// return, and cold: what builds a message is kept apart from the code that runs.
[[noreturn, gnu::cold]] void throw_checkpoint_error(const std::string& message);

// Holds the interpreter lock for a scope. See Host::acquire_interpreter.
class InterpreterHeld {
 public:
  InterpreterHeld() : token_(host().acquire_interpreter()) {}
  ~InterpreterHeld() { host().release_acquired(token_); }
  InterpreterHeld(const InterpreterHeld&) = delete;
  InterpreterHeld& operator=(const InterpreterHeld&) = delete;

 private:
  int token_;
};

// Gives the interpreter lock up for a scope. See Host::release_interpreter.
class InterpreterReleased {
 public:
  InterpreterReleased() : token_(host().release_interpreter()) {}
  ~InterpreterReleased() { host().reacquire_interpreter(token_); }
  InterpreterReleased(const InterpreterReleased&) = delete;
  InterpreterReleased& operator=(const InterpreterReleased&) = delete;

 private:
  void* token_;
};

}  // namespace reprise
