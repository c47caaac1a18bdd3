// The Python side of reprise::Host, and the hook pair that stands for a recorder.
//
// Note [The pair on the stack]
//
// A segment puts a real pair of callables onto torch's stack of saved-tensor
// hooks. While our engine is in force (torch_compat.h, Note [Native hooks])
// they are never called; they say whose turn it is. They do work when called:
// that is what happens where another engine was installed over ours.
//
//   pack    HookPack(recorder): tensor -> Holder
//   unpack  a function of this module: Holder -> tensor
//
// torch >= 2.14 looks for two attributes on a pack hook of checkpointing to find
// the user's hooks below it (respect_saved_tensors_hooks): `_checkpoint_internal`
// and `_user_hooks`. HookPack answers them.
#pragma once

#include <Python.h>

namespace reprise::bindings {

// Creates the types, installs the host. Throws the Python error that is set.
void install_host();

// The type raised for a replay that does not match; a strong reference is kept.
void set_checkpoint_error(PyObject* type);

// Our GraphExecGroup, which tells us its end.
void set_group_type(PyObject* type);

// The unpack hook; and a function that calls it and that Dynamo leaves alone, which a
// compiled backward calls.
PyObject* unpack_function();
void set_unpack_for_dynamo(PyObject* function);

// Raises `message` as CheckpointError in Python terms: sets the error.
void set_checkpoint_error_message(const char* message);

}  // namespace reprise::bindings
