#include "bindings/source_location.h"

#include <frameobject.h>
#include <pthread.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "bindings/cpython_internals.h"

namespace reprise::bindings {
namespace {

constexpr size_t kMostCodes = 1 << 16;
constexpr int kMostFrames = 64;  // how far up a user's frame is looked for

enum class Origin : uint8_t { kUnknown, kUser, kInternal };

struct CodeTable {
  std::mutex mutex;
  std::unordered_map<PyCodeObject*, Origin> codes;  // strong references, for ever
  std::vector<std::string> internal_prefixes;
};

CodeTable& table() {
  static CodeTable* table = [] {
    // Not while another thread writes to it: that thread is not in the child.
    pthread_atfork([] { reprise::bindings::table().mutex.lock(); },
                   [] { reprise::bindings::table().mutex.unlock(); },
                   [] { reprise::bindings::table().mutex.unlock(); });
    return new CodeTable;
  }();
  return *table;
}

// Direct-mapped, per thread: what the table said. Entries never go stale, since
// the table keeps its code objects alive.
struct CacheLine {
  PyCodeObject* code = nullptr;
  Origin origin = Origin::kUnknown;
};
thread_local std::array<CacheLine, 64> t_cache;

Origin look_up_or_add(PyCodeObject* code) {
  {
    std::lock_guard<std::mutex> lock(table().mutex);
    auto it = table().codes.find(code);
    if (it != table().codes.end()) {
      return it->second;
    }
    if (table().codes.size() >= kMostCodes) {
      return Origin::kUnknown;
    }
  }
  const PyGILState_STATE gil = PyGILState_Ensure();
  Origin origin = Origin::kUser;
  const char* file = PyUnicode_AsUTF8(code->co_filename);
  if (file == nullptr) {
    PyErr_Clear();
  } else {
    const std::string path(file);
    for (const auto& prefix : table().internal_prefixes) {
      if (path.compare(0, prefix.size(), prefix) == 0) {
        origin = Origin::kInternal;
      }
    }
  }
  {
    std::lock_guard<std::mutex> lock(table().mutex);
    if (table().codes.emplace(code, origin).second) {
      Py_INCREF(reinterpret_cast<PyObject*>(code));
    }
  }
  PyGILState_Release(gil);
  return origin;
}

Origin origin_of(PyCodeObject* code) {
  CacheLine& line = t_cache[(reinterpret_cast<uintptr_t>(code) >> 5) % t_cache.size()];
  if (line.code != code) {
    const Origin origin = look_up_or_add(code);
    if (origin == Origin::kUnknown) {
      return origin;
    }
    line = {code, origin};
  }
  return line.origin;
}

SourceLocation location_by_frames() {
  SourceLocation fallback;
  const void* frame = nullptr;
  PyCodeObject* code = nullptr;
  int instruction = -1;
  for (int i = 0; i < kMostFrames; ++i) {
    frame = reprise_next_frame(frame, &code, &instruction);
    if (frame == nullptr) {
      break;
    }
    if (code == nullptr) {
      continue;
    }
    const Origin origin = origin_of(code);
    if (origin == Origin::kUser) {
      return {code, instruction};
    }
    if (fallback.code == nullptr && origin == Origin::kInternal) {
      fallback = {code, instruction};
    }
  }
  return fallback;
}

SourceLocation location_by_public_api() {
  SourceLocation fallback;
  const PyGILState_STATE gil = PyGILState_Ensure();
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(reinterpret_cast<PyObject*>(frame));
  for (int i = 0; i < kMostFrames && frame != nullptr; ++i) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const Origin origin = origin_of(code);
#if PY_VERSION_HEX >= 0x030B0000
    const SourceLocation here{code, PyFrame_GetLasti(frame)};
#else
    const SourceLocation here{code, frame->f_lasti * 2};  // 3.10 counts code units
#endif
    Py_DECREF(reinterpret_cast<PyObject*>(code));
    if (origin == Origin::kUser) {
      fallback = here;
      break;
    }
    if (fallback.code == nullptr && origin == Origin::kInternal) {
      fallback = here;
    }
    PyFrameObject* back = PyFrame_GetBack(frame);
    Py_DECREF(reinterpret_cast<PyObject*>(frame));
    frame = back;
  }
  Py_XDECREF(reinterpret_cast<PyObject*>(frame));
  PyGILState_Release(gil);
  return fallback;
}

}  // namespace

void set_internal_paths(std::vector<std::string> prefixes) {
  std::lock_guard<std::mutex> lock(table().mutex);
  table().internal_prefixes = std::move(prefixes);
}

SourceLocation current_location() noexcept {
  return reprise_reads_internals() != 0 ? location_by_frames() : location_by_public_api();
}

std::string describe(const SourceLocation& where) {
  if (where.code == nullptr) {
    return "an unknown line";
  }
  auto* code = const_cast<PyCodeObject*>(static_cast<const PyCodeObject*>(where.code));
  const PyGILState_STATE gil = PyGILState_Ensure();
  const int line = PyCode_Addr2Line(code, where.instruction);
  const char* file = PyUnicode_AsUTF8(code->co_filename);
  const char* name = PyUnicode_AsUTF8(code->co_name);
  if (file == nullptr || name == nullptr) {
    PyErr_Clear();
  }
  std::string text = std::string(file != nullptr ? file : "?") + ":" + std::to_string(line) +
                     " in " + (name != nullptr ? name : "?");
  PyGILState_Release(gil);
  return text;
}

}  // namespace reprise::bindings
