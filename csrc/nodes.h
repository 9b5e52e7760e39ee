// Nodes of autograd's graph that are made without torch::autograd::Function::apply: what that does but for the inputs'
// shapes, which nobody reads.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <string>
#include <type_traits>

#include "cpu/level/spec.h"

namespace mtlk {

// `Function` has a static backward, as torch::autograd's have, and kName: what is printed of an output and of an error
// in it.
template <typename Function, typename Root = torch::autograd::Node>
struct NodeOf : torch::autograd::CppNode<Function> {
  std::string name() const override { return Function::kName; }
  // Newer versions of PyTorch have this virtual function, which destructors call. There the base makes an empty
  // context, in memory that there may not be. Older versions do not have it, nor is it compiled with them.
  void release_resources() {
    Root::release_resources();
    this->release_variables();
    // The context refers to the node, weakly, and as long as anyone does its memory is not given back.
    if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Root>) this->set_ctx_grad_fn(c10::intrusive_ptr<Root>());
  }
};

// Newer versions count nodes by intrusive pointers.
template <typename Node>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<Node>();
  } else {
    return std::shared_ptr<Node>(new Node(), [](Node* node) { deleteNode(node); });  // torch::autograd's
  }
}

// f() with the GIL, in a backward pass, whose threads carry Python's errors in a way of their own.
template <typename F>
auto with_python(F f) {
  const pybind11::gil_scoped_acquire gil;
  try {
    return f();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    python_error persistent;
    persistent.persist();
    throw persistent;
  }
}

// Gives outputs a node with an edge for each of these tensors. keep(context) says what the context has.
template <typename Function, typename Keep>
void attach_node(const Tensors& tensors, Tensors& outputs, Keep keep) {
  const auto node = make_node<NodeOf<Function>>();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(tensors));
  node->is_variable_input_.assign(tensors.size(), true);
  node->ctx_.set_materialize_grads(false);
  keep(node->ctx_);
  for (at::Tensor& output : outputs) {
    torch::autograd::set_history(output, node);
    node->output_info_.emplace_back(output);
  }
  node->save_variables_to_ctx();
}

}  // namespace mtlk
