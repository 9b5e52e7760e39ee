// The signature of a call's tensors, which may be hundreds, and the memory of a call that has been made before: its
// table, its results and its scratch, as mtlkernels/ops/_recording.py wants them.

#include "recording.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

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
    f(THPVariable_Check(items[i]) ? &THPVariable_Unpack(items[i]) : nullptr);
  }
}

// Of a sparse tensor, say, or one that stands for another, there is none: None.
py::object signature(py::handle moving, py::handle fixed) {
  std::string words;
  words.reserve(64 * (PySequence_Fast_GET_SIZE(moving.ptr()) + PySequence_Fast_GET_SIZE(fixed.ptr())));
  bool dense = true;
  for (const auto& [tensors, stay] : {std::pair(moving, false), std::pair(fixed, true)}) {
    each_tensor(tensors, [&](const at::Tensor* tensor) {
      if (!tensor) return add(words, -1);
      dense = dense && tensor->layout() == at::kStrided && tensor->has_storage() &&
              !tensor->unsafeGetTensorImpl()->is_python_dispatch();
      if (dense) describe(words, *tensor, stay);
    });
  }
  if (!dense) return py::none();
  return py::bytes(words);
}

struct Part {
  int64_t offset;  // in elements
  std::vector<int64_t> sizes;
};

// One allocation, of several tensors that become results each by itself, or of one.
struct Room {
  at::ScalarType dtype;
  std::vector<Part> parts;
  int64_t size = 0;
};

// A tensor of its own in the memory of another, no view of it.
at::Tensor tensor_in(const at::Tensor& memory, const Part& part) {
  at::Tensor tensor =
      at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory.storage()), memory.key_set(), memory.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(part.sizes);
  tensor.unsafeGetTensorImpl()->set_storage_offset(part.offset);
  return tensor;
}

std::vector<at::Tensor> allocate(const Room& room, const at::Tensor& like) {
  const at::TensorOptions options = like.options().dtype(room.dtype);
  if (room.parts.size() == 1) return {at::empty(room.parts[0].sizes, options)};
  const at::Tensor memory = at::empty({room.size}, options);
  std::vector<at::Tensor> tensors;
  tensors.reserve(room.parts.size());
  for (const Part& part : room.parts) tensors.push_back(tensor_in(memory, part));
  return tensors;
}

// Tensors of these shapes in one allocation, as a recording gives them later.
Room room_of(py::handle dtype, std::vector<std::vector<int64_t>> shapes) {
  if (!THPDtype_Check(dtype.ptr())) throw py::type_error("mtlkernels: a dtype was expected");
  Room room{reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type, {}};
  const auto apart = kApart / static_cast<int64_t>(c10::elementSize(room.dtype));
  for (std::vector<int64_t>& sizes : shapes) {
    const int64_t size = c10::multiply_integers(sizes);
    room.parts.push_back({room.size, std::move(sizes)});
    room.size += (size + apart - 1) / apart * apart;
  }
  return room;
}

py::list together(py::handle like, py::handle dtype, std::vector<std::vector<int64_t>> shapes) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  py::list found;
  if (shapes.empty()) return found;
  for (at::Tensor& tensor : allocate(room_of(dtype, std::move(shapes)), THPVariable_Unpack(like.ptr()))) {
    found.append(to_python(std::move(tensor)));
  }
  return found;
}

class Recording {
 public:
  // `entries` of the table, each relative to what `bases` says: to nothing, 0; to the i-th tensor that a call brings,
  // i + 1; or to a room, whose numbers go on from there. `rooms` are dtypes and shapes. `returned` are tensors by their
  // number among those of all rooms, or -1 for None.
  Recording(std::vector<int64_t> entries, std::vector<int32_t> bases,
            const std::vector<std::pair<py::object, std::vector<std::vector<int64_t>>>>& rooms,
            std::vector<int32_t> returned)
      : entries_(std::move(entries)), bases_(std::move(bases)), returned_(std::move(returned)) {
    for (const auto& [dtype, shapes] : rooms) rooms_.push_back(room_of(dtype, shapes));
  }

  // The table of a call in the host's memory; a tensor of each room; and what is returned.
  py::tuple prepare(py::handle moving) const {
    const at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<int64_t> base = {0};
    const at::Tensor* like = nullptr;
    each_tensor(moving, [&](const at::Tensor* tensor) {
      if (!like) like = tensor;
      base.push_back(reinterpret_cast<int64_t>(tensor->const_data_ptr()));
    });
    std::vector<at::Tensor> tensors;
    py::list firsts;
    Results results;
    for (const Room& room : rooms_) {
      std::vector<at::Tensor> found = allocate(room, *like);
      base.push_back(reinterpret_cast<int64_t>(found[0].const_data_ptr()));
      firsts.append(to_python(found[0]));
      std::move(found.begin(), found.end(), std::back_inserter(tensors));
    }
    const auto count = static_cast<int64_t>(entries_.size());
    at::Tensor table = at::empty({count}, at::TensorOptions().dtype(at::kLong).pinned_memory(like->is_cuda()));
    auto* const values = table.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) values[i] = entries_[i] + base[bases_[i]];
    for (const int32_t number : returned_) results.tensors.push_back(number < 0 ? at::Tensor() : tensors[number]);
    return py::make_tuple(to_python(std::move(table)), firsts, std::move(results));
  }

 private:
  const std::vector<int64_t> entries_;
  const std::vector<int32_t> bases_;
  std::vector<Room> rooms_;
  const std::vector<int32_t> returned_;
};

}  // namespace

py::object to_python(at::Tensor tensor) {
  PyObject* const object = THPVariable_Wrap(std::move(tensor));
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

void define_recording(py::module_& module) {
  module.def("signature", &signature, "What of moving and of fixed tensors a call's launches depend on, or None.");
  py::class_<Results>(module, "Results").def("list", [](const Results& results) {
    py::list found;
    for (const at::Tensor& tensor : results.tensors) found.append(to_python(tensor));
    return found;
  });
  module.def("together", &together, "Tensors of these shapes, in one allocation.");
  py::class_<Recording>(module, "Recording")
      .def(py::init<std::vector<int64_t>, std::vector<int32_t>,
                    const std::vector<std::pair<py::object, std::vector<std::vector<int64_t>>>>&,
                    std::vector<int32_t>>())
      .def("prepare", &Recording::prepare, "The table, a tensor of each room, and what is returned.");
}

}  // namespace mtlk
