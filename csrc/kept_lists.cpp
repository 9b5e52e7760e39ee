// Calls of expert_mixture that serve, by lists of tensors that a model of its caller's own holds. What was read of them
// is kept under the address of the first weight, and each call compares the lists with it, which takes less than
// reading them, checking them and laying out tables does.

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/runtime/check.h"
#include "kept_level.h"
#include "modules.h"
#include "snapshot.h"

namespace mtlk {
namespace {

namespace py = pybind11;

// A call's parameters, borrowed.
struct Lists {
  PyObject *weights, *biases, *gate_weights, *gate_biases;
};

bool is_list(PyObject* object) { return PyList_CheckExact(object) || PyTuple_CheckExact(object); }

// visit(tensor) for each of a list, undefined for None, until it returns false; `count` times for None in its place.
template <typename F>
bool each_of(PyObject* list, Py_ssize_t count, F visit) {
  if (list == Py_None) {
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!visit(at::Tensor())) return false;
    }
    return true;
  }
  if (!is_list(list) || PySequence_Fast_GET_SIZE(list) != count) return false;
  PyObject** const items = PySequence_Fast_ITEMS(list);
  return std::all_of(items, items + count, [&](PyObject* item) {
    return item == Py_None ? visit(at::Tensor()) : is_tensor(item) && visit(THPVariable_Unpack(item));
  });
}

// The same for all parameters, of which there are as many in each layer, and as many gates, until it returns false.
// Returns false then, and where they do not lie in lists or tuples, an expert's or a gate's each by itself.
template <typename F>
bool each_parameter(const Lists& lists, Py_ssize_t layers, Py_ssize_t experts, Py_ssize_t gates, F visit) {
  for (PyObject* list : {lists.weights, lists.biases}) {
    if (list != Py_None && (!is_list(list) || PySequence_Fast_GET_SIZE(list) != layers)) return false;
    PyObject** const of_layers = list == Py_None ? nullptr : PySequence_Fast_ITEMS(list);
    for (Py_ssize_t l = 0; l < layers; ++l) {
      if (!each_of(of_layers ? of_layers[l] : Py_None, experts, visit)) return false;
    }
  }
  return each_of(lists.gate_weights, gates, visit) && each_of(lists.gate_biases, gates, visit);
}

// The first weight's address; null where that is not to be found.
const void* address(PyObject* weights) {
  if (!is_list(weights) || PySequence_Fast_GET_SIZE(weights) == 0) return nullptr;
  PyObject* const layer = PySequence_Fast_ITEMS(weights)[0];
  if (!is_list(layer) || PySequence_Fast_GET_SIZE(layer) == 0) return nullptr;
  PyObject* const weight = PySequence_Fast_ITEMS(layer)[0];
  return is_tensor(weight) && is_plain(THPVariable_Unpack(weight)) ? THPVariable_Unpack(weight).const_data_ptr()
                                                                   : nullptr;
}

class KeptLists {
 public:
  // `backends` and `dumps` as in is_plain_call.
  KeptLists(py::object backends, py::object dumps) : backends_(std::move(backends)), dumps_(std::move(dumps)) {}

  // The outputs of a call with linear gates and one activation everywhere, without gradients, norms and slopes; None:
  // nothing is kept of it; False: and something should be, if it is served.
  py::object serve(py::handle inputs, py::handle weights, py::handle biases, py::handle gate_weights,
                   py::handle gate_biases, py::handle routing, py::handle activation) {
    const void* const key = address(weights.ptr());
    if (!key) return py::none();
    Place& place = at(key);
    place.used = ++calls_;
    if (!place.call) return ++place.waited > place.wait ? py::object(py::bool_(false)) : py::none();
    Tensors streams;
    if (place.call->single != is_tensor(inputs.ptr()) || !read_streams(inputs.ptr(), streams) ||
        !is_plain_call(inputs.ptr(), streams, backends_.ptr(), dumps_.ptr())) {
      return py::none();
    }
    const std::shared_ptr<const Call> call = place.call;  // other threads may drop it while this one computes
    std::vector<c10::Storage> held;
    const Lists lists{weights.ptr(), biases.ptr(), gate_weights.ptr(), gate_biases.ptr()};
    if (!call->is(lists, routing, activation, held)) {
      place.drop();
      return py::none();
    }
    ++place.served;
    return served(call->level, streams);
  }

