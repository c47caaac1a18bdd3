// The line of user code that a thread is executing, in nanoseconds.
//
// Note [Frames without the interpreter lock]
//
// A saved tensor is packed while torch has given the interpreter lock up, and
// taking it for each tensor would cost more than everything else together. A
// thread may read its own chain of frames without the lock, since nobody else
// changes it. What it may not do is take a reference to a code object. So the
// code objects that were ever noted are kept alive in one table, each once: a
// pointer found in the table is alive, one that is not found is added under the
// interpreter lock. The table grows with the number of functions that save
// tensors in checkpoints, and stops growing at a bound (places in code that is
// made anew in a loop are then not told).
//
// The layout of frames is CPython's own. It is read here for the versions that
// were tested (3.11 to 3.13); elsewhere the public API is used under the lock.
#pragma once

#include <Python.h>

#include <string>
#include <vector>

#include "host.h"

namespace reprise::bindings {

SourceLocation current_location() noexcept;
std::string describe(const SourceLocation& where);

// Frames of code whose file begins with one of these are passed over: torch's and our own.
void set_internal_paths(std::vector<std::string> prefixes);

}  // namespace reprise::bindings
