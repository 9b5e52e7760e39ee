#include "level_node.h"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu/level/level.h"
#include "nodes.h"
#include "observers.h"
#include "recording.h"

namespace mtlk {
namespace {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a node keeps beside tensors, by name. Compiled autograd wants to hash it, so that it is made of ints and of
// strings that are UTF-8.
const std::string kSpec = "spec";      // the level's ints, as text_of their bytes
const std::string kFloats = "floats";  // and floats
const std::string kWanted = "wanted";  // of each tensor: a byte of those below
const std::string kWay = "way";        // bits of those below
const std::string kSaved = "saved";    // how many tensors the forward pass saved
const std::string kLosses = "losses";  // the number of a mtlkernels.ops.level.node.Losses, or 0

constexpr char kAbsent = 0, kConstant = 1, kVariable = 2;

// How the forward pass was run: by what was recorded of such a call, or by the C++ kernels; as the caller asked by
// name.
constexpr int64_t kRecorded = 1, kByName = 2;

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// Two letters for each byte, and back.
std::string text_of(std::string_view bytes) {
  std::string text;
  text.reserve(2 * bytes.size());
  for (const char byte : bytes) {
    text += static_cast<char>('a' + (static_cast<unsigned char>(byte) >> 4));
    text += static_cast<char>('a' + (byte & 15));
  }
  return text;
}

std::string bytes_of_text(std::string_view text) {
  std::string bytes(text.size() / 2, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<char>((text[2 * i] - 'a') << 4 | (text[2 * i + 1] - 'a'));
  }
  return bytes;
}

template <typename T>
std::vector<T> values_of(std::string_view bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

class Context {
 public:
  explicit Context(AutogradContext* context) : context_(context) {}

  LevelSpec spec() const {
    return LevelSpec(values_of<int64_t>(words()), values_of<double>(bytes_of_text(string(kFloats))));
  }
  std::string words() const { return bytes_of_text(string(kSpec)); }
  const std::string& wanted() const { return string(kWanted); }
  bool recorded() const { return (integer(kWay) & kRecorded) != 0; }
  bool by_name() const { return (integer(kWay) & kByName) != 0; }
  int64_t num_saved() const { return integer(kSaved); }
  int64_t losses() const { return integer(kLosses); }
  void set_losses(int64_t number) { context_->saved_data[kLosses] = number; }

  // Of all tensors, whether this backward pass has a use for their gradients.
  std::vector<bool> needs() const {
    std::vector<bool> result;
    size_t edge = 0;
    for (const char kind : wanted()) result.push_back(kind != kAbsent && context_->needs_input_grad(edge++));
    return result;
  }

  // All tensors, the seed of what is dropped, which may be undefined, and what the forward pass saved. Once:
  // checkpointing computes it anew each time.
  variable_list saved() const { return context_->get_saved_variables(); }

 private:
  const std::string& string(const std::string& name) const { return context_->saved_data.at(name).toStringRef(); }
  int64_t integer(const std::string& name) const { return context_->saved_data.at(name).toInt(); }

  AutogradContext* context_;
};

constexpr std::array<Tensors LevelTensors::*, 8> kKinds = {
    &LevelTensors::inputs, &LevelTensors::weights, &LevelTensors::biases, &LevelTensors::scales,
    &LevelTensors::shifts, &LevelTensors::slopes,  &LevelTensors::gates,  &LevelTensors::gate_biases};

// Of each kind of a level's tensors, in their order.
Needs needs_by_kind(const std::vector<bool>& needs, const LevelTensors& tensors) {
  Needs result{};
  auto next = needs.begin();
  size_t kind = 0;
  for (const auto of_kind : kKinds) {
    const auto end = next + static_cast<int64_t>((tensors.*of_kind).size());
    result[kind++] = std::find(next, end, true) != end;
    next = end;
  }
  return result;
}

Tensors by_cpp(const Context& context, const variable_list& grads) {
  const LevelSpec spec = context.spec();
  const std::vector<bool> needs = context.needs();
  const variable_list saved = context.saved();
  const at::TensorList all(saved);
  LevelTensors tensors = spec.split(all.slice(0, needs.size()));
  hold_memory(tensors);
  return differentiate_level(spec, tensors, grads, all.slice(needs.size() + 1), all[needs.size()],
                             needs_by_kind(needs, tensors));
}

// A byte for each.
py::bytes flags_of(const std::vector<bool>& needs) { return std::string(needs.begin(), needs.end()); }

// Those of mtlkernels.ops.level.node.
struct NodeFunctions {
  py::object gradients, replayed, recorded;
};

const NodeFunctions& node_functions() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<NodeFunctions> functions;
  return functions
      .call_once_and_store_result([] {
        const py::module_ node = py::module_::import("mtlkernels.ops.level.node");
        return NodeFunctions{node.attr("gradients_of_node"), node.attr("replayed"), node.attr("recorded")};
      })
      .get_stored();
}

// What a call that was recorded takes on, unless somebody looks on: by what was recorded of such a backward pass, for
// which Python needs the tensors that move alone; or by what records one.
py::object of_recorded_call(const Context& context, const variable_list& grads) {
  const LevelSpec spec = context.spec();
  const std::vector<bool> needs = context.needs();
  const py::bytes words(context.words()), flags = flags_of(needs);
  const variable_list saved = context.saved();
  const at::TensorList all(saved), tensors = all.slice(0, needs.size()), stored = all.slice(needs.size() + 1);
  const size_t logits = spec.gate_inputs.empty() ? spec.gates() : 0, parameters = needs.size() - logits;
  const at::TensorList inputs = tensors.slice(0, spec.num_inputs), given = tensors.slice(parameters);
  const at::TensorList fixed = tensors.slice(spec.num_inputs, parameters - spec.num_inputs);
  variable_list present;
  py::tuple mask(grads.size());
  for (size_t k = 0; k < grads.size(); ++k) {
    mask[k] = py::bool_(grads[k].defined());
    if (grads[k].defined()) present.push_back(grads[k]);
  }
  const bool in_rows = std::all_of(present.begin(), present.end(), [](const at::Tensor& grad) {
    return grad.layout() == at::kStrided && grad.is_contiguous();
  });
  if (in_rows) {
    const std::initializer_list<at::TensorList> moving = {present, inputs, given, stored};
    py::list objects;
    for (const at::TensorList group : moving) {
      for (const at::Tensor& tensor : group) objects.append(to_python(tensor));
    }
    py::object found = node_functions().replayed(words, mask, flags, signature(moving, {fixed}), objects);
    if (!found.is_none()) return found;
  }
  return node_functions().recorded(words, wrapped(grads), wrapped(tensors), wrapped(stored), flags);
}

Tensors by_python(const Context& context, const variable_list& grads) {
  return with_python([&] {
    const bool plain = context.recorded() && !context.losses() && !is_observed(grads);
    return unwrapped(plain ? of_recorded_call(context, grads) : node_functions().gradients(context, wrapped(grads)));
  });
}

struct LevelFunction : torch::autograd::Function<LevelFunction> {
  static constexpr const char* kName = "mtlkernels::ExpertMixtureBackward";

