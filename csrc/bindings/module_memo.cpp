#include "bindings/module_memo.h"

#include <algorithm>
#include <unordered_map>

namespace reprise::bindings {

uint64_t dict_version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // in 3.12, which still keeps it
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  (void)dict;
  return 0;
#endif
}

namespace {

// Programs have hundreds of checkpointed modules at most; others come and go.
constexpr size_t kMostMemos = 4096;

// With the interpreter lock:
//   has_versions(): do the other two work?
//   watched_version(dict): its version, never 0; kept from now on.
//   version_of(address): that of the dict there; 0 or another one if the dict that was watched
//     has changed, or is gone.
#if PY_VERSION_HEX < 0x030D0000

bool has_versions() { return true; }
uint64_t version_of(PyObject* dict) { return dict_version(dict); }
uint64_t watched_version(PyObject* dict) { return dict_version(dict); }

#elif PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)

class Watcher {
 public:
  // Not in 3.13.0, which does not tell when an attribute is set, and not if all eight
  // watchers of the interpreter are taken.
  static bool exists() { return get().id_ >= 0; }

  static uint64_t watched_version(PyObject* dict) {
    Watcher& watcher = get();
    const auto [place, is_new] = watcher.versions_.try_emplace(dict, watcher.last_ + 1);
    if (is_new) {
      ++watcher.last_;
      if (PyDict_Watch(watcher.id_, dict) != 0) {  // not a dict, or not our watcher
        PyErr_Clear();
        watcher.versions_.erase(place);
        return ++watcher.last_;  // of no dict: what depends on it never holds
      }
    }
    return place->second;
  }

  static uint64_t version_of(PyObject* dict) {
    const auto& versions = get().versions_;
    const auto found = versions.find(dict);
    return found == versions.end() ? 0 : found->second;
  }

 private:
  Watcher() {
    if (Py_Version >= 0x030D0100) {
      id_ = PyDict_AddWatcher(on_change);
      PyErr_Clear();
    }
  }
  static Watcher& get() {
    static auto& watcher = *new Watcher;
    return watcher;
  }

  // Before the change. Another dict at the address of one that is gone is not watched.
  static int on_change(PyDict_WatchEvent event, PyObject* dict, PyObject*, PyObject*) {
    Watcher& watcher = get();
    const auto found = watcher.versions_.find(dict);
    if (found != watcher.versions_.end()) {
      if (event == PyDict_EVENT_DEALLOCATED) {
        watcher.versions_.erase(found);
      } else {
        found->second = ++watcher.last_;
      }
    }
    return 0;
  }

  std::unordered_map<PyObject*, uint64_t> versions_;
  uint64_t last_ = 0;
  int id_ = -1;
};

bool has_versions() { return Watcher::exists(); }
uint64_t version_of(PyObject* dict) { return Watcher::version_of(dict); }
uint64_t watched_version(PyObject* dict) { return Watcher::watched_version(dict); }

#else

bool has_versions() { return false; }
uint64_t version_of(PyObject*) { return 0; }
uint64_t watched_version(PyObject*) { return 1; }

#endif

}  // namespace

bool ModuleMemo::is_possible() { return has_versions(); }

ModuleMemo& ModuleMemo::of(PyObject* module) {
  static auto& memos = *new std::unordered_map<PyObject*, ModuleMemo>;
  if (memos.size() >= kMostMemos && memos.find(module) == memos.end()) {
    memos.clear();
  }
  return memos[module];
}

void ModuleMemo::begin(How how) {
  forget();
  how_ = how;
}

void ModuleMemo::watch(PyObject* owner, PyObject* dict) {
  watched_.push_back(
      {owner, owner != nullptr ? Py_TYPE(owner) : nullptr, dict, watched_version(dict)});
}

void ModuleMemo::add_tensor(PyObject* tensor, const Reached& reached, bool requires_grad,
                            bool found) {
  tensors_.push_back({tensor, reached, requires_grad, found});
}

void ModuleMemo::end(std::vector<PyObject*> seen) {
  seen_ = std::move(seen);
  std::sort(seen_.begin(), seen_.end());
  complete_ = true;
}

bool ModuleMemo::holds(How how) const {
  if (!complete_ || !(how_ == how)) {
    return false;
  }
  for (const auto& [owner, type, dict, version] : watched_) {
    if (owner != nullptr) {
      PyObject** place = _PyObject_GetDictPtr(owner);
      if (Py_TYPE(owner) != type || place == nullptr || *place != dict) {
        return false;
      }
    }
    if (version_of(dict) != version) {
      return false;
    }
  }
  return std::all_of(tensors_.begin(), tensors_.end(), [](const Tensor& tensor) {
    return THPVariable_Unpack(tensor.object).requires_grad() == tensor.requires_grad;
  });
}

bool ModuleMemo::still_holds(How how) {
  const bool so = holds(how);
  misses_ = so ? 0 : misses_ + (complete_ ? 1 : 0);
  return so;
}

bool ModuleMemo::has_seen(PyObject* object) const {
  return std::binary_search(seen_.begin(), seen_.end(), object);
}

}  // namespace reprise::bindings
