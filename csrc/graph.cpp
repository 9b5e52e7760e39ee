// Walks over autograd's graph. A node takes microseconds in Python, and a small model's backward pass has few more.

#include "graph.h"

#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <typeinfo>
#include <unordered_set>
#include <utility>
#include <vector>

#include "level_node.h"

namespace mtlk {
namespace {

namespace py = pybind11;
using torch::autograd::Node;

// visit(node) of each node below losses, once, in the order of mtlkernels._graph.nodes, until one of them is true. No
// Python runs meanwhile, so that the losses keep all of them alive.
template <typename Visit>
void walk(const py::sequence& losses, Visit visit) {
  std::unordered_set<const Node*> seen;
  std::vector<Node*> below;
  for (const py::handle loss : losses) {
    below.push_back(THPVariable_Unpack(loss.ptr()).grad_fn().get());
    while (!below.empty()) {
      Node* const node = below.back();
      below.pop_back();
      if (!node || !seen.insert(node).second) continue;
      if (visit(node)) return;
      for (const auto& edge : node->next_edges()) below.push_back(edge.function.get());
    }
  }
}

// By its name: PyTorch keeps the type to itself.
bool is_of_python(const Node& node) { return std::strcmp(typeid(node).name(), "N5torch8autograd6PyNodeE") == 0; }

py::object as_python(Node* node) {
  return py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node->getptr()));
}

// The nodes that Functions in Python have made, and the leaves that have this attribute.
py::tuple notable_nodes(const py::sequence& losses, py::handle attribute) {
  std::vector<decltype(std::declval<Node>().getptr())> made;
  std::vector<at::Tensor> leaves;
  walk(losses, [&](Node* node) {
    if (const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      leaves.push_back(leaf->variable);
    } else if (is_of_python(*node)) {
      made.push_back(node->getptr());
    }
    return false;
  });
  py::list nodes, with_attribute;
  for (const auto& node : made) nodes.append(as_python(node.get()));
  for (const at::Tensor& leaf : leaves) {
    const auto tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf));
    if (py::hasattr(tensor, attribute)) with_attribute.append(tensor);
  }
  return py::make_tuple(std::move(nodes), std::move(with_attribute));
}

// The node of a level that a loss meets first, made in C++ or by this Function in Python; None where there is none.
py::object first_level(const py::sequence& losses, py::handle function) {
  Node* found = nullptr;
  walk(losses, [&](Node* node) {
    const bool is_level = is_of_python(*node) ? py::getattr(as_python(node), "_forward_cls", py::none()).is(function)
                                              : is_level_node(node);
    if (is_level) found = node;
    return is_level;
  });
  return found ? as_python(found) : py::none();
}

}  // namespace

void define_graph(py::module_& module) {
  module.def("notable_nodes", &notable_nodes, "Nodes below losses that Functions made, leaves with an attribute.");
  module.def("first_level", &first_level, "The node of a level that a loss meets first, or None.");
}

}  // namespace mtlk
