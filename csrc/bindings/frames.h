/* The chain of frames of the calling thread, without the interpreter lock.
   Plain C, for CPython's internal headers are not C++. See source_location.h
   and early_stop.h. */
#pragma once

#include <Python.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 1 if this build can walk frames without the lock. */
int reprise_frames_supported(void);

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

/* The variables of the thread's current context of contextvars: an immutable mapping, borrowed,
   that is another object after each change. Null if there is no context yet, or they cannot be
   read. With the interpreter lock. */
PyObject* reprise_context_variables(void);

/* Gives the thread's current context, which there must be, these variables. With the lock. */
void reprise_set_context_variables(PyObject* variables);

#ifdef __cplusplus
}
#endif
