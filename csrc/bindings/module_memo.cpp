#include "bindings/module_memo.h"

#include <algorithm>
#include <unordered_map>

namespace reprise::bindings {
namespace {

// Programs have hundreds of checkpointed modules at most; others come and go.
constexpr size_t kMostMemos = 4096;

uint64_t version_of([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

}  // namespace

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
  watched_.push_back({owner, owner != nullptr ? Py_TYPE(owner) : nullptr, dict, version_of(dict)});
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
