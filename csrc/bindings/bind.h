// One function per topic; module.cpp calls each once.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace reprise::bindings {

void bind_segment(pybind11::module_& module);
void bind_ledger(pybind11::module_& module);
void bind_rng(pybind11::module_& module);

}  // namespace reprise::bindings
