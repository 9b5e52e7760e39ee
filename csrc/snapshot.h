// What a call depends on beside its inputs, as it was once: modules, their tensors, settings and hooks.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <unordered_set>
#include <vector>

namespace mtlk {

// Where a tensor was that was looked at. It is not kept alive, and may be another one by now: what is known of it is
// all that is used.
class Known {
 public:
  explicit Known(const at::Tensor& tensor);
  bool is(const at::Tensor& now) const;

 private:
  const void* data_;
  size_t bytes_;  // of the memory that it lies in
  at::DimVector sizes_, strides_;
  uint64_t keys_;
  at::ScalarType type_;
};

// A call's parameters in their order, of which some may be undefined.
class KnownTensors {
 public:
  // False for one behind which something else stands than its memory.
  bool take(const at::Tensor& tensor);
  // Whether a tensor's memory, when they were taken, was that of one of them.
  bool holds(const at::Tensor& tensor) const;

  // Whether tensors are those that were taken, one after another; their memory is then `held`.
  class Comparison {
   public:
    Comparison(const KnownTensors& known, std::vector<c10::Storage>& held);
    bool next(const at::Tensor& now);
    bool complete() const { return next_ == end_; }

   private:
    std::vector<std::optional<Known>>::const_iterator next_, end_;
    std::vector<c10::Storage>& held_;
  };

 private:
  std::vector<std::optional<Known>> known_;
  std::unordered_set<const void*> storages_;
};

// Of modules, tensors, numbers, strings and functions, in lists and tuples, which hold them. Of a module it is all that
// stands in its dictionary: its class, the modules and tensors in it, and its settings; of a tensor where it lies, not
// its values. No module or tensor is kept alive.
class Snapshot {
 public:
  // Nothing where there is something among them that could change unseen, as the state of an object of any other kind,
  // a hook, or a parametrization.
  static std::optional<Snapshot> of(PyObject* roots, PyObject* module_type);

  // Whether these are what was there; the memory of their tensors is then `held`, which may be null.
  bool is(PyObject* roots, std::vector<c10::Storage>* held) const;

  // Whether a tensor's memory, when the snapshot was taken, was that of one of its tensors.
  bool holds(const at::Tensor& tensor) const;

 private:
  enum class Kind { kSame, kTensor, kModule, kSeen, kDict, kSequence, kEmpty, kIgnored };
  struct Entry {
    Kind kind;
    int64_t count = 0;             // of what follows, or the number of the tensor
    const void* object = nullptr;  // of what is to be the same object
    const void* type = nullptr;
    const void* key = nullptr;  // under which a dictionary has it
  };

  bool take(PyObject* object, PyObject* module_type);
  bool take_entries(PyObject* dictionary, PyObject* module_type, bool of_module);
  struct Cursor {
    const Entry* next;
    std::vector<c10::Storage>* held;
  };
  bool same(PyObject* object, Cursor& at) const;
  bool same_entries(PyObject* dictionary, Cursor& at, int64_t count) const;

  std::vector<Entry> entries_;
  std::vector<Known> tensors_;
  std::vector<pybind11::object> kept_;  // what is neither module nor tensor
  std::unordered_set<const void*> modules_, storages_;
};

}  // namespace mtlk
