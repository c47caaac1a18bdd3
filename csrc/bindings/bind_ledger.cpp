#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "segment/ledger.h"

namespace py = pybind11;

namespace reprise::bindings {
namespace {

// The rows as tuples, in the order of torch_reprise.ledger.Row. Copied first:
// making Python objects may run the garbage collector, and with it anything.
py::list rows_of(const Ledger::Recording& recording) {
  std::vector<LedgerRow> copies;
  {
    auto lock = Ledger::get().lock_rows();
    for (const auto& row : recording.rows) {
      copies.push_back(*row);
    }
  }
  py::list rows;
  for (const auto& row : copies) {
    py::tuple generators(row.generators.size());
    for (size_t i = 0; i < row.generators.size(); ++i) {
      generators[i] = row.generators[i];
    }
    rows.append(py::make_tuple(row.name, row.depth, row.reentrant, row.slots, row.bytes, generators,
                               row.forward_seconds * 1e3, row.replay_seconds * 1e3, row.replays));
  }
  return rows;
}

}  // namespace

void bind_ledger(py::module_& module) {
  module.def("live_segments", [] { return Ledger::get().live_segments(); });
  module.def("live_slots", [] { return Ledger::get().live_slots(); });
  module.def("stashed_bytes", [] { return Ledger::get().stashed_bytes(); });
  module.def("segments", [] { return Ledger::get().segments(); });
  module.def("replays", [] { return Ledger::get().replays(); });
  module.def("bytes_not_saved", [] { return Ledger::get().bytes_not_saved(); });
  py::class_<Ledger::Recording, std::shared_ptr<Ledger::Recording>>(module, "Recording")
      .def("rows", &rows_of);
  module.def("start_recording", [] { return Ledger::get().start_recording(); });
  module.def("stop_recording", [](const std::shared_ptr<Ledger::Recording>& recording) {
    Ledger::get().stop_recording(recording);
  });
}

}  // namespace reprise::bindings