  static variable_list backward(AutogradContext* saved, variable_list grads) {
    const Context context(saved);
    const std::string& wanted = context.wanted();
    variable_list result(wanted.size() - std::count(wanted.begin(), wanted.end(), kAbsent));  // one an edge
    const bool reached = std::any_of(grads.begin(), grads.end(), [](const at::Tensor& t) { return t.defined(); });
    if (!reached && !context.losses()) return result;
    const bool in_cpp = !context.recorded() && !context.losses() && !is_observed(grads);
    Tensors found = in_cpp ? by_cpp(context, grads) : by_python(context, grads);
    size_t edge = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      if (wanted[i] != kAbsent) result[edge++] = std::move(found[i]);
    }
    return result;
  }
};

using LevelNode = NodeOf<LevelFunction>;

// Gives outputs a node. `words` are the spec's ints, and `floats` its floats.
Tensors with_node(std::string_view words, std::string_view floats, const Tensors& tensors, const at::Tensor& seed,
                  LevelResults results, int64_t way) {
  Tensors given;  // the tensors that there are: each has an edge
  std::string wanted;
  for (const at::Tensor& tensor : tensors) {
    wanted += !tensor.defined() ? kAbsent : tensor.requires_grad() ? kVariable : kConstant;
    if (tensor.defined()) given.push_back(tensor);
  }
  attach_node<LevelFunction>(given, results.outputs, [&](AutogradContext& context) {
    context.saved_data[kSpec] = text_of(words);
    context.saved_data[kFloats] = text_of(floats);
    context.saved_data[kWanted] = std::move(wanted);
    context.saved_data[kWay] = way;
    context.saved_data[kSaved] = static_cast<int64_t>(results.saved.size());
    context.saved_data[kLosses] = int64_t{0};
    variable_list kept = tensors;
    kept.push_back(seed);
    std::move(results.saved.begin(), results.saved.end(), std::back_inserter(kept));
    context.save_for_backward(std::move(kept));
  });
  return std::move(results.outputs);
}

// The outputs among what a recorded call has `found`, with a node.
py::list recorded_level(py::handle tensors, py::handle found, std::string words, bool by_name) {
  const LevelSpec spec = spec_of_words(words);
  Tensors outputs = unwrapped(found);
  Tensors saved(outputs.begin() + spec.gates(), outputs.end());
  outputs.resize(spec.gates());
  LevelResults results{std::move(outputs), std::move(saved)};
  const int64_t way = by_name ? kRecorded | kByName : kRecorded;
  const Tensors given = unwrapped(tensors);
  {
    const py::gil_scoped_release release;  // see has_tangent
    outputs = with_node(words, {}, given, {}, std::move(results), way);
  }
  return wrapped(outputs);
}

// Newer versions of PyTorch hold the node of a Function in Python, older ones only as long as it has others.
template <typename Pointer>
torch::autograd::Node* node_of(const Pointer& pointer) {
  if constexpr (requires { pointer.lock(); }) {
    return pointer.lock().get();
  } else {
    return pointer.get();
  }
}

bool has_node_hooks(py::handle object) {
  torch::autograd::Node* const node =
      torch::autograd::THPCppFunction_Check(object.ptr())
          ? node_of(reinterpret_cast<torch::autograd::THPCppFunction*>(object.ptr())->cdata)
      : THPFunction_Check(object.ptr()) ? node_of(reinterpret_cast<THPFunction*>(object.ptr())->cdata)
                                        : nullptr;
  return node && (!node->pre_hooks().empty() || !node->post_hooks().empty());
}

// The context of a node that is one of ours, otherwise None.
py::object level_context(py::handle node) {
  if (!torch::autograd::THPCppFunction_Check(node.ptr())) return py::none();
  auto* const function = reinterpret_cast<torch::autograd::THPCppFunction*>(node.ptr())->cdata.get();
  auto* const own = dynamic_cast<LevelNode*>(function);
  return own ? py::cast(Context(&own->ctx_)) : py::none();
}

}  // namespace

