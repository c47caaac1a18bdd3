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

const char* name_of(Timeline::Kind kind) {
  switch (kind) {
    case Timeline::Kind::kForward:
      return "forward";
    case Timeline::Kind::kForwardEnd:
      return "forward end";
    case Timeline::Kind::kReplay:
      return "replay";
    case Timeline::Kind::kReplayEnd:
      return "replay end";
    case Timeline::Kind::kBackward:
      return "backward";
    case Timeline::Kind::kBackwardEnd:
      return "backward end";
    case Timeline::Kind::kHold:
      return "hold";
    case Timeline::Kind::kDrop:
      return "drop";
    case Timeline::Kind::kSave:
      return "save";
    case Timeline::Kind::kFree:
      return "free";
  }
  return "";
}

// A list for each row, of (nanoseconds, kind, thread, bytes, storage).
py::list events_of(const Ledger::Recording& recording) {
  std::vector<std::shared_ptr<Timeline>> timelines;
  {
    auto lock = Ledger::get().lock_rows();
    for (const auto& row : recording.rows) {
      timelines.push_back(row->timeline);
    }
  }
  py::list all;
  for (const auto& timeline : timelines) {
    py::list events;
    if (recording.timeline) {
      for (const auto& event : timeline->events()) {
        events.append(py::make_tuple(event.ns, name_of(event.kind), event.thread, event.bytes,
                                     event.storage));
      }
    }
    all.append(events);
  }
  return all;
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
      .def("rows", &rows_of)
      .def("events", &events_of)
      .def_property_readonly("start_ns", [](const Ledger::Recording& recording) {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(
                   recording.begin.time_since_epoch())
            .count();
      });
  module.def(
      "start_recording",
      [](std::optional<size_t> limit, bool timeline) {
        return Ledger::get().start_recording(limit.value_or(SIZE_MAX), timeline);
      },
      py::arg("limit") = py::none(), py::arg("timeline") = true);
  module.def("stop_recording", [](const std::shared_ptr<Ledger::Recording>& recording) {
    Ledger::get().stop_recording(recording);
  });
}

}  // namespace reprise::bindings