  int64_t size() const {
    return std::count_if(places_.begin(), places_.end(),
                         [](const auto& place) { return place.second.call != nullptr; });
  }

  // Keeps a call that was served, whose spec has these ints. `single`: of one tensor that everybody reads, which a list
  // of one tensor is not.
  void keep(bool single, py::handle weights, py::handle biases, py::handle gate_weights, py::handle gate_biases,
            py::handle routing, py::handle activation, py::handle spec_ints) {
    const void* const key = address(weights.ptr());
    if (!key) return;
    Place& place = at(key);
    place.waited = place.served = 0;
    place.call = made(single, {weights.ptr(), biases.ptr(), gate_weights.ptr(), gate_biases.ptr()}, routing, activation,
                      spec_ints);
    if (!place.call) place.wait_longer();
  }

 private:
  struct Call {
    Call(bool single, py::object routing, py::object activation, KnownTensors known, StoredCall stored)
        : single(single),
          routing(std::move(routing)),
          activation(std::move(activation)),
          known(std::move(known)),
          layers(stored.spec.layers()),
          experts(stored.spec.experts()),
          gates(stored.spec.gates()),
          level(std::move(stored.spec), stored.call.tensors, stored.call.norms) {}

    bool is(const Lists& lists, py::handle its_routing, py::handle its_activation,
            std::vector<c10::Storage>& held) const {
      if (!routing.is(its_routing) || !activation.is(its_activation)) return false;
      KnownTensors::Comparison now(known, held);
      return each_parameter(lists, layers, experts, gates, [&](const at::Tensor& t) { return now.next(t); }) &&
             now.complete();
    }

    const bool single;
    const py::object routing, activation;
    const KnownTensors known;
    const Py_ssize_t layers, experts, gates;
    const KeptLevel level;
  };

  // Null where the call is not one to be kept.
  static std::shared_ptr<const Call> made(bool single, const Lists& lists, py::handle routing, py::handle activation,
                                          py::handle spec_ints) {
    const py::none none;
    try {
      auto stored =
          stored_call(lists.weights, lists.biases, lists.gate_weights, lists.gate_biases, none, none, spec_ints);
      if (!stored || !stored->call.tensors.linear_gates) return nullptr;
      KnownTensors known;
      const Py_ssize_t layers = stored->spec.layers(), experts = stored->spec.experts(), gates = stored->spec.gates();
      if (!each_parameter(lists, layers, experts, gates, [&](const at::Tensor& t) { return known.take(t); })) {
        return nullptr;
      }
      return std::make_shared<const Call>(single, py::reinterpret_borrow<py::object>(routing),
                                          py::reinterpret_borrow<py::object>(activation), std::move(known),
                                          std::move(*stored));
    } catch (const Refused&) {
      return nullptr;
    }
  }

  // What is known of the calls with one address, by the rule of KeptCalls in mtlkernels/ops/level/kept.py: they are
  // kept the sooner, the longer the last one that was had served.
  struct Place {
    void drop() {
      if (served > 8 * wait) {
        wait = 1;
      } else {
        wait_longer();
      }
      call = nullptr;
      waited = served = 0;
    }
    void wait_longer() { wait = std::min<int64_t>(2 * wait, kMostCallsToWait); }

    std::shared_ptr<const Call> call;
    int64_t used = 0, wait = 1, waited = 0, served = 0;
  };
  static constexpr int64_t kMostCallsToWait = 1024;
  static constexpr size_t kMostPlaces = 64;

  // Where there are too many, that which was used least recently goes.
  Place& at(const void* key) {
    const auto found = places_.find(key);
    if (found != places_.end()) return found->second;
    if (places_.size() >= kMostPlaces) {
      places_.erase(std::min_element(places_.begin(), places_.end(),
                                     [](const auto& a, const auto& b) { return a.second.used < b.second.used; }));
    }
    return places_[key];
  }

  const py::object backends_, dumps_;
  std::unordered_map<const void*, Place> places_;
  int64_t calls_ = 0;
};

}  // namespace

void define_kept_lists(py::module_& module) {
  py::class_<KeptLists>(module, "KeptLists")
      .def(py::init<py::object, py::object>())
      .def("serve", &KeptLists::serve, "Outputs, None or False, see there.")
      .def("keep", &KeptLists::keep, "Keeps a call that was served.")
      .def("__len__", &KeptLists::size, "How many calls are kept.");
}

}  // namespace mtlk
