// The signature of a call's tensors, which may be hundreds, and the memory of a call that has been made before: its
// table, its results and its scratch, as mtlkernels/ops/_recording.py wants them.

#include "recording.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <initializer_list>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cpu/runtime/tensors.h"
#include "observers.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// An address of which kernels know that it is a multiple of this may not become another.
constexpr int64_t kAlignment = 16;
// Bytes between the parts of one allocation.
constexpr int64_t kApart = 64;

void add(std::string& words, int64_t value) { words.append(reinterpret_cast<const char*>(&value), sizeof(value)); }

// All that launches depend on of a tensor; of its address, unless `fixed`, only how it is aligned.
void describe(std::string& words, const at::Tensor& tensor, bool fixed) {
  const int64_t address = reinterpret_cast<int64_t>(tensor.const_data_ptr());
  add(words, static_cast<int64_t>(tensor.key_set().raw_repr()));
  add(words, static_cast<int64_t>(tensor.scalar_type()) << 32 | tensor.dim() << 16 | (tensor.device().index() & 0xff));
  for (const int64_t size : tensor.sizes()) add(words, size);
  for (const int64_t stride : tensor.strides()) add(words, stride);
  add(words, fixed ? address : address % kAlignment);
}

// A list or a tuple of tensors or None.
template <typename F>
void each_tensor(py::handle tensors, F f) {
  PyObject** const items = PySequence_Fast_ITEMS(tensors.ptr());
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(tensors.ptr()); ++i) {
    f(is_tensor(items[i]) ? &THPVariable_Unpack(items[i]) : nullptr);
  }
}

// Whether a dense tensor's values are in its memory, and that is there.
bool is_in_memory(const at::Tensor& tensor) {
  return !tensor.unsafeGetTensorImpl()->is_python_dispatch() && !tensor.is_neg() && !tensor._is_zerotensor() &&
         tensor.storage().nbytes() >= reached_bytes(tensor);
}

// What of a call's tensors its launches depend on. Of a sparse tensor, say, or one that stands for another, there is
// none: None.
class Signature {
 public:
  explicit Signature(size_t tensors) { words_.reserve(64 * tensors); }

  void add(const at::Tensor* tensor, bool fixed) {
    if (!tensor) return mtlk::add(words_, -1);
    dense_ = dense_ && tensor->layout() == at::kStrided && tensor->has_storage() && is_in_memory(*tensor);
    if (dense_) describe(words_, *tensor, fixed);
  }
  py::object object() const { return dense_ ? py::object(py::bytes(words_)) : py::none(); }

 private:
  std::string words_;
  bool dense_ = true;
};

py::object signature_of_lists(py::handle moving, py::handle fixed) {
  Signature result(PySequence_Fast_GET_SIZE(moving.ptr()) + PySequence_Fast_GET_SIZE(fixed.ptr()));
  each_tensor(moving, [&](const at::Tensor* tensor) { result.add(tensor, false); });
  each_tensor(fixed, [&](const at::Tensor* tensor) { result.add(tensor, true); });
  return result.object();
}

using Shapes = std::vector<std::vector<int64_t>>;

// A tensor in an allocation.
struct Part {
  int64_t offset;  // in bytes
  at::ScalarType dtype;
  std::vector<int64_t> sizes;
};

// One allocation, of several tensors that become results each by itself, or of one.
struct Allocation {
  std::vector<Part> parts;
  int64_t bytes = 0;

  void add(at::ScalarType dtype, Shapes shapes) {
    for (std::vector<int64_t>& sizes : shapes) {
      const int64_t size = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
      parts.push_back({bytes, dtype, std::move(sizes)});
      bytes += (size + kApart - 1) / kApart * kApart;
    }
  }

  at::Tensor memory(const at::Tensor& like) const {
    if (parts.size() == 1) return at::empty(parts[0].sizes, like.options().dtype(parts[0].dtype));
    return at::empty({bytes}, like.options().dtype(at::kByte));
  }

  // A tensor of its own in that memory, no view of it.
  at::Tensor tensor(const at::Tensor& memory, const Part& part) const {
    if (parts.size() == 1) return memory;
    const caffe2::TypeMeta type = c10::scalarTypeToTypeMeta(part.dtype);
    at::Tensor found = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory.storage()), memory.key_set(), type);
    found.unsafeGetTensorImpl()->set_sizes_contiguous(part.sizes);
    found.unsafeGetTensorImpl()->set_storage_offset(part.offset / static_cast<int64_t>(type.itemsize()));
    return found;
  }
};

at::ScalarType scalar_type(py::handle dtype) {
  if (!THPDtype_Check(dtype.ptr())) throw py::type_error("mtlkernels: a dtype was expected");
  return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

// Tensors of these shapes in one allocation.
py::list together(py::handle like, py::handle dtype, Shapes shapes) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  py::list found;
  if (shapes.empty()) return found;
  Allocation all;
  all.add(scalar_type(dtype), std::move(shapes));
  const at::Tensor memory = all.memory(THPVariable_Unpack(like.ptr()));
  for (const Part& part : all.parts) found.append(to_python(all.tensor(memory, part)));
  return found;
}

