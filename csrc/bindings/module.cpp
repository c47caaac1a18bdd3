#include "bindings/bind.h"
#include "bindings/python_host.h"
#include "torch_compat.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled core of torch_reprise. Use the names of torch_reprise instead.";
  reprise::bindings::install_host();
  reprise::compat::install_native_hooks();
  reprise::bindings::bind_segment(module);
  reprise::bindings::bind_ledger(module);
  reprise::bindings::bind_rng(module);
}
