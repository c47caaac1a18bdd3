#include <patchlevel.h>
#include <pyconfig.h>

/* Each version that was read and tested: what the fields mean changes without their names
   changing. Not without the interpreter lock: nobody has looked at those builds. */
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)
#define REPRISE_INTERNALS 1
#define Py_BUILD_CORE 1 /* before Python.h, which is otherwise another one */
#include <Python.h>
#include <internal/pycore_context.h>
#include <internal/pycore_frame.h>
#include <internal/pycore_pystate.h>
/* The table that gives back the opcode of a specialised one. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-const-variable"
#pragma GCC diagnostic ignored "-Wunused-variable"
#if PY_VERSION_HEX >= 0x030D0000
#define NEED_OPCODE_METADATA 1
#include <internal/pycore_opcode_metadata.h>
#undef NEED_OPCODE_METADATA
#else
#define NEED_OPCODE_TABLES 1
#include <internal/pycore_opcode.h>
#undef NEED_OPCODE_TABLES
#endif
#pragma GCC diagnostic pop
#undef Py_BUILD_CORE
#else
#define REPRISE_INTERNALS 0
#endif

#include "bindings/cpython_internals.h"

int reprise_reads_internals(void) { return REPRISE_INTERNALS; }

#if REPRISE_INTERNALS

static const _PyInterpreterFrame* innermost(void) {
  PyThreadState* thread = PyGILState_GetThisThreadState();
#if PY_VERSION_HEX >= 0x030D0000
  return thread == NULL ? NULL : thread->current_frame;
#else
  return thread == NULL || thread->cframe == NULL ? NULL : thread->cframe->current_frame;
#endif
}

/* Since 3.12 there is a frame for each entry into the interpreter, which runs no code. */
static int runs_code(const _PyInterpreterFrame* frame) {
#if PY_VERSION_HEX >= 0x030C0000
  return frame->owner != FRAME_OWNED_BY_CSTACK;
#else
  (void)frame;
  return 1;
#endif
}

static PyCodeObject* code_of(const _PyInterpreterFrame* frame) {
#if PY_VERSION_HEX >= 0x030D0000
  return (PyCodeObject*)frame->f_executable;
#else
  return frame->f_code;
#endif
}

/* The instruction that executes; in a frame that has called another one, its call. */
static const _Py_CODEUNIT* instruction_of(const _PyInterpreterFrame* frame) {
#if PY_VERSION_HEX >= 0x030D0000
  return frame->instr_ptr;
#else
  return frame->prev_instr;
#endif
}

const void* reprise_next_frame(const void* frame, PyCodeObject** code, int* instruction) {
  const _PyInterpreterFrame* next =
      frame == NULL ? innermost() : ((const _PyInterpreterFrame*)frame)->previous;
  if (next == NULL) {
    return NULL;
  }
  *code = NULL;
  if (runs_code(next)) {
    *code = code_of(next);
    *instruction = (int)(instruction_of(next) - _PyCode_CODE(*code)) * (int)sizeof(_Py_CODEUNIT);
  }
  return next;
}

const void* reprise_current_frame(const void** instruction) {
  const _PyInterpreterFrame* frame = innermost();
  *instruction = frame == NULL || !runs_code(frame) ? NULL : instruction_of(frame);
  return frame;
}

int reprise_handles_pending_calls_after(const void* instruction) {
  if (instruction == NULL || !_Py_IsMainThread()) {
    return 0;
  }
  const int opcode = _PyOpcode_Deopt[_Py_OPCODE(*(const _Py_CODEUNIT*)instruction)];
  switch (opcode) {
    case CALL:
    case CALL_FUNCTION_EX:
#if PY_VERSION_HEX >= 0x030D0000
    case CALL_KW:
#elif PY_VERSION_HEX < 0x030C0000
    case PRECALL: /* where a C function's call is specialised */
#endif
      return 1;
    default:
      return 0;
  }
}

PyObject* reprise_current_context(void) { return PyThreadState_Get()->context; }

PyObject* reprise_variables_of(PyObject* context) {
  return (PyObject*)((const PyContext*)context)->ctx_vars;
}

void reprise_set_variables_of(PyObject* context, PyObject* variables) {
  PyHamtObject** place = &((PyContext*)context)->ctx_vars;
  PyHamtObject* old = *place;
  Py_INCREF(variables);
  *place = (PyHamtObject*)variables;
  ++PyThreadState_Get()->context_ver; /* a variable's last value is kept by this number */
  Py_DECREF(old);
}

#else

PyObject* reprise_current_context(void) { return NULL; }

PyObject* reprise_variables_of(PyObject* context) {
  (void)context;
  return NULL;
}

void reprise_set_variables_of(PyObject* context, PyObject* variables) {
  (void)context;
  (void)variables;
}

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