class Recording {
 public:
  // `entries` of the table, each relative to what `bases` says: to nothing, 0; to the i-th tensor that a call brings,
  // i + 1; or to a room, whose numbers go on from there. `rooms` are dtypes and shapes; `passed` are those of which
  // launches take the first tensor. `returned` are tensors by their number among those of all rooms, or -1 for None.
  //
  // An allocation costs the host more than a launch's arguments. So all scratch is one, and so are results of rooms of
  // several: who lets go of one of these lets go of all.
  Recording(std::vector<int64_t> entries, std::vector<int32_t> bases,
            const std::vector<std::pair<py::object, Shapes>>& rooms, const std::vector<int32_t>& passed,
            const std::vector<int32_t>& returned)
      : entries_(std::move(entries)), bases_(std::move(bases)) {
    const std::set<int32_t> results(returned.begin(), returned.end());
    std::vector<Place> places;  // of all rooms' tensors
    std::optional<size_t> scratch, several;
    for (const auto& [dtype, shapes] : rooms) {
      const auto first = static_cast<int32_t>(places.size()), last = first + static_cast<int32_t>(shapes.size());
      std::optional<size_t> alone, *own = &alone;
      if (results.lower_bound(first) == results.lower_bound(last)) {
        own = &scratch;
      } else if (shapes.size() > 1) {
        own = &several;
      }
      if (!*own) {
        *own = allocations_.size();
        allocations_.emplace_back();
      }
      Allocation& allocation = allocations_[own->value()];
      for (size_t i = 0; i < shapes.size(); ++i) places.push_back({own->value(), allocation.parts.size() + i});
      allocation.add(scalar_type(dtype), shapes);
      firsts_.push_back(places[first]);
    }
    for (const int32_t room : passed) passed_.push_back(firsts_[room]);
    for (const int32_t number : returned) {
      returned_.push_back(number < 0 ? std::nullopt : std::optional<Place>(places[number]));
    }
  }

  // The table of a call in the host's memory; the tensors that launches take; what has to stay until they are made; and
  // what is returned.
  py::tuple prepare(py::handle moving) const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<int64_t> base = {0};
    const at::Tensor* like = nullptr;
    each_tensor(moving, [&](const at::Tensor* tensor) {
      if (!like) like = tensor;
      base.push_back(reinterpret_cast<int64_t>(tensor->const_data_ptr()));
    });
    std::vector<at::Tensor> memory;
    memory.reserve(allocations_.size());
    for (const Allocation& allocation : allocations_) memory.push_back(allocation.memory(*like));
    const auto tensor_of = [&](const Place& place) {
      const Allocation& allocation = allocations_[place.allocation];
      return allocation.tensor(memory[place.allocation], allocation.parts[place.part]);
    };
    for (const Place& first : firsts_) {
      base.push_back(reinterpret_cast<int64_t>(memory[first.allocation].const_data_ptr()) +
                     allocations_[first.allocation].parts[first.part].offset);
    }
    const auto count = static_cast<int64_t>(entries_.size());
    at::Tensor table = at::empty({count}, at::TensorOptions().dtype(at::kLong).pinned_memory(like->is_cuda()));
    auto* const values = table.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) values[i] = entries_[i] + base[bases_[i]];
    py::list passed;
    for (const Place& place : passed_) passed.append(to_python(tensor_of(place)));
    Results results;
    results.tensors.reserve(returned_.size());
    for (const auto& place : returned_) results.tensors.push_back(place ? tensor_of(*place) : at::Tensor());
    py::list all;
    for (at::Tensor& each : memory) all.append(to_python(std::move(each)));
    return py::make_tuple(to_python(std::move(table)), passed, all, std::move(results));
  }

 private:
  struct Place {
    size_t allocation, part;
  };

  const std::vector<int64_t> entries_;
  const std::vector<int32_t> bases_;
  std::vector<Allocation> allocations_;
  std::vector<Place> firsts_, passed_;  // of all rooms, and of those that launches take
  std::vector<std::optional<Place>> returned_;
};

}  // namespace

py::object signature(std::initializer_list<at::TensorList> moving, std::initializer_list<at::TensorList> fixed) {
  size_t size = 0;
  for (const auto& groups : {moving, fixed}) {
    for (const at::TensorList group : groups) size += group.size();
  }
  Signature result(size);
  for (const auto& [groups, stay] : {std::pair(moving, false), std::pair(fixed, true)}) {
    for (const at::TensorList group : groups) {
      for (const at::Tensor& tensor : group) result.add(tensor.defined() ? &tensor : nullptr, stay);
    }
  }
  return result.object();
}

py::object to_python(at::Tensor tensor) {
  PyObject* const object = THPVariable_Wrap(std::move(tensor));
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

void define_recording(py::module_& module) {
  module.def("signature", &signature_of_lists,
             "What of moving and of fixed tensors a call's launches depend on, or None.");
  py::class_<Results>(module, "Results").def("list", [](const Results& results) {
    py::list found;
    for (const at::Tensor& tensor : results.tensors) found.append(to_python(tensor));
    return found;
  });
  module.def("together", &together, "Tensors of these shapes, in one allocation.");
  py::class_<Recording>(module, "Recording")
      .def(py::init<std::vector<int64_t>, std::vector<int32_t>, const std::vector<std::pair<py::object, Shapes>>&,
                    const std::vector<int32_t>&, const std::vector<int32_t>&>())
      .def("prepare", &Recording::prepare,
           "The table, what launches take beside it, what stays, and what is returned.");
}

}  // namespace mtlk
