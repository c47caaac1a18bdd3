#include "bindings/early_stop.h"

#include <atomic>
#include <cstdint>

#include "bindings/cpython_internals.h"
#include "bindings/python_object.h"

namespace reprise::bindings {
namespace {

std::atomic<uintptr_t> g_last_ticket{0};

// What this thread's innermost run of fn knows. Pending calls are made by the main
// thread alone; a stop where fn itself is an operator needs none, on any thread.
struct Run {
  const void* entry = nullptr;  // the innermost frame when fn was called
  bool asked = false;           // a stop, that was not raised
  // The stop that was asked for: its number, 0 for none, and where it is raised.
  uintptr_t ticket = 0;
  const void* frame = nullptr;
  const void* instruction = nullptr;
};
thread_local Run t_run;

int raise_stop(void* argument) {
  Run& run = t_run;
  if (run.ticket != reinterpret_cast<uintptr_t>(argument)) {
    return 0;  // fn has ended meanwhile
  }
  const void* instruction = nullptr;
  const void* frame = reprise_current_frame(&instruction);
  if (frame != run.frame || instruction != run.instruction) {
    if (Py_AddPendingCall(raise_stop, argument) != 0) {
      run.ticket = 0;  // too many of them: fn goes on to its end
    }
    return 0;
  }
  run.ticket = 0;
  run.asked = false;
  PyErr_SetNone(early_stop_type());
  return -1;
}

}  // namespace

PyObject* early_stop_type() {
  static PyObject* type =
      checked(PyErr_NewExceptionWithDoc("torch_reprise._C.EarlyStop",
                                        "Ends a replay when every tensor that backward needs is "
                                        "recomputed. Let it pass.",
                                        PyExc_BaseException, nullptr))
          .release();
  return type;
}

bool stop_after_operator() noexcept {
  Run& run = t_run;
  const void* instruction = nullptr;
  const void* frame = reprise_current_frame(&instruction);
  if (frame == nullptr) {
    return false;
  }
  if (frame == run.entry) {
    run.asked = true;
    return true;  // fn is the operator, or a function in C that is called like one
  }
  if (!reprise_handles_pending_calls_after(instruction)) {
    return false;
  }
  const uintptr_t ticket = ++g_last_ticket;
  run.frame = frame;
  run.instruction = instruction;
  run.ticket = ticket;
  if (Py_AddPendingCall(raise_stop, reinterpret_cast<void*>(ticket)) != 0) {
    run.ticket = 0;
    return false;
  }
  run.asked = true;
  return true;
}

StopScope::StopScope() : outer_entry_(t_run.entry), outer_asked_(t_run.asked) {
  const void* instruction = nullptr;
  t_run.entry = reprise_current_frame(&instruction);
  t_run.asked = false;
  t_run.ticket = 0;
}

StopScope::~StopScope() {
  t_run.entry = outer_entry_;
  t_run.asked = outer_asked_;
  t_run.ticket = 0;
}

bool StopScope::ended_by_itself() const { return t_run.asked; }

}  // namespace reprise::bindings
