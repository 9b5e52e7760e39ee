// What a call depends on beside its inputs, as it was once: modules, their tensors, settings and hooks.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <unordered_set>
#include <vector>

namespace mtlk {

// Whether an object is the same as long as it is the same object, and holds no module.
bool is_fixed(PyObject* object);

// Where a tensor was that was looked at. It is not kept alive, and may be another one by now: what is known of it is
// all that is used.
class Known {
 public:
  explicit Known(const at::Tensor& tensor);
  bool is(const at::Tensor& now) const { return is_like(now) && is_there(now); }
  // But for the place.
  bool is_like(const at::Tensor& now) const;

 private:
  bool is_there(const at::Tensor& now) const;

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
// stands in its dictionary: its class, the modules and tensors in it, and its settings; of a tensor where it lies, or
// which object it is, not its values. No module or tensor is kept alive.
class Snapshot {
 public:
  // Of tensors: where they lie, which is what a call without gradients has to do with them; or which objects they are,
  // wherever these lie by now, whether they want gradients, and that nobody listens to these.
  enum class Tensors { kPlaces, kObjects };

  // Nothing where there is something among them that could change unseen, as the state of an object of any other kind,
  // a hook, or a parametrization. What it looks at that is neither module nor tensor is appended to `held`, which has
  // to live as long, in Python, where the garbage collector sees it: a class may lead back to the model.
  static std::optional<Snapshot> of(PyObject* roots, PyObject* module_type, Tensors tensors, pybind11::list& held);

  // Whether these are what was there; the memory of their tensors is then `held`, which may be null.
  bool is(PyObject* roots, std::vector<c10::Storage>* held) const;

  // Whether a tensor's memory, when the snapshot was taken, was that of one of its tensors.
  bool holds(const at::Tensor& tensor) const;

  // Whether an object is one of its modules and tensors.
  bool has(PyObject* object) const { return objects_.count(object) > 0; }

 private:
  enum class Kind { kSame, kTensor, kModule, kSeen, kDict, kSequence, kEmpty, kIgnored };
  struct Entry {
    Kind kind;
    int64_t count = 0;             // of what follows, or the number of the tensor
    const void* object = nullptr;  // of what is to be the same object
    const void* type = nullptr;
    const void* key = nullptr;  // under which a dictionary has it
    bool wants_gradient = false;
    const void* forward = nullptr;  // a module's class's
    const void* call = nullptr;
  };
  // Of what is taken. Where it lies in a module, a tensor is the module's to exchange.
  struct Taking {
    PyObject* module_type;
    pybind11::list& held;
    int depth = 0;
    bool in_module = false;
  };

  explicit Snapshot(Tensors tensors) : of_tensors_(tensors) {}

  bool take(PyObject* object, Taking taking);
  bool take_entries(PyObject* dictionary, Taking taking, bool of_module);
  bool same_tensor(PyObject* object, const Entry& entry) const;
  struct Cursor {
    const Entry* next;
    std::vector<c10::Storage>* held;
  };
  bool same(PyObject* object, Cursor& at) const;
  bool same_entries(PyObject* dictionary, Cursor& at, int64_t count) const;

  Tensors of_tensors_;
  std::vector<Entry> entries_;
  std::vector<Known> tensors_;
  std::unordered_set<const void*> modules_, objects_, storages_;
};

// mtlkernels._C.snapshot: what readings in Python are kept by, see mtlkernels/_convert/calls.py.
void define_snapshot(pybind11::module_& module);

}  // namespace mtlk
