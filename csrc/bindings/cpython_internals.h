/* What CPython shows in its internal headers alone, which are not C++: the chain of frames
   of the calling thread, without the interpreter lock (source_location.h, early_stop.h), and
   what a Context of contextvars holds, with it (context_variables.h). */
#pragma once

#include <Python.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 1 if this build can; else the others find nothing. */
int reprise_reads_internals(void);

/* Innermost first. `frame` is null to start; returns null at the end. Fills the
   borrowed code object (null for frames without one) and the byte offset of the
   instruction that executes. */
const void* reprise_next_frame(const void* frame, PyCodeObject** code, int* instruction);

/* The innermost frame and the address of the instruction that it executes; null
   if there is none or frames cannot be read. */
const void* reprise_current_frame(const void** instruction);

/* 1 if that instruction is a call after which the interpreter handles pending
   calls before it does anything else, and this is the thread that handles them. */
int reprise_handles_pending_calls_after(const void* instruction);

/* The current Context of contextvars of this thread, borrowed; null if there is none yet, or
   Contexts cannot be read. */
PyObject* reprise_current_context(void);

/* The variables of a Context: an immutable mapping, borrowed, that is another object after each
   change. */
PyObject* reprise_variables_of(PyObject* context);

/* Gives a Context that is this thread's, now or while it ran others, these variables. */
void reprise_set_variables_of(PyObject* context, PyObject* variables);

#ifdef __cplusplus
}
#endif