bool is_level_node(torch::autograd::Node* node) { return dynamic_cast<LevelNode*>(node) != nullptr; }

LevelSpec spec_of_words(std::string_view words) { return LevelSpec(values_of<int64_t>(words), {}); }

Tensors with_level_node(const LevelSpec& spec, const LevelTensors& tensors, const at::Tensor& seed,
                        LevelResults results, bool by_name) {
  Tensors all;
  for (const auto of_kind : kKinds) all.insert(all.end(), (tensors.*of_kind).begin(), (tensors.*of_kind).end());
  const auto [ints, floats] = spec.encoded();
  return with_node(bytes_of(ints), bytes_of(floats), all, seed, std::move(results), by_name ? kByName : 0);
}

void define_level_node(py::module_& module) {
  module.def("recorded_level", &recorded_level, "The outputs of a call that was replayed, with a node of its tensors.");
  module.def("level_context", &level_context, py::keep_alive<0, 1>(),
             "The context of a node that was made in C++, otherwise None.");
  module.def("has_node_hooks", &has_node_hooks, "Whether hooks were registered on a node, other than on a tensor.");
  py::class_<Context>(module, "LevelContext")
      .def_property_readonly("encoded", [](const Context& context) { return context.spec().encoded(); })
      .def_property_readonly("recorded", &Context::recorded)
      .def_property_readonly("by_name", &Context::by_name)
      .def_property_readonly("words", [](const Context& context) { return py::bytes(context.words()); })
      .def_property_readonly("needs", &Context::needs)
      .def_property_readonly("flags", [](const Context& context) { return flags_of(context.needs()); })
      .def_property_readonly("variables",
                             [](const Context& context) {
                               std::vector<bool> result;
                               for (const char kind : context.wanted()) result.push_back(kind == kVariable);
                               return result;
                             })
      .def_property_readonly("num_saved", &Context::num_saved)
      .def_property_readonly("saved", [](const Context& context) { return wrapped(context.saved()); })
      .def_property("losses", &Context::losses, &Context::set_losses);
}

}  // namespace mtlk
