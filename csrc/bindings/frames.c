#include "bindings/frames.h"

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030C0000
#define REPRISE_FRAMES 1
#define Py_BUILD_CORE 1
#define NEED_OPCODE_TABLES 1
#include <internal/pycore_context.h>
#include <internal/pycore_frame.h>
#include <internal/pycore_pystate.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-const-variable"
#pragma GCC diagnostic ignored "-Wunused-variable"
#include <internal/pycore_opcode.h>
#pragma GCC diagnostic pop
#undef NEED_OPCODE_TABLES
#undef Py_BUILD_CORE
#else
#define REPRISE_FRAMES 0
#endif

int reprise_frames_supported(void) { return REPRISE_FRAMES; }

#if REPRISE_FRAMES

static const _PyInterpreterFrame* innermost(void) {
  PyThreadState* thread = PyGILState_GetThisThreadState();
  return thread == NULL || thread->cframe == NULL ? NULL : thread->cframe->current_frame;
}

const void* reprise_next_frame(const void* frame, PyCodeObject** code, int* instruction) {
  const _PyInterpreterFrame* next =
      frame == NULL ? innermost() : ((const _PyInterpreterFrame*)frame)->previous;
  if (next == NULL) {
    return NULL;
  }
  *code = next->f_code;
  *instruction = _PyInterpreterFrame_LASTI(next) * (int)sizeof(_Py_CODEUNIT);
  return next;
}

const void* reprise_current_frame(const void** instruction) {
  const _PyInterpreterFrame* frame = innermost();
  *instruction = frame == NULL ? NULL : frame->prev_instr;
  return frame;
}

int reprise_handles_pending_calls_after(const void* instruction) {
  if (instruction == NULL || !_Py_ThreadCanHandlePendingCalls()) {
    return 0;
  }
  /* A C function is called by PRECALL where it is specialised, else by CALL. */
  const int opcode = _PyOpcode_Deopt[_Py_OPCODE(*(const _Py_CODEUNIT*)instruction)];
  return opcode == PRECALL || opcode == CALL || opcode == CALL_FUNCTION_EX;
}

const void* reprise_context_variables(void) {
  PyObject* context = PyThreadState_Get()->context;
  return context == NULL ? NULL : ((const PyContext*)context)->ctx_vars;
}

#else

const void* reprise_context_variables(void) { return NULL; }

const void* reprise_next_frame(const void* frame, PyCodeObject** code, int* instruction) {
  (void)frame;
  (void)code;
  (void)instruction;
  return NULL;
}

const void* reprise_current_frame(const void** instruction) {
  *instruction = NULL;
  return NULL;
}

int reprise_handles_pending_calls_after(const void* instruction) {
  (void)instruction;
  return 0;
}

#endif
